"""The diffusion decoder: semantic tokens, glyph states and noisy latents -> velocity.

`diffusers.GlmImageTransformer2DModel` holds the weights (published config: 30 blocks of width 4096); the forward here
is our own. Everything that does not change from step to step is computed once per picture by `Decoder.condition`;
`Decoder.velocity` does the rest. Both are differentiable and call the model's own linear modules where adapters or
quantisation replaced them, so trainers use the same code.

One stream of [reference keys ; glyph tokens ; patches] per block, adaptive layer norm from (time + picture size),
parameter-free layer norm on queries and keys, 2-D rotary positions on patches only, the semantic tokens added to the
patch embeddings.

Legend: B batch, C latent channels, T glyph tokens, P decoder patches (two by two latents), R reference patches,
S = T + P, D width, H heads, K half a head's width, E width of the time embedding, G width of the glyph encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from glmimg.attention import attend
from glmimg.errors import BadInput
from glmimg.fused_linear import Products

__all__ = ["Conditioning", "Decoder", "Reference", "ReferenceCache", "join"]

_PATCH_PIXELS = 16  # VAE factor 8 times patch 2, fixed by the checkpoint format
_EPS = 1e-5


@dataclass(frozen=True)
class Reference:
    """One reference picture: normalised VAE latents, its semantic ids at patch resolution, its size in pixels."""

    latents_CHW: Tensor
    prior_ids_P: Tensor
    size: tuple[int, int]


@dataclass(frozen=True)
class ReferenceCache:
    """Keys and values of reference pictures, (B, H, R, 2K) per block; `mask_BR` is False on padded rows."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask_BR: Tensor

    def expand(self, batch: int) -> ReferenceCache:
        """One sample's references for a whole batch, without a copy."""
        if len(self.mask_BR) not in (1, batch):
            raise BadInput(f"references of {len(self.mask_BR)} samples for a batch of {batch}: give 1 or {batch}")
        keys, values = (tuple(t.expand(batch, -1, -1, -1) for t in part) for part in (self.keys, self.values))
        return ReferenceCache(keys, values, self.mask_BR.expand(batch, -1))

    def empty(self, batch: int) -> ReferenceCache:
        """No references at all, for `batch` samples."""
        keys, values = (
            tuple(t.new_zeros(batch, t.shape[1], 0, t.shape[3]) for t in part) for part in (self.keys, self.values)
        )
        return ReferenceCache(keys, values, self.mask_BR.new_zeros(batch, 0))


@dataclass(frozen=True)
class Conditioning:
    """What `velocity` needs besides latents and time; constant over the steps of a picture."""

    prior_BPD: Tensor
    glyphs_BTD: Tensor
    glyph_mask_BT: Tensor
    size_BE: Tensor
    grid: tuple[int, int]
    rotary_SK: tuple[Tensor, Tensor]
    references: ReferenceCache | None
    mask_B11K: Tensor | None  # over keys: references, glyphs, patches; None where nothing is padded

    @property
    def batch(self) -> int:
        return self.prior_BPD.shape[0]


def rotary_tables(grid: tuple[int, int], text: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (S, K) in fp32: identity for `text` glyph tokens, then row and column angles of the grid."""
    rows, columns = grid
    frequencies = 10000.0 ** -(torch.arange(0, head_dim // 2, 2, dtype=torch.float32) / (head_dim // 2))
    by_row = torch.outer(torch.arange(rows).float(), frequencies)[:, None].expand(rows, columns, -1)
    by_column = torch.outer(torch.arange(columns).float(), frequencies)[None].expand(rows, columns, -1)
    angles = F.pad(torch.cat([by_row, by_column], -1).flatten(0, 1), (0, 0, text, 0))
    return angles.cos().to(device), angles.sin().to(device)


class Decoder:
    """Runs the denoising transformer.

    `blocks` yields the transformer blocks in order each time it is called; a streaming loader passes its own.
    Call `fused_linear.fuse_qkv(model)` once after loading to make one product of the three projections, and
    `products.lay_out(model)` where no gradients are wanted.
    """

    def __init__(self, model: Any, blocks: Callable[[], Iterable[Any]] | None = None) -> None:
        self.model = model
        self.products = Products()
        self.streamed = blocks is not None
        self.blocks = blocks or (lambda: model.transformer_blocks)  # no cycle through self: it is freed at once
        self.heads = int(model.config.num_attention_heads)
        self.head_dim = int(model.config.attention_head_dim)
        self.last = int(model.config.num_layers) - 1

    @property
    def dtype(self) -> torch.dtype:
        return self.model.proj_out.bias.dtype  # the weight may be packed

    # -- once per picture ---------------------------------------------------------------------------------------

    def condition(
        self,
        prior_ids_BP: Tensor,
        glyphs_BTG: Tensor,
        glyph_mask_BT: Tensor | None = None,
        *,
        size: tuple[int, int] | Tensor,
        crop: tuple[int, int] | Tensor = (0, 0),
        grid: tuple[int, int] | None = None,
        drop_prior: bool | Tensor = False,
        references: ReferenceCache | None = None,
    ) -> Conditioning:
        """Project everything that is constant over the steps.

        `prior_ids_BP`: semantic ids at patch resolution, row-major. `glyphs_BTG`: states of the glyph encoder, padded
        on either side where `glyph_mask_BT` is False; T may be 0. (Guidance's other half, and a trainer that drops
        the glyphs, want the encoding of "" as published, not an empty mask.) `size` and `crop`: (height, width) and
        (top, left) in pixels for all, or (B, 2). `grid`: patches (rows, columns), by default size / 16.
        `drop_prior`: True, (B,) or (B, P) where the semantic tokens are withheld. `references`: of one sample,
        shared by all, or of B samples.
        """
        batch, patches = prior_ids_BP.shape
        device = prior_ids_BP.device
        size_B2, crop_B2 = _pairs(size, batch, device), _pairs(crop, batch, device)
        if grid is None:
            grid = (int(size_B2[0, 0]) // _PATCH_PIXELS, int(size_B2[0, 1]) // _PATCH_PIXELS)
        if grid[0] * grid[1] != patches:
            raise BadInput(f"{patches} semantic ids for a grid of {grid[0]} x {grid[1]} patches: give one id a patch")
        prior_BPD = self.model.prior_token_embedding(prior_ids_BP)
        if drop_prior is not False:
            dropped = torch.as_tensor(drop_prior, dtype=torch.bool, device=device)
            dropped = dropped[:, None] if dropped.dim() == 1 else dropped
            prior_BPD = prior_BPD * (~dropped)[..., None].to(prior_BPD.dtype)
        prior_BPD = self.model.prior_projector(prior_BPD)
        glyphs_BTD = self.model.glyph_projector(glyphs_BTG.to(self.dtype))
        if glyphs_BTD.shape[0] != batch:
            raise BadInput(f"glyph states of {glyphs_BTD.shape[0]} pictures for {batch} pictures' semantic ids")
        if glyph_mask_BT is None:
            glyph_mask_BT = torch.ones(glyphs_BTD.shape[:2], dtype=torch.bool, device=device)
        glyph_mask_BT = glyph_mask_BT.to(device, torch.bool)
        references = references.expand(batch) if references else None
        return Conditioning(
            prior_BPD,
            glyphs_BTD,
            glyph_mask_BT,
            self._size_embedding(size_B2, crop_B2),
            grid,
            rotary_tables(grid, glyphs_BTD.shape[1], self.head_dim, device),
            references,
            _key_mask(references, glyph_mask_BT, patches),
        )

    def write_references(self, references: Sequence[Sequence[Reference]]) -> ReferenceCache:
        """Keys and values of each sample's reference pictures, every picture run alone at time 0 without glyphs."""
        if not references or not all(references):
            raise BadInput("every sample needs at least one reference picture; leave `references` out for none")
        samples = []
        for pictures in references:
            blocks = list(zip(*(self._write(picture) for picture in pictures), strict=True))
            one = len(pictures) == 1
            keys = tuple(block[0][0] if one else torch.cat([k for k, _ in block], 2) for block in blocks)
            values = tuple(block[0][1] if one else torch.cat([v for _, v in block], 2) for block in blocks)
            mask_BR = torch.ones(1, keys[0].shape[2], dtype=torch.bool, device=keys[0].device)
            samples.append(ReferenceCache(keys, values, mask_BR))
        return _stack(samples)

    def _write(self, picture: Reference) -> list[tuple[Tensor, Tensor]]:
        cache = self.write_batch(picture.latents_CHW[None], picture.prior_ids_P.reshape(1, -1), size=picture.size)
        return list(zip(cache.keys, cache.values, strict=True))

    def write_batch(
        self,
        latents_BCHW: Tensor,
        prior_ids_BP: Tensor,
        *,
        size: tuple[int, int] | Tensor,
        crop: tuple[int, int] | Tensor = (0, 0),
    ) -> ReferenceCache:
        """Keys and values of one reference picture (or equal crop) a sample, all of one size, in one forward."""
        batch, _, rows, columns = latents_BCHW.shape
        empty_BTG = latents_BCHW.new_zeros(batch, 0, self.model.config.text_embed_dim)
        conditioning = self.condition(prior_ids_BP, empty_BTG, size=size, crop=crop, grid=(rows // 2, columns // 2))
        written: list[tuple[Tensor, Tensor]] = []
        self._run(latents_BCHW, 0.0, (conditioning,), written)
        keys, values = (tuple(part) for part in zip(*written, strict=True))
        return ReferenceCache(keys, values, torch.ones_like(prior_ids_BP, dtype=torch.bool))

    def _size_embedding(self, size_B2: Tensor, crop_B2: Tensor) -> Tensor:
        embed = self.model.time_condition_embed
        numbers_B4 = torch.cat([crop_B2, size_B2], 1)
        waves = embed.condition_proj(numbers_B4.flatten()).view(len(numbers_B4), -1)
        return embed.condition_embedder(waves.to(self.dtype))

    # -- once per step ------------------------------------------------------------------------------------------

    def velocity(self, latents_BCHW: Tensor, timestep: float | Tensor, conditioning: Conditioning) -> Tensor:
        """d latents / d sigma in fp32. `timestep`: the model's, in [0, 999], for all or (B,) (see `diffusion`)."""
        return self._run(latents_BCHW, timestep, (conditioning,), None)[0]

    def predictor(
        self, with_prompt: Conditioning, without: Conditioning | None = None, *, batched: bool = True
    ) -> Callable[[Tensor, float, bool], tuple[Tensor, Tensor | None]]:
        """What `diffusion.guided` wants: both velocities from one forward of twice the batch, or from two side by side.

        Side by side, streamed blocks do the one and then the other each: they come once a step either way.
        """
        joined = join([with_prompt, without]) if batched and without is not None else None

        def predict(latents_BCHW: Tensor, time: float, both: bool) -> tuple[Tensor, Tensor | None]:
            # A number would be part of what is compiled, which would be compiled anew at every step.
            timestep = torch.full((), time, dtype=torch.float32, device=latents_BCHW.device)
            if not both:
                return self.velocity(latents_BCHW, timestep, with_prompt), None
            if without is None:
                raise BadInput("guidance needs a conditioning without the prompt; give one, or guidance 1")
            if joined is None and self.streamed:
                first, second = self._run(latents_BCHW, timestep, (with_prompt, without), None)
                return first, second
            if joined is None:
                one = self.velocity(latents_BCHW, timestep, with_prompt)
                return one, self.velocity(latents_BCHW, timestep, without)
            pair = self.velocity(torch.cat([latents_BCHW] * 2), timestep, joined)
            return pair[: with_prompt.batch], pair[with_prompt.batch :]

        return predict

    def _run(
        self,
        latents_BCHW: Tensor,
        timestep: float | Tensor,
        conditionings: Sequence[Conditioning],
        written: list[tuple[Tensor, Tensor]] | None,
    ) -> list[Tensor]:
        """The velocity under each of the conditionings."""
        model = self.model
        batch, _, height, width = latents_BCHW.shape
        for c in conditionings:
            if (batch, height, width) != (c.batch, 2 * c.grid[0], 2 * c.grid[1]):
                need = f"{c.batch} pictures of {2 * c.grid[0]} x {2 * c.grid[1]} latents"
                raise BadInput(f"latents {tuple(latents_BCHW.shape)} for a conditioning of {need}")
        embed = model.time_condition_embed
        timestep_B = torch.as_tensor(timestep, device=latents_BCHW.device, dtype=torch.float32).expand(batch)
        time_BE = embed.timestep_embedder(embed.time_proj(timestep_B).to(self.dtype))
        times = [F.silu(time_BE + c.size_BE) for c in conditionings]
        x_BPD = model.image_projector(latents_BCHW.to(self.dtype))
        streams = [(x_BPD + c.prior_BPD, c.glyphs_BTD) for c in conditionings]
        saving_memory = torch.is_grad_enabled() and model.gradient_checkpointing
        for index, block in enumerate(self.blocks()):
            for k, c in enumerate(conditionings):
                past = None if c.references is None else (c.references.keys[index], c.references.values[index])
                run = partial(self._block, block, index == self.last, c, past, written)
                if saving_memory:
                    run = partial(checkpoint, run, use_reentrant=False)
                streams[k] = run(*streams[k], times[k])

        velocities = []
        for (x_BPD, _), time, c in zip(streams, times, conditionings, strict=True):
            scale_B1D, shift_B1D = model.norm_out.linear(time)[:, None].chunk(2, -1)
            x_BPD = model.proj_out(torch.addcmul(shift_B1D, _norm(x_BPD), 1 + scale_B1D))
            x = x_BPD.reshape(batch, *c.grid, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
            velocities.append(x.reshape(batch, -1, height, width).float())
        return velocities

    def _block(
        self,
        block: Any,
        last: bool,
        conditioning: Conditioning,
        past: tuple[Tensor, Tensor] | None,
        written: list[tuple[Tensor, Tensor]] | None,
        x_BPD: Tensor,
        text_BTD: Tensor,
        time_BE: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """One block. After the last only the patches are wanted, so glyph tokens end as keys and values there."""
        text = text_BTD.shape[1]
        modulation = self.products.linear(block.norm1.linear, time_BE)[:, None].chunk(12, -1)
        shift, text_shift, scale, text_scale, gate, text_gate = modulation[:6]
        joined_BSD = _modulated(x_BPD, shift, scale, text_BTD, text_shift, text_scale)
        q, k, v = self._heads(block.attn1, joined_BSD, conditioning.rotary_SK)
        if written is not None:
            written.append((k.clone(), v.clone()))  # they may be views, which keep the queries as well
        if past is not None:
            k, v = torch.cat([past[0].to(k.dtype), k], 2), torch.cat([past[1].to(v.dtype), v], 2)
        if last:
            q, text_BTD, text = q[:, :, text:], text_BTD[:, :0], 0
        mixed = attend(q, k, v, conditioning.mask_B11K)
        mixed_BSD = self.products.linear(block.attn1.to_out[0], mixed.transpose(1, 2).flatten(2))
        x_BPD = torch.addcmul(x_BPD, mixed_BSD[:, text:], gate)
        if text:
            text_BTD = torch.addcmul(text_BTD, mixed_BSD[:, :text], text_gate)

        shift, text_shift, scale, text_scale, gate, text_gate = modulation[6:]
        modulated_BSD = _modulated(x_BPD, shift, scale, text_BTD, text_shift, text_scale)
        widened_BSD = self.products.feed_forward(block.ff, modulated_BSD)
        x_BPD = torch.addcmul(x_BPD, widened_BSD[:, text:], gate)
        if text:
            text_BTD = torch.addcmul(text_BTD, widened_BSD[:, :text], text_gate)
        return x_BPD, text_BTD

    def _heads(self, attention: Any, x_BSD: Tensor, rotary_SK: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as (B, H, S, 2K)."""
        shape = (*x_BSD.shape[:2], -1, self.head_dim)
        fused = self.products.qkv(attention, x_BSD)
        if fused is not None:
            qkv = fused.view(shape)
            v = qkv[:, :, 2 * self.heads :]
            qk = _rotate(_norm(qkv[:, :, : 2 * self.heads]), rotary_SK, v.dtype)
            q, k = qk[:, :, : self.heads], qk[:, :, self.heads :]
        else:
            v = attention.to_v(x_BSD).view(shape)
            q = _rotate(_norm(attention.to_q(x_BSD).view(shape)), rotary_SK, v.dtype)
            k = _rotate(_norm(attention.to_k(x_BSD).view(shape)), rotary_SK, v.dtype)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def join(parts: Sequence[Conditioning]) -> Conditioning:
    """One conditioning of all the parts' pictures in order, glyphs and references padded and masked.

    Guidance joins (with, without) once and then runs one forward of twice the batch. With references this pads the
    unguided half's cache with as many masked rows, so large reference caches are better run as two forwards.
    """
    first = parts[0]
    if any(part.grid != first.grid for part in parts):
        raise BadInput(f"pictures of different grids cannot share a batch: {sorted({part.grid for part in parts})}")
    longest = max(parts, key=lambda part: part.glyphs_BTD.shape[1])
    text = longest.glyphs_BTD.shape[1]
    example = next((part.references for part in parts if part.references), None)
    references = example and _stack([part.references or example.empty(part.batch) for part in parts])
    mask_BT = torch.cat([F.pad(part.glyph_mask_BT, (0, text - part.glyph_mask_BT.shape[1])) for part in parts])
    return Conditioning(
        torch.cat([part.prior_BPD for part in parts]),
        torch.cat([F.pad(part.glyphs_BTD, (0, 0, 0, text - part.glyphs_BTD.shape[1])) for part in parts]),
        mask_BT,
        torch.cat([part.size_BE for part in parts]),
        first.grid,
        longest.rotary_SK,
        references,
        _key_mask(references, mask_BT, first.prior_BPD.shape[1]),
    )


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=_EPS)


def _rotate(x_BSHd: Tensor, rotary_SK: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    cos, sin = (table[:, None] for table in rotary_SK)
    first, second = x_BSHd.chunk(2, -1)
    turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.cat(turned, -1).to(dtype)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor, text: Tensor, text_shift: Tensor, text_scale: Tensor) -> Tensor:
    """Both streams normalised and modulated, glyphs first."""
    x = torch.addcmul(shift, _norm(x), 1 + scale)
    if not text.shape[1]:
        return x
    return torch.cat([torch.addcmul(text_shift, _norm(text), 1 + text_scale), x], 1)


def _pairs(value: tuple[int, int] | Tensor, batch: int, device: torch.device) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32, device=device).reshape(-1, 2).expand(batch, 2)


def _key_mask(references: ReferenceCache | None, glyph_mask_BT: Tensor, patches: int) -> Tensor | None:
    mask_BK = torch.cat([references.mask_BR, glyph_mask_BT], 1) if references else glyph_mask_BT
    return None if bool(mask_BK.all()) else F.pad(mask_BK, (0, patches), value=True)[:, None, None]


def _stack(parts: Sequence[ReferenceCache]) -> ReferenceCache:
    """All the parts' samples in order, padded to the longest."""
    if len(parts) == 1:
        return parts[0]
    length = max(part.mask_BR.shape[1] for part in parts)

    def column(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([F.pad(t, (0, 0, 0, length - t.shape[2])) for t in tensors])

    return ReferenceCache(
        tuple(column(tensors) for tensors in zip(*(part.keys for part in parts), strict=True)),
        tuple(column(tensors) for tensors in zip(*(part.values for part in parts), strict=True)),
        torch.cat([F.pad(part.mask_BR, (0, length - part.mask_BR.shape[1])) for part in parts]),
    )
