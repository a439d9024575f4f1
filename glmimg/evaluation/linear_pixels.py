"""Pixels of latents by one linear map: what scoring needs, at a fiftieth of the autoencoder's time.

Each latent and its eight neighbours give its patch of pixels, by least squares on pictures that are given. Flat shapes,
written words and things are scored nearly as from the autoencoder's own pixels (`benchmarks/quick_rewards.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from glmimg.autoencoder import Autoencoder
from glmimg.image_io import to_tensor
from glmimg.pipelines.stages import Stages

__all__ = ["LinearAutoencoder", "LinearStages"]

_AROUND = 3  # latents of a side that a patch is made of
_RIDGE = 1e-6  # of the features' mean square


class LinearAutoencoder(Autoencoder):
    """`autoencoder` with a linear decoder, fitted to `pictures` of one size."""

    def __init__(self, autoencoder: Autoencoder, pictures: Sequence[Image.Image]) -> None:
        super().__init__(autoencoder.vae, autoencoder.dtype, autoencoder.tile)
        device = next(autoencoder.vae.parameters()).device
        squares: Tensor | float = 0.0
        products: Tensor | float = 0.0
        for start in range(0, len(pictures), 8):
            pixels_BCHW = to_tensor(pictures[start : start + 8])
            with torch.no_grad():
                features_NF = _around(self.encode(pixels_BCHW.to(device)).cpu()).flatten(0, 1).double()
            patches_NP = F.pixel_unshuffle(pixels_BCHW, self.factor).flatten(2).transpose(1, 2).flatten(0, 1).double()
            squares = squares + features_NF.T @ features_NF
            products = products + features_NF.T @ patches_NP
        assert isinstance(squares, Tensor) and isinstance(products, Tensor)
        ridge = _RIDGE * squares.diagonal().mean() * torch.eye(len(squares), dtype=torch.float64)
        self._map_FP = torch.linalg.solve(squares + ridge, products).float().to(device)

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        patches_BPN = (_around(latents_BCHW.float()) @ self._map_FP).transpose(1, 2)
        return F.pixel_shuffle(patches_BPN.unflatten(2, latents_BCHW.shape[-2:]), self.factor).clamp(-1, 1)


def _around(latents_BCHW: Tensor) -> Tensor:
    """(B, H*W, F): each latent with those around it, and a one."""
    padded = F.pad(latents_BCHW, (_AROUND // 2,) * 4, mode="replicate")
    return F.pad(F.unfold(padded, _AROUND).transpose(1, 2), (0, 1), value=1.0)


class LinearStages(Stages):
    """`Stages` whose pictures are decoded linearly; `pictures` gives what the map is fitted to."""

    def __init__(self, checkpoint: Any, backend: Any, pictures: Callable[[], Sequence[Image.Image]]) -> None:
        super().__init__(checkpoint, backend)
        self._pictures = pictures

    def autoencoder(self, encoder: bool = False) -> Autoencoder:
        """The VAE's encoder, which is asked for or not, and the linear decoder."""
        whole = super().autoencoder
        return self._part("linear", lambda: LinearAutoencoder(whole(encoder=True), self._pictures()))
