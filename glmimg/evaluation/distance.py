"""Distances between sets of pictures: Frechet distance in own features, diversity over seeds, nearest training picture.

The features are the concept judge's. A Frechet distance in them is comparable with nothing but itself: it is not FID.
Memorisation: a picture is a copy if its nearest training picture is nearer than a third of the way to the second
nearest. The same share for held-out real pictures stands beside it.

Legend: n pictures, D features, s side in pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

_SIDE = 32
COPY_RATIO = 1 / 3


def frechet(first_nD: np.ndarray, second_nD: np.ndarray) -> float:
    """Squared Frechet distance between Gaussians fitted to both sets.

    The trace of the root of the covariances' product comes from singular values of the centred features, which needs
    no matrix root and holds for fewer pictures than features. Small sets are biased upwards: compare equal n only.
    """
    a, b = first_nD - first_nD.mean(0), second_nD - second_nD.mean(0)
    a, b = a / np.sqrt(max(len(a) - 1, 1)), b / np.sqrt(max(len(b) - 1, 1))
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    shift = np.square(first_nD.mean(0) - second_nD.mean(0)).sum()
    return float(shift + np.square(a).sum() + np.square(b).sum() - 2 * cross)


def diversity(groups: Sequence[np.ndarray]) -> list[float]:
    """For every group of features_nD (one prompt, several seeds) the mean distance between two of its pictures."""
    out = []
    for features in groups:
        away = np.linalg.norm(features[:, None] - features[None], axis=-1)
        out.append(float(away[np.triu_indices(len(features), 1)].mean()))
    return out


def thumbnail(picture: np.ndarray) -> np.ndarray:
    """(_SIDE, _SIDE, 3) float32 in [0, 1]: what pictures are compared by in pixels."""
    small = Image.fromarray(picture).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255


@dataclass(frozen=True)
class Neighbours:
    """For each picture the distances to the nearest and second nearest training picture, and which is nearest."""

    first: np.ndarray
    second: np.ndarray
    index: np.ndarray

    def copies(self) -> list[bool]:
        return [bool(a < COPY_RATIO * b) for a, b in zip(self.first, self.second, strict=True)]


def nearest(queries_nD: np.ndarray, training: Iterable[np.ndarray]) -> Neighbours:
    """Nearest rows of `training`, which comes in chunks (m, D) so that it need not fit into memory."""
    n = len(queries_nD)
    best, index, offset = np.full((n, 2), np.inf), np.zeros(n, dtype=int), 0
    squares = np.square(queries_nD).sum(1)
    for chunk in training:
        away = squares[:, None] - 2 * queries_nD @ chunk.T + np.square(chunk).sum(1)
        two = np.argsort(away, axis=1)[:, :2]
        ranked = np.take_along_axis(away, two, axis=1)
        index = np.where(ranked[:, 0] < best[:, 0], offset + two[:, 0], index)
        best = np.sort(np.concatenate([best, ranked], axis=1), axis=1)[:, :2]
        offset += len(chunk)
    roots = np.sqrt(np.maximum(best, 0))
    return Neighbours(roots[:, 0], roots[:, 1], index)
