"""Sizes by shape: every picture is scaled to the bucket that is nearest to its own shape, and what hangs over is cut.

A bucket is (height, width) in pixels, both multiples of 32, with about as many pixels as a square of the resolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageOps

from glmimg.config import SIDE
from glmimg.errors import BadInput

__all__ = ["Fit", "bucket_sizes", "fit_to_bucket"]

Bucket = tuple[int, int]


@dataclass(frozen=True)
class Fit:
    """How a picture gets its bucket's size: scaled to `scaled` (width, height), cut at `left`, `top`, then mirrored.

    Negative `left`, `top` put it inside the bucket; its outermost pixels go on to the rim.
    """

    bucket: Bucket
    scaled: tuple[int, int]
    left: int
    top: int
    mirrored: bool = False

    @property
    def lost(self) -> float:
        """Share of the picture that is cut off."""
        return 1 - self.bucket[0] * self.bucket[1] / (self.scaled[0] * self.scaled[1])

    @property
    def shown_left(self) -> int:
        """`left` as the picture is seen, mirrored or not."""
        return self.scaled[0] - self.left - self.bucket[1] if self.mirrored else self.left

    def apply(self, picture: Image.Image) -> Image.Image:
        """The picture of the bucket's size."""
        if picture.size != self.scaled:
            picture = picture.resize(self.scaled, Image.Resampling.LANCZOS)
        height, width = self.bucket
        right, bottom = self.left + width, self.top + height
        if min(self.left, self.top, picture.width - right, picture.height - bottom) < 0:
            rows = np.arange(self.top, bottom).clip(0, picture.height - 1)
            columns = np.arange(self.left, right).clip(0, picture.width - 1)
            picture = Image.fromarray(np.asarray(picture)[rows[:, None], columns])
        else:
            picture = picture.crop((self.left, self.top, right, bottom))
        return ImageOps.mirror(picture) if self.mirrored else picture

    def varied(self, seed: int, zoom: tuple[float, float], mirror: bool) -> Fit:
        """Another view for the same bucket: scaled once more by a factor out of `zoom` (smallest, largest), anywhere in
        it, and, if `mirror`, every second time mirrored. One seed does the same to pictures of any size."""
        factor, across, down, turn = np.random.default_rng(seed).random(4)
        factor = zoom[0] * (zoom[1] / zoom[0]) ** factor
        width, height = (max(1, round(side * factor)) for side in self.scaled)
        left, top = round(across * (width - self.bucket[1])), round(down * (height - self.bucket[0]))
        return replace(self, scaled=(width, height), left=left, top=top, mirrored=bool(mirror and turn < 0.5))


def bucket_sizes(resolution: int, min_size: int, max_size: int, max_aspect: float = 2.0) -> list[Bucket]:
    """All buckets for a resolution: the widest of each height, none with more pixels than the square has."""
    if resolution % SIDE or not min_size <= resolution <= max_size:
        low, high = -(-min_size // SIDE) * SIDE, max_size // SIDE * SIDE
        raise BadInput(f"resolution {resolution}: give a multiple of {SIDE} from {low} to {high}")
    found = set()
    for short in range(SIDE, resolution + 1, SIDE):
        long = resolution * resolution // short // SIDE * SIDE
        if short >= min_size and long <= max_size and long / short <= max_aspect:
            found |= {(short, long), (long, short)}
    return sorted(found)


def fit_to_bucket(width: int, height: int, buckets: Sequence[Bucket]) -> Fit:
    """The bucket of nearest shape, of those the one with most pixels, and the middle of the picture in it."""
    shape = math.log(height / width)
    bucket = min(buckets, key=lambda b: (round(abs(math.log(b[0] / b[1]) - shape), 6), -b[0] * b[1]))
    scale = max(bucket[0] / height, bucket[1] / width)
    scaled = max(bucket[1], round(width * scale)), max(bucket[0], round(height * scale))
    return Fit(bucket, scaled, (scaled[0] - bucket[1]) // 2, (scaled[1] - bucket[0]) // 2)
