"""Layout: coloured shapes found by segmentation, no model involved.

What is found (count, colours, shapes, places) is compared with the scene that the prompt was made from. Six task types
in the manner of GenEval, over this corpus' own vocabulary: call the result "GenEval-style".

Array legend: h, w pixels; masks are (h, w) bool.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from glmimg.corpus.drawing import paste_shape
from glmimg.corpus.scenes import Scene
from glmimg.corpus.words import BACKGROUNDS, PALETTE, SHAPES
from glmimg.evaluation.segment import Region, background_of, dilate, erode, nearest_name, regions

TASKS = ("count", "colour", "position", "relation", "binding")
_TEMPLATE = 48
_MIN_SHARE = 0.004  # of the picture: the smallest shape of the corpus covers 2 %


@dataclass(frozen=True)
class Found:
    """One shape seen in a picture; `centre` in fractions of width and height."""

    shape: str
    colour: str
    centre: tuple[float, float]


@lru_cache(maxsize=1)
def _templates() -> dict[str, np.ndarray]:
    out = {}
    for shape in SHAPES:
        canvas = np.full((160, 160, 3), 250, dtype=np.float32)
        paste_shape(canvas, shape, "black", (8, 8, 152, 152))
        out[shape] = _framed(regions(canvas[..., 0] < 139)[0])
    y, x = np.mgrid[:145, :145]
    out[""] = _framed(regions(np.abs(x - 72) + np.abs(y - 72) <= 72)[0])  # a diamond, which is nearly a cross
    return out


def _framed(region: Region) -> np.ndarray:
    """The region's mask stretched to _TEMPLATE x _TEMPLATE, as coverage in [0, 1]."""
    left, top, right, bottom = region.box
    part = Image.fromarray(region.mask[top:bottom, left:right].astype(np.float32))
    return np.asarray(part.resize((_TEMPLATE, _TEMPLATE), Image.Resampling.BILINEAR))


def name_shape(region: Region) -> str:
    """The shape whose outline overlaps best (intersection over union), or "" when none does."""
    left, top, right, bottom = region.box
    ratio = (right - left) / (bottom - top)
    if not 0.62 < ratio < 1.6:
        return ""
    mask = _framed(region)
    overlap = {n: np.minimum(mask, t).sum() / np.maximum(mask, t).sum() for n, t in _templates().items()}
    best = max(overlap, key=lambda n: overlap[n])
    return best if overlap[best] > 0.72 else ""


def find_shapes(picture: np.ndarray) -> list[Found]:
    """Every single-coloured region that stands out from the background. picture: (h, w, 3) uint8."""
    h, w = picture.shape[:2]
    away = np.abs(picture.astype(np.float32) - background_of(picture)).sum(-1) > 75
    labels = np.where(away, nearest_name(picture, PALETTE), -1)
    least = h * w * _MIN_SHARE
    edge = max(1, round(min(h, w) / 128))  # blended pixels around a shape
    seeds: list[Region] = []
    for label in np.unique(labels[labels >= 0]):
        seeds += regions(erode(labels == label, edge), min_area=int(least * 0.5))
    others = np.zeros((h, w), dtype=int)
    for seed in seeds:
        others += seed.mask
    found = []
    for seed in seeds:
        free = away & ((others - seed.mask) == 0)
        grown = seed.mask
        for _ in range(edge + 1):  # back to where erosion and blended edges took it from
            grown = dilate(grown) & free
        region = max(regions(grown), key=lambda r: r.area)
        if region.area < least:
            continue
        colour = list(PALETTE)[int(nearest_name(np.median(picture[seed.mask], axis=0), PALETTE))]
        x, y = region.centre
        found.append(Found(name_shape(region), colour, (x / w, y / h)))
    return found


def background_name(picture: np.ndarray) -> str:
    """Nearest named background of the border's mean colour."""
    mean = background_of(picture).mean(axis=(0, 1))
    return list(BACKGROUNDS)[int(nearest_name(mean, {n: rgb for n, (rgb, _) in BACKGROUNDS.items()}))]


def place_of(centre: tuple[float, float]) -> str:
    """Place word of a centre in fractions: "centre", "left", "top right" and so on."""
    vertical = "top" if centre[1] < 0.4 else "bottom" if centre[1] > 0.6 else ""
    across = "left" if centre[0] < 0.4 else "right" if centre[0] > 0.6 else ""
    return f"{vertical} {across}".strip() or "centre"


def relation_of(first: tuple[float, float], second: tuple[float, float]) -> str:
    """Where the first centre lies of the second."""
    x, y = first[0] - second[0], first[1] - second[1]
    if abs(x) >= abs(y):
        return "left" if x < 0 else "right"
    return "above" if y < 0 else "below"


def score(picture: np.ndarray, scene: Scene) -> dict[str, bool]:
    """Each task that the scene asks for, right or wrong; a task that it does not ask for is absent.

    count: as many shapes; colour: the same colours; position: one shape in the named place; relation: both shapes
    there, the first on the named side of the second; row: side by side; binding: the same (colour, shape) pairs where
    pairs could be mixed up; object: the named shapes; background: its plain colour; all: everything asked for at once.
    """
    found, things = find_shapes(picture), scene.things
    kind, _, detail = scene.layout.partition(":")
    wanted = [(t.colour, t.shape) for t in things]
    seen = [(f.colour, f.shape) for f in found]
    out = {
        "count": len(found) == len(things),
        "colour": Counter(c for c, _ in seen) == Counter(c for c, _ in wanted),
        "object": Counter(s for _, s in seen) == Counter(s for _, s in wanted),
    }
    if kind == "single" and detail != "centre":
        out["position"] = len(found) == 1 and place_of(found[0].centre) == detail
    if kind == "pair" and len(set(wanted)) == 2:
        out["relation"] = Counter(seen) == Counter(wanted) and (
            relation_of(found[seen.index(wanted[0])].centre, found[seen.index(wanted[1])].centre) == detail
        )
    if kind == "row" and found:
        xs, ys = zip(*(f.centre for f in found), strict=True)
        out["row"] = max(ys) - min(ys) < 0.15 and max(xs) - min(xs) > 0.4
    if len({c for c, _ in wanted}) > 1 and len({s for _, s in wanted}) > 1:
        out["binding"] = Counter(seen) == Counter(wanted)
    out["all"] = all(out.values())
    if len(scene.background) == 1:
        out["background"] = background_name(picture) == scene.background[0]
    return out


def geneval_task(scene: Scene) -> str:
    """The GenEval-style task type that a shape scene belongs to."""
    kind, _, detail = scene.layout.partition(":")
    if kind == "single":
        return "single object" if detail == "centre" else "position"
    if kind == "pair":
        return "two objects, position"
    return "counting" if kind == "count" else "colour attribution"
