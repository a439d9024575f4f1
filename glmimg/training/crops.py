"""Where the things of scenes lie on the token grid, and crops of a few shapes that hold one of them whole.

Legend: h x w tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from glmimg.corpus.drawing import letter_cells
from glmimg.corpus.scenes import Thing
from glmimg.token_grid import TOKEN_SIDE
from glmimg.training.encoded import EncodedScenes

__all__ = ["CROPS", "Places"]

CROPS = ((4, 4), (4, 6), (6, 4), (6, 6), (4, 8))  # rows, columns in tokens; what fits in none takes the whole picture
_LINE = (2, 8)  # a word's letters, 32 or 16 pixels wide and twice as high


class Places:
    """Where each thing of some scenes lies: for every crop shape the things that it is the smallest to hold."""

    def __init__(self, data: EncodedScenes, crops: Sequence[tuple[int, int]]) -> None:
        h, w = self.whole = data.target
        shapes = sorted((s for s in crops if s[0] <= h and s[1] <= w and s != data.target), key=lambda s: s[0] * s[1])
        found: dict[tuple[int, int], list[tuple[int, int, int, int, int]]] = {s: [] for s in (*shapes, self.whole)}
        words: dict[tuple[int, int], list[tuple[int, int, int, int, int]]] = {}
        for k in range(len(data.latents) if data.latents is not None else 0):
            for thing in data.cache.scene(k).things:
                left, top = (v // TOKEN_SIDE for v in thing.box[:2])
                right, bottom = (-(-v // TOKEN_SIDE) for v in thing.box[2:])
                fits = (s for s in shapes if bottom - top <= s[0] and right - left <= s[1])
                shape = next(fits, self.whole)
                found[shape].append((k, top, left, min(bottom, h), min(right, w)))
                if thing.spaced:
                    shape, corners = self._line(thing)
                    words.setdefault(shape, []).append((k, *corners))
        self.things = {shape: np.array(rows, dtype=np.int32) for shape, rows in found.items() if rows}
        self.words = {shape: np.array(rows, dtype=np.int32) for shape, rows in words.items() if rows}
        # Large things are fewer in a batch: in between equal work for every shape and equal chances for every thing.
        weights = [len(rows) * math.sqrt(h * w) for (h, w), rows in self.things.items()]
        self.chances = [weight / sum(weights) for weight in weights]

    def _line(self, thing: Thing) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
        """The shape of crop that holds a word's letters, and where they lie: top, left, bottom, right in tokens."""
        h, w = self.whole
        cells = letter_cells(thing.sign, thing.word, thing.box)
        (left, top, *_), (*_, right, bottom) = cells[0], cells[-1]
        corners = top // TOKEN_SIDE, left // TOKEN_SIDE
        ends = min(-(-bottom // TOKEN_SIDE), h), min(-(-right // TOKEN_SIDE), w)
        shape = (min(_LINE[0], h), min(_LINE[1], w))
        fits = all(end - start <= side for start, end, side in zip(corners, ends, shape, strict=True))
        return shape if fits else self.whole, (*corners, *ends)

    def draw_shape(self, rng: np.random.Generator) -> tuple[int, int]:
        """A shape, the oftener the more things there are of it."""
        return list(self.things)[int(rng.choice(len(self.chances), p=self.chances))] if self.chances else self.whole

    def draw(
        self, shape: tuple[int, int], count: int, rng: np.random.Generator, *, words: bool = False
    ) -> list[tuple[int, int, int]]:
        """(scene, top, left) of `count` crops, each somewhere around its thing, or its word in spaced letters."""
        rows = (self.words if words else self.things)[shape]
        rows = rows[rng.integers(len(rows), size=count)]
        ends, starts = rows[:, 3:], rows[:, 1:3]
        low = np.maximum(ends - shape, 0)
        high = np.maximum(np.minimum(starts, np.array(self.whole) - shape), low)
        corners = rng.integers(low, high + 1)
        return [(int(k), int(top), int(left)) for k, (top, left) in zip(rows[:, 0], corners, strict=True)]
