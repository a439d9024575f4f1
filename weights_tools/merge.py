"""Checkpoints made of others: adapters merged into the weights, averages, and walks from one to another.

Arithmetic is done in float32, a few rows at a time, and rounded once to the dtype in which the base stores a tensor.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from glmimg.atomic_write import expanded
from glmimg.checkpoint import COMPONENTS, SECOND_NAME, Checkpoint
from glmimg.errors import BadInput, CheckpointError, UnknownName
from glmimg.lora import COMPONENT, Low, change_of, open_adapters, split_number
from glmimg.packed_format import CONFIG_KEY
from glmimg.torch_state import plain_torch
from glmimg.weight_files import FLOATS, codebook_digest
from glmimg.weights_tools.rewrite import Bytes, pass_through, record, require_new, rewritten, write_component
from glmimg.weights_tools.streaming import Progress, TensorReader, TensorSpec, TensorWriter, as_bytes, row_blocks

__all__ = [
    "MergeResult",
    "average_checkpoints",
    "ema_weights",
    "merge_adapters",
    "parse_weighted",
    "slerp_checkpoints",
]

_BLOCK = 1 << 22  # numbers worked on at a time
Model = str | Path | Checkpoint
# Gives the new values of some rows of a tensor from those of the base, and the rows' numbers.
Change = Callable[[torch.Tensor, slice], torch.Tensor]


@dataclass(frozen=True)
class MergeResult:
    """What was written: for each component how many tensors changed, and by how much, sqrt(sum d^2 / sum w^2)."""

    path: Path
    changed: dict[str, int]
    relative_change: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {"path": str(self.path), "changed": self.changed, "relative_change": self.relative_change}


def parse_weighted(text: str) -> tuple[str, float]:
    """(path, weight) of "PATH" or "PATH:WEIGHT"; the weight is 1 where none is written, or the whole is a path."""
    path, weight = split_number(text, os.path.exists)
    if not math.isfinite(weight) or not path:
        raise BadInput(f"{text!r}: give PATH or PATH:WEIGHT with a finite weight, such as {path or 'PATH'}:0.5")
    return path, weight


def ema_weights(decay: float, count: int) -> list[float]:
    """What each of `count` checkpoints weighs, oldest first, in an exponential moving average that starts at the
    oldest: average = decay * average + (1 - decay) * next."""
    if count < 1:
        raise BadInput("give the checkpoints behind the decay, oldest first")
    if not 0 < decay < 1:
        raise BadInput(f"decay {decay}: give a number above 0 and below 1, such as 0.9")
    newer = [(1 - decay) * decay ** (count - 1 - k) for k in range(1, count)]
    return [decay ** (count - 1), *newer]


@plain_torch()
def merge_adapters(
    base: Model,
    target: str | Path,
    adapters: Sequence[str | Path | tuple[str | Path, float]],
    *,
    progress: Progress | None = None,
) -> MergeResult:
    """Writes `base` with LoRA and DoRA adapters merged into its weights: folders, (folder, strength) or "folder:0.7".

    Every adapter's change is reckoned from the base's weights alone, multiplied by its strength, and all are added up.
    """
    if not adapters:
        raise BadInput("no adapters to merge: give at least one")
    checkpoint, readers = _open(base)
    stacked, codebook = open_adapters(adapters), codebook_digest(readers["vision_language_encoder"])
    layers: dict[str, dict[str, list[tuple[Low, float]]]] = {component: {} for component in COMPONENTS}
    for one in stacked:
        for stage, adapter in one.stages.items():
            infos = readers[COMPONENT[stage]].infos
            shapes = {n.removesuffix(".weight"): i.shape for n, i in infos.items() if n.endswith(".weight") and i.shape}
            adapter.require_fit({name: (shape[0], shape[-1]) for name, shape in shapes.items()}, codebook, one.name)
            for name, low in adapter.layers.items():
                if not all(bool(tensor.isfinite().all()) for tensor in low[:3] if tensor is not None):
                    raise CheckpointError(f"{one.name}: {name} holds NaN or infinity: its training run diverged")
                layers[COMPONENT[stage]].setdefault(f"{name}.weight", []).append((low, one.strength))
    changes = {
        component: {name: _merged(lows) for name, lows in by_name.items()} for component, by_name in layers.items()
    }
    told = [{"adapter": Path(one.name).name, "strength": one.strength} for one in stacked]
    return _write(checkpoint, readers, target, changes, progress, "merge", {"adapters": told})


@plain_torch()
def average_checkpoints(
    base: Model,
    target: str | Path,
    parts: Sequence[tuple[Model, float]],
    *,
    components: Sequence[str] = COMPONENTS,
    progress: Progress | None = None,
) -> MergeResult:
    """Writes the weighted mean of the listed checkpoints' components; everything else comes from `base`.

    Weights are divided by their sum; `base` counts only where it is listed too.
    """
    if len(parts) < 1 or abs(sum(weight for _, weight in parts)) < 1e-9:
        raise BadInput("an average needs checkpoints whose weights do not add up to nothing")
    checkpoint, readers = _open(base)
    total = sum(weight for _, weight in parts)
    others = [(_like(checkpoint, readers, part, components, target), weight / total) for part, weight in parts]

    def change(component: str, name: str) -> Change:
        def mean(own: torch.Tensor, part: slice) -> torch.Tensor:
            result = torch.zeros(own.shape)
            for other, weight in others:
                result.add_(other[component].rows(name, part).float(), alpha=weight)
            return result

        return mean

    changes = _everywhere(readers, components, change)
    told = [{"from": _name(part), "weight": weight / total} for part, weight in parts]
    return _write(checkpoint, readers, target, changes, progress, "average", {"parts": told})


@plain_torch()
def slerp_checkpoints(
    base: Model,
    target: str | Path,
    first: Model,
    second: Model,
    t: float,
    *,
    components: Sequence[str] = COMPONENTS,
    progress: Progress | None = None,
) -> MergeResult:
    """Writes the point `t` of the way from `first` (0) to `second` (1), on the arc between each pair of tensors.

    Tensors that point the same way, or are nothing, are interpolated on the straight line.
    """
    if not 0 <= t <= 1:
        raise BadInput(f"slerp at {t}: give a number from 0, the first checkpoint, to 1, the second")
    checkpoint, readers = _open(base)
    ends = [_like(checkpoint, readers, end, components, target) for end in (first, second)]

    def change(component: str, name: str) -> Change:
        def both(part: slice) -> list[torch.Tensor]:
            return [end[component].rows(name, part) for end in ends]

        @cache
        def shares() -> tuple[float, float]:
            return _shares(map(both, row_blocks(readers[component].infos[name].shape, _BLOCK)), t)

        def arc(own: torch.Tensor, part: slice) -> torch.Tensor:
            a, b = both(part)
            share_a, share_b = shares()
            return (a.float() * share_a).add_(b.float(), alpha=share_b)

        return arc

    changes = _everywhere(readers, components, change)
    told = {"first": _name(first), "second": _name(second), "t": t}
    return _write(checkpoint, readers, target, changes, progress, "slerp", told)


def _merged(lows: Sequence[tuple[Low, float]]) -> Change:
    def merged(own: torch.Tensor, part: slice) -> torch.Tensor:
        block = own.float()
        total = block.clone()
        for low, strength in lows:
            lengths = None if low.magnitude_N is None else low.magnitude_N[part]
            total += strength * change_of(block, low._replace(b_Nr=low.b_Nr[part], magnitude_N=lengths))
        return total

    return merged


def _shares(blocks: Iterable[Sequence[torch.Tensor]], t: float) -> tuple[float, float]:
    """What a and b are multiplied by: (sin((1-t)w), sin(tw)) / sin(w) with w the angle between them; of both, block by
    block."""
    dots = torch.zeros(3, dtype=torch.float64)
    for a, b in blocks:
        x, y = a.flatten().double(), b.flatten().double()
        dots += torch.stack([x @ y, x @ x, y @ y])
    ab, aa, bb = dots.tolist()
    cosine = ab / math.sqrt(aa * bb) if aa * bb > 0 else 1.0
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if math.sin(angle) < 1e-4:
        return 1 - t, t
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _open(base: Model) -> tuple[Checkpoint, dict[str, TensorReader]]:
    checkpoint = Checkpoint.open(base)
    for component in COMPONENTS:
        if CONFIG_KEY in checkpoint.config(component):
            raise BadInput(f"{checkpoint.name} is quantised: merge into the original, then quantise the result")
    readers = {component: TensorReader(checkpoint.root / component) for component in COMPONENTS}
    glyphs = readers["text_encoder"].infos
    if "shared.weight" in glyphs:  # some programs write it twice
        glyphs.pop(SECOND_NAME, None)
    return checkpoint, readers


def _like(
    checkpoint: Checkpoint,
    readers: Mapping[str, TensorReader],
    other: Model,
    components: Sequence[str],
    target: str | Path,
) -> dict[str, TensorReader]:
    """The other checkpoint's readers, if its tensors are those of the base; what is written is not to lie in it."""
    opened, found = _open(other)
    require_new(target, opened)
    for component in components:
        if component not in COMPONENTS:
            raise UnknownName.of("component", component, COMPONENTS)
        mine, theirs = ({k: i.shape for k, i in r[component].infos.items()} for r in (readers, found))
        if mine != theirs:
            differ = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
            raise BadInput(
                f"{opened.name} and {checkpoint.name} have different tensors in {component} "
                f"({len(differ)}, first: {differ[0]}): only versions of one model can be mixed"
            )
    return found


def _everywhere(
    readers: Mapping[str, TensorReader], components: Sequence[str], change: Callable[[str, str], Change]
) -> dict[str, dict[str, Change]]:
    """A change for every floating-point tensor of the components."""
    return {
        component: {name: change(component, name) for name, i in readers[component].infos.items() if i.dtype in FLOATS}
        for component in components
    }


def _name(model: Model) -> str:
    return model.name if isinstance(model, Checkpoint) else str(model)


def _write(
    checkpoint: Checkpoint,
    readers: Mapping[str, TensorReader],
    target: str | Path,
    changes: Mapping[str, Mapping[str, Change]],
    progress: Progress | None,
    did: str,
    settings: Mapping[str, Any],
) -> MergeResult:
    needed = sum(reader.nbytes() for reader in readers.values())
    told = Bytes(progress, needed)
    counts, amounts = {}, {}
    with rewritten(checkpoint, target, needed) as folder:
        for component, reader in readers.items():
            mine = changes.get(component, {})
            if not mine:
                pass_through(folder, component, reader, told.part)
                continue
            sums = torch.zeros(2, dtype=torch.float64)

            def write(writer: TensorWriter, reader: Any = reader, mine: Any = mine, sums: Any = sums) -> None:
                for name in reader.infos:
                    own = reader.pieces(name) if name not in mine else _changed(reader, name, mine[name], sums)
                    writer.write(name, own)

            plan = {name: TensorSpec(info.dtype, info.shape) for name, info in reader.infos.items()}
            write_component(folder, component, plan, write, reader.metadata, told.part)
            counts[component] = len(mine)
            amounts[component] = float((sums[0] / sums[1].clamp_min(1e-30)).sqrt())
        record(folder, did, checkpoint, **settings)
    return MergeResult(expanded(target), counts, amounts)


def _changed(reader: TensorReader, name: str, change: Change, sums: torch.Tensor) -> Iterator[memoryview]:
    """The tensor's new bytes, some rows at a time; adds (squared change, squared values) to `sums`."""
    for part in row_blocks(reader.infos[name].shape, _BLOCK):
        own = reader.rows(name, part)
        result = change(own, part).to(own.dtype)
        if not bool(result.sum(dtype=torch.float64).isfinite()):
            raise CheckpointError(f"{name} became NaN or infinite: are these versions of one model?")
        x, y = own.float(), result.float()
        sums += torch.stack([(y - x).square().sum(dtype=torch.float64), x.square().sum(dtype=torch.float64)])
        yield as_bytes(result)
