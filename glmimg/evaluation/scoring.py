"""From pictures to figures: each picture scored against its record, then grouped.

Four sources stand side by side: `model`, the ceilings `real` (the scene as drawn) and `tokens` (that picture's true
tokens decoded), and the floor (the model's pictures scored against the prompts of others).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from glmimg.corpus.stickers import StickerBank
from glmimg.evaluation import layout
from glmimg.evaluation.concepts import Judge, crops_of, nearest_style
from glmimg.evaluation.figures import estimate
from glmimg.evaluation.prompts import Record
from glmimg.evaluation.text import Reader, ink_of, names_ink
from glmimg.evaluation.text import score as text_score

Scores = dict[str, "bool | float"]


@dataclass(frozen=True)
class Scorers:
    """What reads the pictures. A reader that is None leaves its figures out; `second` is (name, reader)."""

    bank: StickerBank
    judge: Judge
    reader: Reader | None
    second: tuple[str, Reader] | None = None

    def score(self, picture: np.ndarray, record: Record) -> Scores:
        """All that the record's part measures on one picture (h, w, 3) uint8."""
        return {"layout": self._layout, "text": self._text, "concepts": self._concepts}[record.part](picture, record)

    def _layout(self, picture: np.ndarray, record: Record) -> Scores:
        return dict(layout.score(picture, record.scene))

    def _text(self, picture: np.ndarray, record: Record) -> Scores:
        sign, image = record.scene.things[-1], Image.fromarray(picture)
        word = sign.word
        out: Scores = {"ink": ink_of(picture, sign) == sign.ink} if names_ink(record.prompt, sign.ink) else {}
        if self.reader is not None:
            out |= text_score(self.reader(image), word)
        if self.second is not None:
            out |= {f"{k} (second engine)": v for k, v in text_score(self.second[1](image), word).items()}
        return out

    def _concepts(self, picture: np.ndarray, record: Record) -> Scores:
        judge, truth = self.judge, [t.concept for t in record.scene.things]
        features = judge.features(crops_of(picture, record.scene))
        ranks = judge.rank_of(features, truth)
        out: Scores = {"top1": bool((ranks < 1).all()), "top5": bool((ranks < 5).all())}
        styles = [nearest_style(judge, picture, record.scene, k, self.bank) for k in range(len(truth))]
        out["style"] = styles == [t.style for t in record.scene.things]
        things = set(judge.things())
        if all(c in things for c in truth):
            inner = judge.rank_of(features, truth, within=things)
            out |= {"things top1": bool((inner < 1).all()), "things top5": bool((inner < 5).all())}
        return out


def floor_records(records: Sequence[Record]) -> list[Record]:
    """For every record the prompt of its successor in the same subset: what chance would score."""
    by_subset: dict[tuple[str, str], list[int]] = {}
    for k, record in enumerate(records):
        by_subset.setdefault((record.part, record.subset), []).append(k)
    out = list(records)
    for members in by_subset.values():
        for at, k in enumerate(members):
            out[k] = records[members[(at + 1) % len(members)]]
    return out


def groups_of(record: Record) -> list[str]:
    """The rows of the card that a record counts for."""
    groups = [f"{record.part}/{record.subset}"]
    if record.part == "layout" and record.subset in ("seen", "position"):
        groups += ["layout/trained", f"layout/GenEval-style: {layout.geneval_task(record.scene)}"]
    if record.part == "text":
        groups.append("text/all")
    if record.part == "text" and record.subset == "unseen words" and len(record.scene.things[-1].word) <= 6:
        groups.append("text/unseen words up to 6 letters")
    if record.part == "concepts" and record.subset != "pairs":
        groups.append(f"concepts/language {record.language}")
    if record.part == "edit":
        groups.append("edit/all")
    return groups


def figures(records: Sequence[Record], rows: dict[str, list[Scores | None]]) -> dict[str, dict[str, Any]]:
    """Key part/group/metric -> source -> value, n, low, high. rows: source -> scores per record (None: not made)."""
    values: dict[str, dict[str, list[bool | float]]] = {}
    for source, scored in rows.items():
        for record, scores in zip(records, scored, strict=True):
            for group in groups_of(record) if scores is not None else ():
                for metric, value in (scores or {}).items():
                    if "GenEval" in group and metric != "all":
                        continue
                    values.setdefault(f"{group}/{metric}", {}).setdefault(source, []).append(value)
    out = {key: {s: asdict(estimate(v)) for s, v in by.items()} for key, by in sorted(values.items())}
    out |= _layout_means(records, rows)
    return out


def _layout_means(records: Sequence[Record], rows: dict[str, list[Scores | None]]) -> dict[str, dict[str, Any]]:
    """The mean of the five tasks, and of the GenEval-style types, with a bootstrap over pictures."""
    out: dict[str, dict[str, Any]] = {"layout/trained/mean of tasks": {}, "layout/GenEval-style/mean of types": {}}
    for source, scored in rows.items():
        pairs = [
            (record, scores)
            for record, scores in zip(records, scored, strict=True)
            if scores is not None and record.part == "layout" and record.subset in ("seen", "position")
        ]
        if not pairs:
            continue
        tasks = [{t: float(s[t]) for t in layout.TASKS if t in s} for _, s in pairs]
        types = [{layout.geneval_task(r.scene): float(s["all"])} for r, s in pairs]
        for key, columns in zip(out, (tasks, types), strict=True):
            out[key][source] = _mean_of_means(columns)
    return {key: by for key, by in out.items() if by}


def _mean_of_means(columns: list[dict[str, float]]) -> dict[str, Any]:
    names = sorted({name for row in columns for name in row})
    table = np.array([[row.get(name, np.nan) for name in names] for row in columns])

    def value(rows: np.ndarray) -> float:
        present = ~np.isnan(rows)
        counted = present.sum(0)
        sums = np.where(present, rows, 0).sum(0)
        return float((sums[counted > 0] / counted[counted > 0]).mean())

    rng = np.random.default_rng(0)
    resampled = [value(table[rng.integers(len(table), size=len(table))]) for _ in range(500)]
    low, high = np.quantile(resampled, (0.025, 0.975))
    return {"value": value(table), "n": len(table), "low": float(low), "high": float(high)}
