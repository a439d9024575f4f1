"""The semantic layout of a picture: a grid of token ids, with the preview grid that was emitted before it.

Letters: H x W tokens of a grid, N = H*W of them, P decoder patches (P = 4N), B batch.

One token stands for 32 x 32 pixels; the decoder works in patches of 16, so every id is used for 2 x 2 patches. Grids
are values: every edit gives a new one. They are kept as a safetensors file or, inside PNG metadata, as a JSON object.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from glmimg.atomic_write import atomic_file
from glmimg.errors import BadInput

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["TOKEN_SIDE", "TokenGrid", "patch_ids", "preview_grid", "region_mask", "scale_mask", "target_grid"]

TOKEN_SIDE = 32  # pixels of the picture per token
FORMAT = "glmimg.token_grid/1"


def target_grid(height: int, width: int) -> tuple[int, int]:
    """(h, w) of the target grid of a picture of `height` x `width` pixels, both multiples of 32."""
    for name, side in (("height", height), ("width", width)):
        if side < TOKEN_SIDE or side % TOKEN_SIDE:
            near = max(TOKEN_SIDE, side // TOKEN_SIDE * TOKEN_SIDE)
            choices = f"{near}" if side < TOKEN_SIDE else f"{near} or {near + TOKEN_SIDE}"
            raise BadInput(f"{name} {side}: a picture's sides are multiples of {TOKEN_SIDE}; use {choices}")
    return height // TOKEN_SIDE, width // TOKEN_SIDE


def preview_grid(height: int, width: int, preview_side: int = 16) -> tuple[int, int]:
    """(h, w) of the preview grid: the target's shape with about preview_side^2 tokens, whatever the target's size."""
    if preview_side < 1:
        raise BadInput(f"preview_side {preview_side}: must be at least 1")
    h, w = target_grid(height, width)
    ratio = h / w
    return max(1, int(math.sqrt(ratio) * preview_side)), max(1, int(math.sqrt(1 / ratio) * preview_side))


def patch_ids(ids_BHW: torch.Tensor) -> torch.Tensor:
    """Decoder patch ids_BP of token grids: every id for 2 x 2 patches, row-major."""
    return ids_BHW.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1).flatten(-2)


def region_mask(grid: tuple[int, int], box: tuple[int, int, int, int]) -> torch.Tensor:
    """Mask_HW, true at the tokens that a pixel box (left, top, right, bottom) touches."""
    left, top, right, bottom = box
    h, w = grid
    if not (0 <= left < right <= w * TOKEN_SIDE and 0 <= top < bottom <= h * TOKEN_SIDE):
        raise BadInput(
            f"region {box}: give left, top, right, bottom in pixels inside a picture of "
            f"{w * TOKEN_SIDE}x{h * TOKEN_SIDE}"
        )
    mask_HW = torch.zeros(h, w, dtype=torch.bool)
    mask_HW[top // TOKEN_SIDE : -(-bottom // TOKEN_SIDE), left // TOKEN_SIDE : -(-right // TOKEN_SIDE)] = True
    return mask_HW


def scale_mask(mask_HW: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The mask on another grid of the same picture: true where it touches a true cell. For preview grids."""
    return F.adaptive_max_pool2d(mask_HW[None].float(), grid)[0].bool()


def _ids(name: str, ids_HW: torch.Tensor, codebook_size: int) -> torch.Tensor:
    if not isinstance(ids_HW, torch.Tensor):
        raise BadInput(f"{name} ids must be an integer tensor, got a {type(ids_HW).__name__}")
    if ids_HW.is_floating_point() or ids_HW.is_complex() or ids_HW.dtype == torch.bool:
        raise BadInput(f"{name} ids must be whole numbers, got {str(ids_HW.dtype).removeprefix('torch.')}")
    if ids_HW.dim() != 2 or ids_HW.numel() == 0:
        raise BadInput(f"{name} ids must be a grid of h x w, got shape {tuple(ids_HW.shape)}")
    ids_HW = ids_HW.to(torch.int64)  # unsigned ones have no least and largest in torch
    low, high = int(ids_HW.min()), int(ids_HW.max())
    if low < 0 or high >= codebook_size:
        raise BadInput(f"{name} ids lie in {low}..{high}; the codebook has ids 0..{codebook_size - 1}")
    return ids_HW.detach().to("cpu", torch.int64, copy=True).contiguous()  # what the caller does to his is not ours


@dataclass(frozen=True, eq=False)
class TokenGrid:
    """Target ids_HW (int64, on the CPU), what they index, and the preview grid they were emitted with, if any.

    `checkpoint` names the weights whose codebook the ids belong to; None means unknown.
    """

    ids_HW: torch.Tensor
    codebook_size: int
    preview_HW: torch.Tensor | None = None
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.codebook_size, bool) or not isinstance(self.codebook_size, Integral):
            raise BadInput(f"codebook_size {self.codebook_size!r}: give a whole number")
        if self.codebook_size < 1:
            raise BadInput(f"codebook_size {self.codebook_size}: must be at least 1")
        object.__setattr__(self, "codebook_size", int(self.codebook_size))
        object.__setattr__(self, "ids_HW", _ids("target", self.ids_HW, self.codebook_size))
        if self.preview_HW is not None:
            object.__setattr__(self, "preview_HW", _ids("preview", self.preview_HW, self.codebook_size))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenGrid):
            return NotImplemented
        return self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.codebook_size, self.checkpoint, self.ids_HW.numpy().tobytes()))

    @property
    def grid(self) -> tuple[int, int]:
        return self.ids_HW.shape[0], self.ids_HW.shape[1]

    @property
    def height(self) -> int:
        """Of the picture, in pixels."""
        return self.grid[0] * TOKEN_SIDE

    @property
    def width(self) -> int:
        return self.grid[1] * TOKEN_SIDE

    def emitted(self, preview: bool = True) -> torch.Tensor:
        """Ids_N in the order of emission, with the preview grid's, if there is one, or without."""
        before = [self.preview_HW] if preview and self.preview_HW is not None else []
        return torch.cat([ids_HW.flatten() for ids_HW in (*before, self.ids_HW)])

    def require(self, codebook_size: int, checkpoint: str | None = None) -> None:
        """Refuse to be used with another checkpoint than the one that made this grid."""
        if codebook_size != self.codebook_size:
            raise BadInput(
                f"these tokens index a codebook of {self.codebook_size} ids, the checkpoint has {codebook_size}: "
                "make them again with this checkpoint"
            )
        if checkpoint and self.checkpoint and checkpoint != self.checkpoint:
            raise BadInput(
                f"these tokens come from checkpoint {self.checkpoint[:12]}, not from {checkpoint[:12]}: its codebook "
                "means other things; open that checkpoint, or make the tokens again from the picture"
            )

    # Editing

    def with_region(self, mask_HW: torch.Tensor, ids: int | torch.Tensor) -> TokenGrid:
        """Where the mask is true: `ids` (one id, or a grid of the same shape). The preview grid stays."""
        self._check_mask(mask_HW)
        new_HW = torch.as_tensor(int(ids)).expand(self.grid) if isinstance(ids, Integral) else torch.as_tensor(ids)
        if new_HW.shape != self.ids_HW.shape:
            raise BadInput(f"a grid of {tuple(new_HW.shape)} does not fit one of {self.grid}")
        return replace(self, ids_HW=torch.where(mask_HW, new_HW.to("cpu"), self.ids_HW))

    def mix(self, other: TokenGrid, mask_HW: torch.Tensor) -> TokenGrid:
        """This grid, with the other's ids where the mask is true; the preview grids are mixed the same way."""
        other.require(self.codebook_size, self.checkpoint)
        mixed = self.with_region(mask_HW, other.ids_HW)
        if self.preview_HW is None or other.preview_HW is None:
            return mixed
        if self.preview_HW.shape != other.preview_HW.shape:
            raise BadInput(
                f"preview grids of {tuple(self.preview_HW.shape)} and {tuple(other.preview_HW.shape)} do not mix"
            )
        preview_mask = scale_mask(mask_HW, (self.preview_HW.shape[0], self.preview_HW.shape[1]))
        return replace(mixed, preview_HW=torch.where(preview_mask, other.preview_HW, self.preview_HW))

    def diff(self, other: TokenGrid) -> torch.Tensor:
        """Mask_HW, true where the target ids differ."""
        if self.grid != other.grid:
            raise BadInput(f"grids of {self.grid} and {other.grid} cannot be compared token by token")
        return self.ids_HW != other.ids_HW

    def _check_mask(self, mask_HW: torch.Tensor) -> None:
        if not isinstance(mask_HW, torch.Tensor):
            raise BadInput(f"the mask must be a torch tensor, got {type(mask_HW).__name__}")
        if mask_HW.dtype != torch.bool or mask_HW.shape != self.ids_HW.shape:
            raise BadInput(
                f"the mask must be boolean of shape {self.grid}, got {mask_HW.dtype} of {tuple(mask_HW.shape)}"
            )

    # Keeping

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able object; two or four bytes an id, base64."""
        fields: dict[str, Any] = {"format": FORMAT, "codebook_size": self.codebook_size, "checkpoint": self.checkpoint}
        dtype = "<u2" if self.codebook_size <= 1 << 16 else "<u4"
        for name, ids_HW in (("target", self.ids_HW), ("preview", self.preview_HW)):
            if ids_HW is not None:
                packed = base64.b64encode(ids_HW.numpy().astype(dtype).tobytes()).decode()
                fields[name] = {"grid": list(ids_HW.shape), "ids": packed}
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TokenGrid:
        try:
            if fields["format"] != FORMAT:
                raise BadInput(f"token grid format {fields['format']!r} is not known; this version reads {FORMAT!r}")
            codebook_size = int(fields["codebook_size"])
            dtype = "<u2" if codebook_size <= 1 << 16 else "<u4"
            grids = {}
            for name in ("target", "preview"):
                if name in fields:
                    flat = np.frombuffer(base64.b64decode(fields[name]["ids"], validate=True), dtype=dtype)
                    h, w = fields[name]["grid"]
                    grids[name] = torch.from_numpy(flat.astype(np.int64)).view(int(h), int(w))
            checkpoint = fields.get("checkpoint")
            if not isinstance(checkpoint, (str, type(None))):
                raise BadInput(f"a token grid's checkpoint is {checkpoint!r}; it must be text")
            return cls(grids["target"], codebook_size, grids.get("preview"), checkpoint)
        except BadInput:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise BadInput(f"this is no token grid ({type(error).__name__}: {error})") from error

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all; BadInput if the place cannot be written to."""
        tensors = {"target": self.ids_HW.to(torch.int32)}
        if self.preview_HW is not None:
            tensors["preview"] = self.preview_HW.to(torch.int32)
        metadata = {"format": FORMAT, "codebook_size": str(self.codebook_size), "checkpoint": self.checkpoint or ""}
        with atomic_file(path) as temporary:
            temporary.write_bytes(save(tensors, metadata))

    @classmethod
    def load(cls, path: str | Path) -> TokenGrid:
        if Path(path).is_dir():  # safetensors speaks of a device
            raise BadInput(f"{path} is a folder; the file of a token grid is needed")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise BadInput(f"{path} is a safetensors file but no token grid ({FORMAT})")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            size, checkpoint = int(metadata["codebook_size"]), metadata["checkpoint"] or None
            return cls(tensors["target"], size, tensors.get("preview"), checkpoint)
        except BadInput:
            raise
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise BadInput(f"cannot read a token grid from {path}: {error}") from error

    def picture(self, cell: int = 16) -> Image.Image:
        """The layout as a picture: one colour per id, always the same; the preview grid, if any, on the left."""
        from PIL import Image

        target = Image.fromarray(_colours(self.ids_HW).numpy())
        target = target.resize((self.grid[1] * cell, self.grid[0] * cell), Image.Resampling.NEAREST)
        if self.preview_HW is None:
            return target
        preview = Image.fromarray(_colours(self.preview_HW).numpy())
        width = max(1, round(target.height * preview.width / preview.height))
        both = Image.new("RGB", (width + cell + target.width, target.height), "white")
        both.paste(preview.resize((width, target.height), Image.Resampling.NEAREST), (0, 0))
        both.paste(target, (width + cell, 0))
        return both


def _colours(ids_HW: torch.Tensor) -> torch.Tensor:
    """Bytes_HW3 of a fixed colour per id; neighbouring ids look unlike."""
    mixed = (ids_HW + 1) * 2654435761 % (1 << 32)  # Knuth's multiplicative hash
    mixed = (mixed ^ (mixed >> 15)) * 2246822519 % (1 << 32)
    channels = torch.stack([mixed >> shift & 255 for shift in (24, 16, 8)], dim=-1)
    return (40 + channels * 200 // 255).to(torch.uint8)
