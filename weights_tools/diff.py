"""What two checkpoints differ in: settings, and every tensor's change; as figures and as a picture.

Packed weights are compared as what they stand for, so an original and its quantised version can be held side by side.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from glmimg.checkpoint import COMPONENTS, Checkpoint
from glmimg.errors import BadInput
from glmimg.packed_format import PACKED, SCALE
from glmimg.packed_linear import dequantize
from glmimg.weight_files import json_object
from glmimg.weights_tools.streaming import Progress, TensorReader

__all__ = ["Diff", "TensorDiff", "diff_checkpoints", "draw_diff"]

_BLOCK = 1 << 22
_SETTINGS = (
    *(f"{component}/config.json" for component in COMPONENTS),
    "vision_language_encoder/generation_config.json",
    "scheduler/scheduler_config.json",
    "model_index.json",
)
_ABSENT = object()


@dataclass(frozen=True)
class TensorDiff:
    """`state`: equal, changed, reshaped, only in a, only in b. `relative`: |b - a| / |a|, infinite where a is nothing;
    `largest`: the largest change of one number; `share` of the numbers that changed. `dtypes` where they differ."""

    component: str
    name: str
    state: str
    relative: float = 0.0
    largest: float = 0.0
    share: float = 0.0
    dtypes: tuple[str, str] | None = None


@dataclass(frozen=True)
class Diff:
    """All tensors of both, and the settings that differ: (file, key, value in a, value in b)."""

    tensors: list[TensorDiff]
    settings: list[tuple[str, str, Any, Any]]
    totals: dict[str, float]  # component -> sqrt(sum |b - a|^2 / sum |a|^2) over the tensors that both have

    @property
    def equal(self) -> bool:
        """Whether nothing differs, dtypes included."""
        return not self.settings and all(t.state == "equal" and t.dtypes is None for t in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """For --json, which knows no infinity; tensors that are equal in everything are only counted."""
        rows = [asdict(t) for t in self.tensors if t.state != "equal" or t.dtypes]
        for row in rows:
            row["relative"] = None if math.isinf(row["relative"]) else row["relative"]
        return {
            "equal": self.equal,
            "tensors": len(self.tensors),
            "relative_change": {k: None if math.isinf(v) else v for k, v in self.totals.items()},
            "differences": rows,
            "settings": [{"file": file, "key": key, "a": a, "b": b} for file, key, a, b in self.settings],
        }


def diff_checkpoints(a: str | Path | Checkpoint, b: str | Path | Checkpoint, progress: Progress | None = None) -> Diff:
    """Compares everything; one tensor of each is in memory at a time."""
    first, second = Checkpoint.open(a), Checkpoint.open(b)
    sides = {part: (_Weights(first.root / part), _Weights(second.root / part)) for part in COMPONENTS}
    total = sum(left.reader.nbytes() for left, _ in sides.values())
    done, rows, totals = 0, [], {}
    for component, (left, right) in sides.items():
        sums = torch.zeros(2, dtype=torch.float64)
        for name in [*left.shapes, *(name for name in right.shapes if name not in left.shapes)]:
            if name not in right.shapes or name not in left.shapes:
                rows.append(TensorDiff(component, name, f"only in {'a' if name in left.shapes else 'b'}"))
            elif left.shapes[name] != right.shapes[name]:
                rows.append(TensorDiff(component, name, "reshaped"))
            else:
                row, part = _compare(component, name, left, right)
                rows.append(row)
                sums += part
            done += left.nbytes(name)
            if progress:
                progress(done, total)
        totals[component] = _ratio(*sums.tolist())
    return Diff(rows, _settings(first.root, second.root), totals)


class _Weights:
    """A component's tensors under their plain names, packed ones made whole."""

    def __init__(self, folder: Path) -> None:
        self.reader = TensorReader(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, info in self.reader.infos.items():
            if name.endswith(PACKED):
                rows, columns = info.shape
                self.shapes[_plain(name)] = (rows, columns if info.dtype == "I8" else 2 * columns)
            elif not name.endswith(SCALE):
                self.shapes[name] = info.shape

    def _stored(self, name: str) -> list[str]:
        if name in self.reader.infos:
            return [name]
        layer = name.removesuffix(".weight")
        return [stored for stored in (layer + PACKED, layer + SCALE) if stored in self.reader.infos]

    def nbytes(self, name: str) -> int:
        return self.reader.nbytes(self._stored(name))

    def dtype(self, name: str) -> str:
        return "+".join(self.reader.infos[stored].dtype for stored in self._stored(name))

    def tensor(self, name: str) -> torch.Tensor:
        parts = [self.reader.tensor(stored) for stored in self._stored(name)]
        return parts[0] if len(parts) == 1 else dequantize(parts[0], parts[1], torch.float32)


def _plain(packed: str) -> str:
    return packed.removesuffix(PACKED) + ".weight"


def _compare(component: str, name: str, left: _Weights, right: _Weights) -> tuple[TensorDiff, torch.Tensor]:
    a, b = left.tensor(name), right.tensor(name)
    sums, largest, changed = torch.zeros(2, dtype=torch.float64), 0.0, 0
    for x, y in zip(a.flatten().split(_BLOCK), b.flatten().split(_BLOCK), strict=True):
        x, y = x.double(), y.double()
        distance = y - x
        sums += torch.stack([distance @ distance, x @ x])
        largest = max(largest, float(distance.abs().max())) if len(x) else largest
        changed += int((distance != 0).sum())  # NaN counts: it is not equal to anything
    dtypes = (left.dtype(name), right.dtype(name))
    row = TensorDiff(
        component,
        name,
        "changed" if changed else "equal",
        _ratio(*sums.tolist()),
        largest,
        changed / max(1, a.numel()),
        dtypes if dtypes[0] != dtypes[1] else None,
    )
    return row, sums


def _ratio(change: float, size: float) -> float:
    return 0.0 if change == 0 else math.inf if size == 0 else math.sqrt(change / size)


def _settings(a: Path, b: Path) -> list[tuple[str, str, Any, Any]]:
    found = []
    for file in _SETTINGS:
        left, right = (_flat(json_object((root / file).read_bytes(), root / file)) for root in (a, b))
        for key in sorted(left.keys() | right.keys()):
            x, y = left.get(key, _ABSENT), right.get(key, _ABSENT)
            if x != y:
                found.append((file, key, None if x is _ABSENT else x, None if y is _ABSENT else y))
    if (a / "processor/tokenizer.json").read_bytes() != (b / "processor/tokenizer.json").read_bytes():
        found.append(("processor/tokenizer.json", "(its bytes)", None, None))
    return found


def _flat(value: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{start}{key}.") if isinstance(inner, dict) else {f"{start}{key}": inner}
    return flat


# The picture: a row for each kind of tensor, a square for each of its layers, darker the more it changed.

_CELL, _LABEL, _TITLE = 14, 380, 24
_LEAST = 1e-4  # relative changes below are drawn as this
_EQUAL, _GONE, _INK = (236, 236, 236), (90, 90, 200), (20, 20, 20)
_LIGHT, _DARK = (255, 236, 160), (120, 0, 30)


def draw_diff(diff: Diff) -> Image.Image:
    """Squares from light (0.0001 of the tensor's length) to dark (all of it); grey is equal, blue is in one only."""
    table: dict[tuple[str, str], list[tuple[int, TensorDiff]]] = {}
    for row in diff.tensors:
        number = re.search(r"\.(\d+)\.", row.name)
        kind = row.name if number is None else f"{row.name[: number.start(1)]}*{row.name[number.end(1) :]}"
        table.setdefault((row.component, kind), []).append((int(number[1]) if number else 0, row))
    if not table:
        raise BadInput("there are no tensors to draw")
    columns = 1 + max(column for cells in table.values() for column, _ in cells)
    headings = len({component for component, _ in table})
    size = (_LABEL + columns * _CELL + 16, (headings + 1) * _TITLE + len(table) * _CELL + 16)
    picture = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    y, last = 8, None
    for (component, kind), cells in table.items():
        if component != last:
            last = component
            change = diff.totals.get(component, 0.0)
            draw.text((8, y + 4), f"{component}: relative change {change:.3g}", _INK, ImageFont.load_default(13))
            y += _TITLE
        shown = kind if len(kind) < 60 else f"...{kind[-57:]}"
        draw.text((16, y), shown, _INK, font)
        for column, row in cells:
            x = _LABEL + column * _CELL
            draw.rectangle((x, y, x + _CELL - 2, y + _CELL - 2), _colour(row))
        y += _CELL
    legend = [("equal", _EQUAL), ("0.0001", _LIGHT), ("0.01", _blend(0.5)), ("1", _DARK), ("in one only", _GONE)]
    for k, (text, colour) in enumerate(legend):
        x = 16 + k * 90
        draw.rectangle((x, y + 8, x + _CELL - 2, y + 6 + _CELL), colour)
        draw.text((x + _CELL + 4, y + 7), text, _INK, font)
    return picture


def _colour(row: TensorDiff) -> tuple[int, int, int]:
    if row.state not in ("equal", "changed"):
        return _GONE
    if row.state == "equal":
        return _EQUAL
    relative = row.relative if math.isfinite(row.relative) else 1.0
    return _blend(1 - math.log(min(1.0, max(_LEAST, relative))) / math.log(_LEAST))


def _blend(share: float) -> tuple[int, int, int]:
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(_LIGHT, _DARK, strict=True))
    return red, green, blue
