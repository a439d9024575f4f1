"""Picture -> semantic tokens: the checkpoint's vision tower and vector quantiser.

Letters: B batch, C colour channels, H x W pixels, h x w tokens, P = h*w, D tower width, E code width.

Pictures are tensors in [-1, 1] (the published mean and deviation are both 0.5). The tower sees a picture at *half* its
size in patches of 16, so one token stands for 32 x 32 pixels of the picture. The modules are transformers' (any adapter
on their linear layers stays in effect); the forward is ours, because theirs takes packed patches of one picture after
the other, and transformers 5.23 and diffusers 0.42 disagree about the shape that goes into the quantiser.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from glmimg.attention import attend
from glmimg.errors import BadInput, CheckpointError
from glmimg.token_grid import TOKEN_SIDE

__all__ = ["MAX_ASPECT", "SemanticTokenizer", "fit_reference"]

MAX_ASPECT = 4.0


def fit_reference(width: int, height: int, min_size: int = 512, max_size: int = 2048) -> tuple[int, int]:
    """Size (width, height) to which a reference picture is resized, its shape kept as nearly as multiples of 32 allow.

    Both sides become multiples of 32, so that the token grid doubled is exactly the decoder's grid, and lie within
    `min_size` and `max_size` where the shape permits (`max_size` wins). Aspect ratios above 4 are refused.
    """
    if width < 1 or height < 1:
        raise BadInput(f"a reference picture of {width}x{height} has no pixels")
    aspect = max(width, height) / min(width, height)
    if aspect > MAX_ASPECT:
        raise BadInput(
            f"a reference picture of {width}x{height} has an aspect ratio of {aspect:.2f}; at most {MAX_ASPECT:.0f} is "
            "allowed: crop it first"
        )
    scale = max(1.0, min_size / min(width, height))
    scale = min(scale, max_size / max(width, height))
    limit = max(TOKEN_SIDE, max_size // TOKEN_SIDE * TOKEN_SIDE)

    def snapped(side: int) -> int:
        # half a token's side to the even one, as the published processor
        return min(limit, max(TOKEN_SIDE, round((side // 2 or 0.5) * scale / (TOKEN_SIDE // 2)) * TOKEN_SIDE))

    fitted = snapped(width), snapped(height)
    # Rounding a thin picture can push it over the limit by one token: widen its short side.
    floor = math.ceil(max(fitted) / MAX_ASPECT / TOKEN_SIDE) * TOKEN_SIDE
    return max(fitted[0], floor), max(fitted[1], floor)


class SemanticTokenizer:
    """The path from pictures to token ids over a GLM-Image model's vision tower and quantiser.

    `visual` and `vqmodel` are transformers' GlmImageVisionModel and GlmImageVQVAE. Nothing is copied: training the
    modules trains this tokenizer.
    """

    def __init__(self, visual: nn.Module, vqmodel: nn.Module) -> None:
        for name, module in (("vision tower", visual), ("vector quantiser", vqmodel)):
            if any(p.is_meta for p in module.parameters()):
                raise CheckpointError(
                    f"the {name} is not loaded with this model: open the checkpoint with its vision tower"
                )
        self.visual: Any = visual
        self.vqmodel: Any = vqmodel
        self.patch: int = visual.config.patch_size  # type: ignore[assignment, union-attr]

    @classmethod
    def of(cls, model: Any) -> SemanticTokenizer:
        """Over a whole GlmImageForConditionalGeneration."""
        return cls(model.model.visual, model.model.vqmodel)

    @property
    def codebook_size(self) -> int:
        return int(self.vqmodel.quantize.num_embeddings)

    def features(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Tower states_BDhw of pictures *at tower size* (half size), in [-1, 1], sides multiples of the patch.

        Differentiable in the pixels and in the tower's weights; equals transformers' own forward.
        """
        B, C, H, W = pixels_BCHW.shape
        p = self.patch
        if H % p or W % p or not H or not W:
            raise BadInput(f"the tower takes sides that are multiples of {p}, got {H}x{W}")
        h, w = H // p, W // p
        proj = self.visual.patch_embed.proj
        patches_BPK = pixels_BCHW.reshape(B, C, h, p, w, p).permute(0, 2, 4, 1, 3, 5).reshape(B, h * w, C * p * p)
        x_BPD = F.linear(patches_BPK.to(proj.weight.dtype), proj.weight.flatten(1), proj.bias)
        x_BPD = x_BPD + self._positions(h, w)
        for block in self.visual.blocks:
            x_BPD = x_BPD + self._attention(block.attn, block.norm1(x_BPD))
            x_BPD = x_BPD + block.mlp(block.norm2(x_BPD))
        return x_BPD.transpose(1, 2).unflatten(2, (h, w))

    def _positions(self, h: int, w: int) -> torch.Tensor:
        """The learnt square table of positions, stretched to h x w: (P, D)."""
        table = self.visual.embeddings.position_embedding.weight
        side = math.isqrt(table.shape[0])
        square = table.view(side, side, -1).permute(2, 0, 1)[None].float()
        stretched = F.interpolate(square, size=(h, w), mode="bilinear", align_corners=False)
        return stretched[0].flatten(1).T.to(table.dtype)

    @staticmethod
    def _attention(attn: Any, x_BPD: torch.Tensor) -> torch.Tensor:
        qkv = attn.qkv(x_BPD).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return attn.proj(attend(qkv[0], qkv[1], qkv[2]).transpose(1, 2).flatten(2))

    def code_vectors(self, features_BDhw: torch.Tensor) -> torch.Tensor:
        """The unit vectors_BhwE that are compared with the codebook; differentiable."""
        conv = self.vqmodel.quant_conv
        vectors_BhwE = F.linear(features_BDhw.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias)
        return F.normalize(vectors_BhwE, dim=-1)

    @torch.no_grad()
    def quantize(self, features_BDhw: torch.Tensor) -> torch.Tensor:
        """Ids_Bhw (int64) of the nearest codes on the unit sphere."""
        codes_VE = F.normalize(self.vqmodel.quantize.embedding.weight.float(), dim=-1)
        return (self.code_vectors(features_BDhw).float() @ codes_VE.T).argmax(-1)

    @torch.no_grad()
    def tokenize(self, pictures_BCHW: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """Ids_Bhw of pictures at their *own* size in [-1, 1].

        By default both sides must be multiples of 32 and the grid is (H/32, W/32). With `grid` the picture is resized
        so that the tower sees exactly that grid: this is how preview tokens of a picture are made.
        """
        H, W = pictures_BCHW.shape[-2:]
        if grid is None:
            if H % TOKEN_SIDE or W % TOKEN_SIDE or not H or not W:
                raise BadInput(f"a picture of {W}x{H} has no whole token grid: sides must be multiples of {TOKEN_SIDE}")
            grid = (H // TOKEN_SIDE, W // TOKEN_SIDE)
        size = (grid[0] * self.patch, grid[1] * self.patch)
        pixels = pictures_BCHW.float()
        if size != (H, W):  # where the picture is: not every device has this resampling, and none has just the same
            pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
        return self.quantize(self.features(pixels.to(self.visual.patch_embed.proj.weight.device)))
