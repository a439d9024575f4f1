"""Edits: what should change changed, what should not did not. The corpus knows both exactly.

Array legend: h, w pixels; pictures (h, w, 3) uint8; masks (h, w) bool.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from glmimg.corpus.scenes import Scene
from glmimg.corpus.words import PALETTE
from glmimg.evaluation import layout
from glmimg.evaluation.concepts import Judge, crops_of
from glmimg.evaluation.prompts import Record
from glmimg.evaluation.segment import background_of, dilate, erode, nearest_name
from glmimg.evaluation.text import Reader
from glmimg.evaluation.text import score as text_score

# Decoded pixels differ from drawn ones everywhere: a pixel is kept if its summed channel difference stays below this.
TOLERANCE = 90
KEPT_SHARE = 0.9


def changed_mask(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Where the true pictures differ, with a margin of 4 pixels for an edge drawn a little elsewhere."""
    return dilate(np.abs(before.astype(int) - after).sum(-1) > 24, 4)


def score(
    edited: np.ndarray, record: Record, before: np.ndarray, after: np.ndarray, judge: Judge, reader: Reader | None
) -> dict[str, bool | float]:
    """`changed`: the kind's own test; `nearer`: where a change was due, the picture is nearer to the target than to
    the source; `kept`: 90 % of the other pixels are as they were; `both`: changed and kept. before, after: the true
    renders of source and target. A change of words needs a reader, else it is absent."""
    due = changed_mask(before, after)
    if record.changed == -1:  # a new background: the things' insides must stay
        due |= dilate(np.abs(before.astype(np.float32) - background_of(before)).sum(-1) <= 60, 3)
    still = erode(~due, 1)
    away = np.abs(edited.astype(int) - before).sum(-1)
    kept = bool((away[still] < TOLERANCE).mean() >= KEPT_SHARE) if still.any() else True
    to_target = np.abs(edited.astype(int) - after).sum(-1)[due].mean()
    out: dict[str, bool | float] = {"nearer": bool(to_target < away[due].mean()), "kept": kept}
    if record.subset == "style":
        out["changed"] = _style(edited, record, before, after, judge)
    elif record.subset != "word":
        out["changed"] = _TESTS[record.subset](edited, record, judge)
    elif reader is not None:
        word = record.scene.things[record.changed].word
        out["changed"] = bool(text_score(reader(Image.fromarray(edited)), word)["word"])
    if "changed" in out:
        out["both"] = bool(out["changed"]) and kept
    return out


def _background(edited: np.ndarray, record: Record, judge: Judge) -> bool:
    return layout.background_name(edited) == record.scene.background[0]


def _named(edited: np.ndarray, scene: Scene, at: int, judge: Judge) -> bool:
    """The thing is what it should be: its colour and shape, or its concept among the judge's first five."""
    thing = scene.things[at]
    if thing.kind == "shape":
        wanted = (thing.colour, thing.shape)
        return wanted in [(f.colour, f.shape) for f in layout.find_shapes(edited)]
    crop = crops_of(edited, scene)[at]
    return bool(judge.rank_of(judge.features([crop]), [thing.concept])[0] < 5)


def _thing(edited: np.ndarray, record: Record, judge: Judge) -> bool:
    scene = record.scene
    if any(t.kind == "sign" for t in scene.things):  # a picture above a sign: the layout's halves hold both
        return _named(edited, scene, record.changed, judge)
    return all(_named(edited, scene, k, judge) for k in range(len(scene.things)))


def _style(edited: np.ndarray, record: Record, before: np.ndarray, after: np.ndarray, judge: Judge) -> bool:
    """Still the concept, and in the judge's features nearer to the target than to the source."""
    features = judge.features([crops_of(p, record.scene)[0] for p in (edited, before, after)])
    to_source, to_target = (float(features[0] @ f / f.norm()) for f in features[1:])
    return to_target > to_source and bool(judge.rank_of(features[:1], [record.scene.things[0].concept])[0] < 5)


def _colour(edited: np.ndarray, record: Record, judge: Judge) -> bool:
    thing = record.scene.things[record.changed]
    if thing.kind == "shape":
        return _named(edited, record.scene, record.changed, judge)
    left, top, right, bottom = thing.box
    inside = np.zeros(edited.shape[:2], dtype=bool)
    inside[top:bottom, left:right] = True
    inside &= np.abs(edited.astype(np.float32) - background_of(edited)).sum(-1) > 75
    if not inside.any():
        return False
    names = nearest_name(edited[erode(inside, 1)] if erode(inside, 1).any() else edited[inside], PALETTE)
    return list(PALETTE)[int(np.bincount(names).argmax())] == thing.colour


def _move(edited: np.ndarray, record: Record, judge: Judge) -> bool:
    scene = record.scene
    mask = np.abs(edited.astype(np.float32) - background_of(edited)).sum(-1) > 60
    mask = dilate(erode(mask, 1), 1)
    if not mask.any():
        return False
    ys, xs = np.nonzero(mask)
    left, right = np.quantile(xs, (0.02, 0.98))
    top, bottom = np.quantile(ys, (0.02, 0.98))
    centre = (float(left + right) / 2 / scene.width, float(top + bottom) / 2 / scene.height)
    return layout.place_of(centre) == scene.layout.partition(":")[2] and _named(edited, scene, 0, judge)


_TESTS: dict[str, Callable[[np.ndarray, Record, Judge], bool]] = {
    "background": _background,
    "colour": _colour,
    "add": _thing,
    "replace": _thing,
    "move": _move,
}
