"""Pixels <-> latents through `diffusers.AutoencoderKL` with the checkpoint's latent statistics.

Latents outside this file are normalised: (vae latents - latents_mean) / latents_std, channel by channel, fp32.
Pixels are fp32 in [-1, 1].

Legend: B batch, C latent channels, H and W pixels, h and w latents (pixels / 8).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glmimg.errors import BadInput, CheckpointError

__all__ = ["Autoencoder", "compute_dtype"]


def compute_dtype(config: Any, asked: torch.dtype | None = None) -> torch.dtype | None:
    """The dtype to run in: the asked one, else fp32 where the config says `force_upcast`, else None: as stored."""
    return asked if asked is not None else torch.float32 if config.get("force_upcast", True) else None


class Autoencoder:
    """`vae` is moved to `compute_dtype` in place. Pictures with a side above `tile` pixels are done in tiles.

    `tile` bounds memory, not quality: group norm sees a tile instead of the picture, so tones may drift between
    tiles. None never tiles.
    """

    def __init__(self, vae: Any, dtype: torch.dtype | None = None, tile: int | None = None) -> None:
        self.vae = vae
        config = vae.config
        wanted = compute_dtype(config, dtype)
        if wanted is not None and wanted != self.vae.dtype:
            self.vae.to(wanted)
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        if config.latents_mean is None or config.latents_std is None:
            raise CheckpointError("vae/config.json has no latents_mean or latents_std: a GLM-Image VAE has both")
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32)[:, None, None]
            for values in (config.latents_mean, config.latents_std)
        )
        if tile is not None and (tile < 4 * self.factor or tile % (4 * self.factor)):
            raise BadInput(f"tile of {tile} pixels: give a multiple of {4 * self.factor}")
        self.tile = tile

    @property
    def dtype(self) -> torch.dtype:
        return self.vae.dtype

    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """Normalised latents (B, C, H/8, W/8) of pixels in [-1, 1]: the mode of the posterior, as published."""
        height, width = pixels_BCHW.shape[-2:]
        if height % self.factor or width % self.factor:
            raise BadInput(f"pixels of {height} x {width}: both sides must be multiples of {self.factor}")
        moments = self._tiles(self._encoder, pixels_BCHW.to(self.dtype), self.factor, 1)
        latents_BCHW = moments.chunk(2, 1)[0].float()
        return (latents_BCHW - self._mean.to(latents_BCHW.device)) / self._std.to(latents_BCHW.device)

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Pixels (B, 3, 8h, 8w) in [-1, 1] of normalised latents."""
        latents_BCHW = latents_BCHW.float()
        latents_BCHW = latents_BCHW * self._std.to(latents_BCHW.device) + self._mean.to(latents_BCHW.device)
        return self._tiles(self._decoder, latents_BCHW.to(self.dtype), 1, self.factor).float().clamp(-1, 1)

    def preview(self, latents_BCHW: Tensor, side: int = 128) -> Tensor:
        """Cheap small pixels of (estimated) latents: latents averaged until the longer side is about `side` pixels,
        then decoded. Costs (side / size) squared of a decode; softer than the picture and a little flat in contrast.
        """
        pool = max(1, round(max(latents_BCHW.shape[-2:]) * self.factor / side))
        return self.decode(F.avg_pool2d(latents_BCHW.float(), pool, ceil_mode=True) if pool > 1 else latents_BCHW)

    def _encoder(self, x: Tensor) -> Tensor:
        x = self.vae.encoder(x)
        return x if self.vae.quant_conv is None else self.vae.quant_conv(x)

    def _decoder(self, x: Tensor) -> Tensor:
        return self.vae.decoder(x if self.vae.post_quant_conv is None else self.vae.post_quant_conv(x))

    def _tiles(self, run: Callable[[Tensor], Tensor], x: Tensor, before: int, after: int) -> Tensor:
        """`run` on equal overlapping tiles, blended linearly. A latent is `before` wide in `x`, `after` in the result.

        Tiles are spread evenly, so that none is a sliver (a strip of 8 latents has no tone of its own to norm by).
        """
        tile = None if self.tile is None else self.tile // self.factor
        height, width = x.shape[-2] // before, x.shape[-1] // before
        if tile is None or max(height, width) <= tile:
            return run(x)
        total: Tensor | None = None
        for top in _starts(height, tile):
            for left in _starts(width, tile):
                rows, columns = min(tile, height), min(tile, width)
                window = (slice(top * before, (top + rows) * before), slice(left * before, (left + columns) * before))
                piece = run(x[(..., *window)]).float()
                weight = _ramp(rows * after, tile * after)[:, None] * _ramp(columns * after, tile * after)
                piece = torch.cat([piece, torch.ones_like(piece[:, :1])], 1) * weight.to(piece.device)
                if total is None:
                    total = piece.new_zeros(*piece.shape[:2], height * after, width * after)
                total[..., top * after : (top + rows) * after, left * after : (left + columns) * after] += piece
        assert total is not None  # there is at least one tile
        return total[:, :-1] / total[:, -1:]


def _starts(length: int, tile: int) -> list[int]:
    """First latents of the fewest tiles that overlap by a quarter at least."""
    if length <= tile:
        return [0]
    overlap = tile // 4
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def _ramp(length: int, tile: int) -> Tensor:
    """Weight rising over a quarter of the tile from both ends."""
    place = torch.arange(length) + 0.5
    return torch.minimum(place, length - place).div(tile / 4).clamp(max=1)
