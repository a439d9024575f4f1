"""What two checkpoints differ in: settings, and every tensor's change; as figures and as a picture.

Packed weights are compared as what they stand for, so an original and its quantised version can be held side by side.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from glmimg.checkpoint import COMPONENTS, Checkpoint
from glmimg.errors import BadInput, CheckpointError
from glmimg.packed_format import PACKED, SCALE
from glmimg.packed_linear import dequantize
from glmimg.torch_state import plain_torch
from glmimg.weight_files import TensorInfo, json_object, regular
from glmimg.weights_tools.inspect import finite
from glmimg.weights_tools.streaming import Progress, TensorReader, row_blocks

__all__ = ["Diff", "TensorDiff", "diff_checkpoints", "draw_diff"]

_BLOCK = 1 << 22  # numbers compared at a time
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
        """For --json, which knows neither NaN nor infinity; tensors that are equal in everything are only counted."""
        return finite(
            {
                "equal": self.equal,
                "tensors": len(self.tensors),
                "relative_change": self.totals,
                "differences": [asdict(t) for t in self.tensors if t.state != "equal" or t.dtypes],
                "settings": [{"file": file, "key": key, "a": a, "b": b} for file, key, a, b in self.settings],
            }
        )


@plain_torch()
def diff_checkpoints(a: str | Path | Checkpoint, b: str | Path | Checkpoint, progress: Progress | None = None) -> Diff:
    """Compares everything, a few million numbers of each at a time."""
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
                scale = self.reader.infos.get(name.removesuffix(PACKED) + SCALE)
                shape = None if scale is None else _packed_shape(info, scale)
                if shape is None:
                    raise CheckpointError(f"{folder}: {name!r:.100} is no packed matrix with its scales: damaged?")
                self.shapes[_plain(name)] = shape
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

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Its numbers, flat, some rows at a time: the same for every tensor of that shape."""
        for part in row_blocks(self.shapes[name], _BLOCK):
            parts = [self.reader.rows(stored, part) for stored in self._stored(name)]
            whole = parts[0] if len(parts) == 1 else dequantize(parts[0], parts[1], torch.float32)
            yield whole.flatten()


def _packed_shape(packed: TensorInfo, scale: TensorInfo) -> tuple[int, ...] | None:
    """Of the weight that both stand for; None if they stand for none."""
    if len(packed.shape) < 2 or packed.dtype not in ("I8", "U8") or not scale.is_float:
        return None
    rows, columns = packed.shape[:2]
    if packed.dtype == "I8":
        return packed.shape if scale.shape == (rows,) else None
    if len(packed.shape) > 2:
        return None
    groups = scale.shape[1] if len(scale.shape) == 2 and scale.shape[0] == rows else 0
    return (rows, 2 * columns) if groups and 2 * columns % groups == 0 else None


def _plain(packed: str) -> str:
    return packed.removesuffix(PACKED) + ".weight"


def _compare(component: str, name: str, left: _Weights, right: _Weights) -> tuple[TensorDiff, torch.Tensor]:
    sums, largest, changed = torch.zeros(2, dtype=torch.float64), torch.zeros((), dtype=torch.float64), 0
    for x, y in zip(left.blocks(name), right.blocks(name), strict=True):
        x, y = x.double(), y.double()
        distance = (y - x).masked_fill_(x == y, 0.0)  # infinity less itself is NaN
        sums += torch.stack([distance @ distance, x @ x])
        if len(x):
            largest = torch.maximum(largest, distance.abs().max())  # keeps NaN
        changed += int((distance != 0).sum())  # NaN counts: it is not equal to anything
    dtypes = (left.dtype(name), right.dtype(name))
    row = TensorDiff(
        component,
        name,
        "changed" if changed else "equal",
        _ratio(*sums.tolist()),
        float(largest),
        changed / max(1, math.prod(left.shapes[name])),
        dtypes if dtypes[0] != dtypes[1] else None,
    )
    return row, sums


def _ratio(change: float, size: float) -> float:
    return 0.0 if change == 0 else math.inf if size == 0 else math.sqrt(change / size)


def _settings(a: Path, b: Path) -> list[tuple[str, str, Any, Any]]:
    found = []
    for file in _SETTINGS:
        left, right = (_flat(_json(root / file)) for root in (a, b))
        for key in sorted(left.keys() | right.keys()):
            x, y = left.get(key, _ABSENT), right.get(key, _ABSENT)
            if x != y:
                found.append((file, key, None if x is _ABSENT else x, None if y is _ABSENT else y))
    if (a / "processor/tokenizer.json").read_bytes() != (b / "processor/tokenizer.json").read_bytes():
        found.append(("processor/tokenizer.json", "(its bytes)", None, None))
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        return json_object(regular(path).read_bytes(), path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): not downloaded completely?") from error


def _flat(value: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{start}{key}.") if isinstance(inner, dict) else {f"{start}{key}": inner}
    return flat


# The picture: a row for each kind of tensor, a square for each of its layers, darker the more it changed.

_CELL, _LABEL, _TITLE = 14, 380, 24
_LEAST = 1e-4  # relative changes below are drawn as this
_MOST_ROWS, _MOST_COLUMNS = 2000, 256  # what goes beyond is told to be left out
_EQUAL, _GONE, _INK = (236, 236, 236), (90, 90, 200), (20, 20, 20)
_LIGHT, _DARK = (255, 236, 160), (120, 0, 30)


def draw_diff(diff: Diff) -> Image.Image:
    """Squares from light (0.0001 of the tensor's length) to dark (all of it); grey is equal, blue is in one only."""
    table: dict[tuple[str, str], list[tuple[int, TensorDiff]]] = {}
    layers: dict[str, set[int]] = {}
    for row in diff.tensors:
        number = re.search(r"\.(\d{1,18})\.", row.name)
        kind = row.name if number is None else f"{row.name[: number.start(1)]}*{row.name[number.end(1) :]}"
        layer = int(number[1]) if number else -1
        layers.setdefault(row.component, set()).add(layer)
        table.setdefault((row.component, kind), []).append((layer, row))
    if not table:
        raise BadInput("there are no tensors to draw")
    # Layers stand in the order of their numbers, which may be anything: a number is no place in a picture.
    places = {part: {n: k for k, n in enumerate(sorted(found - {-1}))} | {-1: 0} for part, found in layers.items()}
    table = {
        key: [(places[key[0]][layer], row) for layer, row in cells if places[key[0]][layer] < _MOST_COLUMNS]
        for key, cells in list(table.items())[:_MOST_ROWS]
    }
    left_out = len(diff.tensors) - sum(map(len, table.values()))
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
    if left_out:
        draw.text((_LABEL, 8), f"{left_out} more tensors are not drawn", _INK, font)
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
