"""Scenes with exact ground truth: sampled from a seed, drawn on demand.

`SceneSampler(bank, split).sample(index)` is a pure function of (seed, index): a training run's data position is one
integer. Legend: h, w pixels of the canvas.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from glmimg.corpus import drawing
from glmimg.corpus.drawing import WORD_AREA, letter_cells
from glmimg.corpus.splits import (
    is_held_out_cell,
    is_held_out_concept,
    is_held_out_relation,
    is_held_out_scene,
    is_held_out_shape,
)
from glmimg.corpus.stickers import STYLES, StickerBank, may_be_mirrored
from glmimg.corpus.words import BACKGROUNDS, COLOURS, COMMON_THINGS, SHAPES, SIGNS, sign_words
from glmimg.errors import UnknownName

SPLITS = ("train", "cells", "concepts", "words", "shapes")
# How often each group is drawn: near-duplicates (people, symbols) would swamp the things that newcomers ask for.
GROUP_WEIGHT = {
    "animals": 1.6,
    "food": 1.6,
    "faces": 1.2,
    "objects": 1.0,
    "travel": 1.0,
    "activities": 1.2,
    "people": 0.25,
    "symbols": 0.25,
}
_PALE = ("white", "light blue", "light green", "light yellow", "light pink", "light purple", "beige", "yellow")
RELATIONS = ("left", "right", "above", "below")
_PLACES = ("centre", "left", "right", "top", "bottom", "top left", "top right", "bottom left", "bottom right")


@dataclass(frozen=True)
class Thing:
    """One object of a scene. `box` is (left, top, right, bottom) in pixels."""

    kind: str  # "sticker", "shape" or "sign"
    box: tuple[int, int, int, int]
    concept: str = ""
    style: str = ""
    tone: int = 0
    row: int = -1
    mirror: bool = False
    shape: str = ""
    colour: str = ""
    sign: str = ""
    word: str = ""
    ink: str = ""
    font: str = ""
    language: str = ""
    spaced: bool = False  # each letter of the word in a cell of its own (drawing.letter_cells)


@dataclass(frozen=True)
class Scene:
    """`layout` is single:PLACE, pair:RELATION (of the first thing to the second), row, grid or count."""

    height: int
    width: int
    background: tuple[str, ...]
    layout: str
    things: tuple[Thing, ...] = field(default_factory=tuple)


def draw(scene: Scene, bank: StickerBank) -> np.ndarray:
    """The scene as (h, w, 3) uint8."""
    canvas = drawing.background(scene.height, scene.width, *scene.background)
    for thing in scene.things:
        if thing.kind == "sticker":
            drawing.paste_sticker(canvas, bank, thing.row, thing.box, thing.colour or None, thing.mirror)
        elif thing.kind == "shape":
            drawing.paste_shape(canvas, thing.shape, thing.colour, thing.box)
        else:
            font = bank.directory / "fonts" / thing.font
            looks = (thing.sign, thing.colour, thing.ink, thing.word, Path(font), thing.box, thing.spaced)
            drawing.paste_sign(canvas, *looks)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def _distance(first: tuple[int, int, int], second: tuple[int, int, int]) -> int:
    return sum(abs(a - b) for a, b in zip(first, second, strict=True))  # numpy takes ten times as long for three


class SceneSampler:
    """Random scenes of one split.

    split: "train" leaves out all that `splits` holds out; "cells", "concepts", "words" and "shapes" draw only scenes
    with exactly that held-out part. kinds: probabilities of sticker, shape and sign scenes. sizes: (height, width)
    with probabilities. max_things bounds the number of stickers or shapes. common: the share of the stickers that
    are drawn from `names` (by default cat, rocket, pizza: what people ask for first), beside what chance gives. grid:
    things lie on multiples of so many pixels (0: anywhere): a thing then looks the same to the tokens wherever it is.
    single: share of the sticker scenes that show one alone; centre: share of things alone that lie in the middle.
    styles: how often each of `STYLES` is drawn, by name (others: 1). pale: share of the backgrounds that are drawn from
    white and the light colours only. spaced: share of the signs in Latin letters that have one font, black or white
    letters and each of those in a cell of its own, on patches; large: on signs so wide that the cells are 32 pixels
    wide. longest: letters of a Latin word, at most. strings: share of the Latin words of training that are random
    letters or digits. held_out: only scenes that training leaves out (True), or shows (False); None:
    any.
    """

    def __init__(
        self,
        bank: StickerBank,
        split: str = "train",
        *,
        seed: int = 0,
        kinds: tuple[float, float, float] = (0.62, 0.16, 0.22),
        sizes: tuple[tuple[tuple[int, int], float], ...] = (((256, 256), 1.0),),
        max_things: int = 4,
        words: dict[str, list[str]] | None = None,
        common: float = 0.0,
        names: Iterable[str] = COMMON_THINGS,
        grid: int = 0,
        single: float = 0.55,
        centre: float = 0.65,
        styles: Mapping[str, float] | None = None,
        pale: float = 0.5,
        spaced: float = 0.0,
        large: bool = False,
        longest: int = 10,
        strings: float = 0.25,
        held_out: bool | None = None,
    ) -> None:
        if split not in SPLITS:
            raise UnknownName.of("split", split, SPLITS)
        self.bank, self.split, self.seed, self.sizes, self.max_things = bank, split, seed, sizes, max_things
        self.grid, self.centre, self.pale, self.spaced = grid, centre, pale, spaced
        self.large, self.strings, self.held_out = large, strings, held_out
        self.styles = {"3d": 1.5, "silhouette": 0.6} if styles is None else styles
        self.numbers = [single, *((1 - single) / 0.45 * p for p in (0.25, 0.1, 0.1))]
        self.kinds = {"words": (0.0, 0.0, 1.0), "shapes": (0.0, 1.0, 0.0)}.get(split, kinds)
        names = frozenset(names)
        words = words or sign_words(bank.concepts.values(), held_out=split == "words")
        unseen = sign_words(bank.concepts.values(), held_out=True) if split == "train" else {}
        self._unseen_words = {word for found in unseen.values() for word in found}
        self.words = {lang: [w for w in some if lang == "zh" or len(w) <= longest] for lang, some in words.items()}
        rows: dict[str, list[int]] = {style: [] for style in STYLES}
        weights: dict[str, list[float]] = {style: [] for style in STYLES}
        often: dict[str, list[float]] = {style: [] for style in STYLES}
        for sticker in bank.stickers:
            whole, cell = is_held_out_concept(sticker.concept), is_held_out_cell(sticker.concept, sticker.style)
            wanted = {"cells": cell, "concepts": whole}.get(split, not (whole or cell))
            if wanted:
                rows[sticker.style].append(sticker.row)
                # The five skin tones of one concept share half of the weight of its default drawing.
                tone = 0.1 if sticker.tone else 1.0
                concept = bank.concepts[sticker.concept]
                weights[sticker.style].append(GROUP_WEIGHT[concept.group] * tone)
                often[sticker.style].append(tone * (concept.labels["en"] in names))
        self._rows = {style: np.array(value) for style, value in rows.items() if value}
        self._sums = {}
        for style in self._rows:
            share = common if any(often[style]) else 0.0
            chance = (1 - share) * np.array(weights[style]) / sum(weights[style])
            sums = np.cumsum(chance + share * np.array(often[style]) / max(1e-9, sum(often[style])))
            self._sums[style] = sums / sums[-1]
        fonts = sorted(p.name for p in (bank.directory / "fonts").glob("*.latin.woff2"))
        self._fonts = fonts or ["missing"]
        self._spaced_font = next((name for name in self._fonts if name.startswith("anton")), self._fonts[0])

    def sample(self, index: int) -> Scene:
        """Scene number `index` of this sampler's seed."""
        for attempt in itertools.count():
            scene = self._drawn(np.random.default_rng((self.seed, index, attempt) if attempt else (self.seed, index)))
            if self.held_out is None or is_held_out_scene(scene) == self.held_out:
                return scene
        raise AssertionError

    def _drawn(self, rng: np.random.Generator) -> Scene:
        (height, width) = self.sizes[int(rng.choice(len(self.sizes), p=[p for _, p in self.sizes]))][0]
        kind = int(rng.choice(3, p=self.kinds))
        if kind == 0:
            scene = self._stickers(rng, height, width)
        elif kind == 1:
            scene = self._shapes(rng, height, width)
        else:
            scene = self._sign(rng, height, width)
        if self.grid:
            things = tuple(t if t.spaced else replace(t, box=_snapped(t.box, scene, self.grid)) for t in scene.things)
            scene = replace(scene, things=things)
        return scene

    # Sticker scenes

    def _pick(self, rng: np.random.Generator, style: str) -> Thing:
        row = int(self._rows[style][np.searchsorted(self._sums[style], rng.random())])
        sticker = self.bank.stickers[row]
        colour = str(rng.choice([c for c in COLOURS if c != "white"])) if style == "silhouette" else ""
        mirror = bool(rng.random() < 0.15) and may_be_mirrored(self.bank.concepts[sticker.concept])
        return Thing("sticker", (0, 0, 0, 0), sticker.concept, style, sticker.tone, row, colour=colour, mirror=mirror)

    def _style(self, rng: np.random.Generator) -> str:
        styles = list(self._rows)
        weights = np.array([self.styles.get(s, 1.0) for s in styles])
        return str(rng.choice(styles, p=weights / weights.sum()))

    def _stickers(self, rng: np.random.Generator, height: int, width: int) -> Scene:
        n = min(int(rng.choice([1, 2, 3, 4], p=self.numbers)), self.max_things)
        style = self._style(rng)
        if n == 1:
            things = [self._pick(rng, style)]
            layout, boxes = _single(rng, height, width, self.centre)
        elif n == 2:
            things = [self._pick(rng, style), self._pick(rng, style if rng.random() < 0.85 else self._style(rng))]
            layout, boxes = _pair(rng, height, width)
        else:
            same = rng.random() < 0.5
            first = self._pick(rng, style)
            things = [first if same else self._pick(rng, style) for _ in range(n)]
            layout, boxes = _many(rng, height, width, n)
            layout = "count" if same else layout
        if n == 2 and rng.random() < 0.15:
            things, layout = [things[0], things[0]], "count"
        placed = tuple(replace(t, box=b) for t, b in zip(things, boxes, strict=True))
        return Scene(height, width, self._background(rng, placed), layout, placed)

    # Shape scenes

    def _coloured_shape(self, rng: np.random.Generator) -> Thing:
        while True:
            colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(list(SHAPES)))
            if is_held_out_shape(colour, shape) == (self.split == "shapes"):
                return Thing("shape", (0, 0, 0, 0), shape=shape, colour=colour)

    def _shapes(self, rng: np.random.Generator, height: int, width: int) -> Scene:
        n = min(int(rng.choice([1, 2, 3, 4], p=[0.2, 0.4, 0.2, 0.2])), self.max_things)
        while True:
            things = [self._coloured_shape(rng) for _ in range(n)]
            if n == 1:
                layout, boxes = _single(rng, height, width, self.centre)
            elif n == 2:
                layout, boxes = _pair(rng, height, width)
                relation = layout.split(":")[1]
                if self.split == "train" and is_held_out_relation(relation, things[0].shape, things[1].shape):
                    continue
            else:
                layout, boxes = _many(rng, height, width, n)
                if rng.random() < 0.6:
                    things, layout = [things[0]] * n, "count"
            placed = tuple(replace(t, box=b) for t, b in zip(things, boxes, strict=True))
            return Scene(height, width, self._background(rng, placed, plain=True), layout, placed)

    # Signs

    def _sign(self, rng: np.random.Generator, height: int, width: int) -> Scene:
        language = str(rng.choice(["en", "es", "pt", "zh"], p=[0.6, 0.14, 0.14, 0.12]))
        word = self.words[language][int(rng.integers(len(self.words[language])))]
        if language != "zh":
            if self.split == "train" and rng.random() < self.strings:  # any letters or digits may be asked for
                letters = "abcdefghijklmnopqrstuvwxyz" if rng.random() < 0.8 else "0123456789"
                word = "".join(rng.choice(list(letters), size=int(rng.integers(1, 7))))
                while word in self._unseen_words:
                    word = "".join(rng.choice(list(letters), size=len(word)))
            case = rng.random()
            word = word.upper() if case < 0.5 else word.capitalize() if case < 0.75 else word
        font = "cjk.ttc" if language == "zh" else self._fonts[int(rng.integers(len(self._fonts)))]
        if any(c in "áéíóúüñâêôãõçà" for c in word.lower()) and font.startswith(("press", "luckiest", "special")):
            font = "inter.latin.woff2"
        sign = str(rng.choice(list(SIGNS), p=[0.4, 0.2, 0.12, 0.12, 0.16]))
        colours = list(COLOURS)
        board = str(rng.choice(colours))
        ink = str(rng.choice([c for c in colours if _distance(COLOURS[c][0], COLOURS[board][0]) > 260]))
        beside = self.split == "train" and rng.random() < 0.3
        if language != "zh" and self.spaced and rng.random() < self.spaced:
            scene = self._spaced_sign(rng, height, width, beside, sign=sign, word=word, language=language)
            if scene:
                return scene
        wide = sign in ("sign", "banner", "bubble")
        w = int(width * rng.uniform(0.78, 0.95)) if wide else int(min(width, height) * rng.uniform(0.7, 0.92))
        h = int(w * rng.uniform(0.42, 0.6)) if wide else w
        if beside:
            h = min(h, int(height * 0.52))
            w = w if wide else h
        h = min(h, height - 8)
        top = int(height * 0.96 - h) if beside else int((height - h) * rng.uniform(0.3, 0.7))
        left = int((width - w) * rng.uniform(0.3, 0.7))
        board_thing = Thing(
            "sign",
            (left, top, left + w, top + h),
            sign=sign,
            colour=board,
            ink=ink,
            word=word,
            font=font,
            language=language,
        )
        things = [board_thing]
        layout = "single:centre"
        if beside:
            sticker = self._pick(rng, self._style(rng))
            side = int(min(height * 0.44, width * 0.5))
            x = int((width - side) * rng.uniform(0.3, 0.7))
            things = [replace(sticker, box=(x, 4, x + side, 4 + side)), board_thing]
            layout = "pair:above"
        return Scene(height, width, self._background(rng, tuple(things), plain=True), layout, tuple(things))

    def _spaced_sign(
        self, rng: np.random.Generator, height: int, width: int, beside: bool, *, sign: str, word: str, language: str
    ) -> Scene | None:
        """A sign whose letters lie on patches; a thing above it if `beside` and there is room. None if the letters do
        not fit on the sign."""
        board = str(rng.choice(["white", *COLOURS]))
        ink = max("black", "white", key=lambda c: _distance(COLOURS[c][0], COLOURS[board][0]))
        beside = beside and height >= 96 + 16 + 32  # the sign, its margin and the smallest thing
        widths = {"mug": 192}
        room = (WORD_AREA[sign][2] - WORD_AREA[sign][0]) * widths.get(sign, 224)
        if beside or (self.large and len(word) * 32 > room):
            sign = "sign"
        w = widths.get(sign, 224)
        h = {"sign": 96 if beside else 128, "bubble": 160, "banner": 160}.get(sign, w)
        w, h = min(w, width - 32), min(h, height - 32)
        left, top = (width - w) // 2, (height - h) // 2
        if beside:
            top = height - h - 16
        elif sign in ("sign", "bubble", "banner"):
            top = top // 32 * 32 + 32 * int(rng.integers(-1 if h == 128 else 0, 2))
            top = min(max(top, 0), height - h)
        box = (left, top, left + w, top + h)
        cells = letter_cells(sign, word, box)
        if cells[0][0] < left or cells[-1][2] > left + w or cells[0][1] < top or cells[0][3] > top + h:
            return None
        written = Thing("sign", box, sign=sign, word=word, language=language, font=self._spaced_font, spaced=True)
        things = [replace(written, colour=board, ink=ink)]
        if beside:
            side = min(128, top // 32 * 32, width // 32 * 32)
            x = (width - side) // 2
            things = [replace(self._pick(rng, self._style(rng)), box=(x, 0, x + side, side)), *things]
        layout = "pair:above" if beside else "single:centre"
        return Scene(height, width, self._background(rng, tuple(things), plain=True), layout, tuple(things))

    def _background(
        self, rng: np.random.Generator, things: tuple[Thing, ...], *, plain: bool = False
    ) -> tuple[str, ...]:
        """A named background on which every single-coloured thing can be seen."""
        taken = [COLOURS[t.colour][0] for t in things if t.colour]
        limit = 150 if taken else 0
        names = [n for n, (rgb, _) in BACKGROUNDS.items() if all(_distance(rgb, c) > limit for c in taken)]
        pale = [n for n in names if n in _PALE]
        pool = pale if pale and rng.random() < self.pale else names
        first = str(rng.choice(pool))
        if not plain and rng.random() < 0.24 * (1 - self.pale):
            return first, str(rng.choice([n for n in names if n != first]))
        return (first,)


def _square(cx: float, cy: float, side: float, height: int, width: int) -> tuple[int, int, int, int]:
    s = max(16, int(side))
    left = int(np.clip(cx - s / 2, 0, max(width - s, 0)))
    top = int(np.clip(cy - s / 2, 0, max(height - s, 0)))
    return left, top, left + s, top + s


def _snapped(box: tuple[int, int, int, int], scene: Scene, grid: int) -> tuple[int, int, int, int]:
    """The box on multiples of `grid`: no larger, single things in the middle exactly so and others off the border."""
    single = scene.layout.startswith("single") and box[2] - box[0] == box[3] - box[1]
    centre = single and scene.layout == "single:centre"
    edges = []
    for start, end, length in ((box[0], box[2], scene.width), (box[1], box[3], scene.height)):
        step = 2 * grid if centre and length % (2 * grid) == 0 else grid  # so that equal margins are multiples too
        side = max(step, (end - start) // grid * grid)
        if centre:
            most = max(step, min(scene.height, scene.width) - step)
            side = min(max(step, round((end - start) / step) * step), most)
        elif single:  # so small that there is room on all sides
            side = min(side, max(grid, min(scene.height, scene.width) - 4 * grid))
        margin = grid if single and length - side >= 2 * grid else 0
        at = (start + end - side) / 2 if single else start
        at = (length - side) // 2 if centre else round(at / grid) * grid
        at = min(max(at, margin), max(0, length - side - margin))
        edges.append((at, min(at + side, length)))
    return edges[0][0], edges[1][0], edges[0][1], edges[1][1]


def _single(
    rng: np.random.Generator, height: int, width: int, centre: float
) -> tuple[str, list[tuple[int, int, int, int]]]:
    place = "centre" if rng.random() < centre else str(rng.choice(_PLACES[1:]))
    low, high = (0.6, 0.92) if place == "centre" else (0.38, 0.52)
    side = min(height, width) * rng.uniform(low, high)
    cx, cy = width / 2, height / 2
    if "left" in place:
        cx = side / 2 + width * 0.04
    if "right" in place:
        cx = width * 0.96 - side / 2
    if "top" in place:
        cy = side / 2 + height * 0.04
    if "bottom" in place:
        cy = height * 0.96 - side / 2
    jitter = rng.uniform(-0.02, 0.02, size=2) * min(height, width)
    return f"single:{place}", [_square(cx + jitter[0], cy + jitter[1], side, height, width)]


def _pair(rng: np.random.Generator, height: int, width: int) -> tuple[str, list[tuple[int, int, int, int]]]:
    flat = width > height * 1.3
    tall = height > width * 1.3
    choices = RELATIONS[:2] if flat else RELATIONS[2:] if tall else RELATIONS
    relation = str(rng.choice(choices))
    across = relation in ("left", "right")
    length = width if across else height
    side = min(length * rng.uniform(0.38, 0.47), (height if across else width) * 0.9)
    near, far = length * 0.26, length * 0.74
    first, second = (near, far) if relation in ("left", "above") else (far, near)
    drift = rng.uniform(-0.06, 0.06, size=2) * (height if across else width)
    if across:
        boxes = [
            _square(first, height / 2 + drift[0], side, height, width),
            _square(second, height / 2 + drift[1], side, height, width),
        ]
    else:
        boxes = [
            _square(width / 2 + drift[0], first, side, height, width),
            _square(width / 2 + drift[1], second, side, height, width),
        ]
    return f"pair:{relation}", boxes


def _many(rng: np.random.Generator, height: int, width: int, n: int) -> tuple[str, list[tuple[int, int, int, int]]]:
    """Three in a row, or three or four on a 2 x 2 grid read row by row."""
    if n == 3 and width >= height:
        side = min(width * rng.uniform(0.27, 0.31), height * 0.9)
        return "row", [_square(width * x, height / 2, side, height, width) for x in (0.175, 0.5, 0.825)]
    side = min(height, width) * rng.uniform(0.36, 0.45)
    spots = [(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)][:n]
    return "grid", [_square(width * x, height * y, side, height, width) for x, y in spots]
