"""Weight-only quantisation of a checkpoint folder: matrices in 8 or 4 bits with scales, everything else as it is.

One tensor is in memory at a time. The result is a checkpoint like any other, which `from_pretrained` loads on every
device; what lies packed in it is unpacked for each product. See glmimg.packed_linear for the format and
glmimg.weights_tools.packing_plan for what is packed.

Letters: N outputs, K inputs of a layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glmimg.atomic_write import expanded
from glmimg.checkpoint import COMPONENTS, Checkpoint
from glmimg.errors import BadInput, CheckpointError, UnknownName
from glmimg.packed_format import BITS, CONFIG_KEY, FORMAT, GROUP, PACKED, SCALE, group_size, packed_shapes
from glmimg.packed_linear import dequantize, quantize
from glmimg.torch_state import plain_torch
from glmimg.weights_tools.packing_plan import PACKABLE, REST, Unit, choose, packed_nbytes, require_possible, units
from glmimg.weights_tools.rewrite import Bytes, pass_through, record, require_new, rewritten, write_component
from glmimg.weights_tools.streaming import Progress, TensorReader, TensorSpec, TensorWriter, row_blocks

__all__ = ["ComponentReport", "QuantizeResult", "quantize_checkpoint", "weight_errors"]

# Gives each unit's error in each of the bits that it may get, by its key.
Errors = Callable[[Sequence[Unit], int], Mapping[str, Mapping[int, float]]]
SAMPLE_ROWS = 256  # rows of a matrix, evenly spread, from which its sensitivity is measured


@dataclass(frozen=True)
class ComponentReport:
    """Bytes before and after, matrices by bits, and the relative error of the packed ones, sqrt(sum d^2 / sum w^2)."""

    before: int
    after: int
    matrices: dict[int, int]
    error: float | None


@dataclass(frozen=True)
class QuantizeResult:
    """What was written, and what it cost in size and weight error."""

    path: Path
    components: dict[str, ComponentReport]

    @property
    def before(self) -> int:
        return sum(part.before for part in self.components.values())

    @property
    def after(self) -> int:
        return sum(part.after for part in self.components.values())

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "path": str(self.path),
            "bytes_before": self.before,
            "bytes_after": self.after,
            "components": {
                name: {
                    "bytes_before": part.before,
                    "bytes_after": part.after,
                    "matrices": {f"{bits}_bits": count for bits, count in sorted(part.matrices.items())},
                    "relative_error": part.error,
                }
                for name, part in self.components.items()
            },
        }


@plain_torch()
def quantize_checkpoint(
    source: str | Path | Checkpoint,
    target: str | Path,
    bits: int | None = None,
    *,
    components: Sequence[str] | None = None,
    group: int = GROUP,
    budget: int | None = None,
    errors: Errors | None = None,
    rest: int | None = None,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Writes `source`, quantised, to the folder `target`, which must not exist.

    `bits`: 8 (the default) or 4 for every packable matrix; or `budget`: the bytes that all weights together may take,
    for which each matrix gets 16, 8 or 4 bits so that the sum of errors is least. `errors(units, group)` measures them,
    such as glmimg.weights_tools.sensitivity.output_errors does; by default relative squared errors of the weights are
    taken, on SAMPLE_ROWS rows of each matrix, which says nothing of what a picture minds. `components`: by default all
    that have packable matrices. `group`: columns that share a scale in 4 bits. `rest` packs in that many bits what is
    kept otherwise: embeddings, projectors, adaptive layer norms, heads, and in 8 bits the VAE's convolutions; for a
    budget, in no fewer. `progress(done, total)` is told the bytes measured, for a budget, then those written.
    """
    if bits is not None and budget is not None:
        raise BadInput("bits and budget exclude each other: a budget chooses the bits itself")
    if errors is not None and budget is None:
        raise BadInput("errors are for a budget: without one every matrix gets the same bits")
    if bits not in (None, *BITS):
        raise BadInput(f"bits {bits}: choose from {', '.join(map(str, BITS))}")
    if rest not in (None, *BITS):
        raise BadInput(f"rest {rest}: choose from {', '.join(map(str, BITS))}")
    if rest == 4 and budget is None and bits != 4:
        raise BadInput("rest 4 is for bits 4: what is sensitive gets no fewer bits than all else")
    possible = PACKABLE if rest is None else REST
    chosen = tuple(possible) if components is None else tuple(dict.fromkeys(components))
    for name in chosen:
        if name not in possible:
            raise UnknownName.of("component", name, possible)
    group_size(GROUP, group)  # refuses what is no size
    checkpoint = Checkpoint.open(source)
    require_new(target, checkpoint)  # measuring takes long
    for name in COMPONENTS:
        if CONFIG_KEY in checkpoint.config(name):
            raise BadInput(f"{checkpoint.name} is quantised already ({name}): start from the original checkpoint")
    readers = {name: TensorReader(checkpoint.root / name) for name in COMPONENTS}
    found = [
        unit
        for name in chosen
        for unit in units(name, _specs(readers[name]), low=4 if bits is None and budget else bits or 8, rest=rest)
    ]
    if not found:
        raise BadInput(f"{checkpoint.name} has nothing to pack in {', '.join(chosen) or 'no component'}")
    if budget is None:
        by_unit = {unit.key: min(unit.allowed) for unit in found}
    else:
        fixed = sum(reader.nbytes() for reader in readers.values()) - sum(unit.kept for unit in found)
        require_possible(found, budget, group, fixed)
        measured = _sensitivities(readers, found, group, progress) if errors is None else errors(found, group)
        by_unit = choose(found, measured, budget, group, fixed).bits
    bits_of = {(u.component, layer): by_unit[u.key] for u in found for layer in u.layers if by_unit[u.key] != 16}
    needed = sum(r.nbytes() for r in readers.values()) - sum(
        unit.kept - packed_nbytes(unit, by_unit[unit.key], group) for unit in found
    )
    told = Bytes(progress, needed)
    with rewritten(checkpoint, target, needed) as folder:
        reports = {
            name: _write(
                folder, name, readers[name], {k[1]: v for k, v in bits_of.items() if k[0] == name}, group, told
            )
            for name in COMPONENTS
        }
        record(
            folder,
            "quantize",
            checkpoint,
            bits=bits if budget is None else None,
            budget=budget,
            sensitivity=None if budget is None else "weights" if errors is None else "outputs",
            group=group,
            components=list(chosen),
            rest=rest,
        )
    return QuantizeResult(expanded(target), reports)


def weight_errors(weight_NK: torch.Tensor, group: int, rows: int = SAMPLE_ROWS) -> dict[int, float]:
    """Relative squared error of the weight in 8 and in 4 bits, from at most `rows` of its rows."""
    sample = weight_NK[:: max(1, -(-weight_NK.shape[0] // rows))].flatten(1).float()
    total = sample.square().sum().clamp_min(1e-30)
    found = {}
    for bits in BITS:
        if bits == 8 or sample.shape[1] % 2 == 0:
            packed, scale = quantize(sample.to(weight_NK.dtype), bits, group)
            found[bits] = float((dequantize(packed, scale, torch.float32) - sample).square().sum() / total)
    return found


def _sensitivities(
    readers: Mapping[str, TensorReader], found: Sequence[Unit], group: int, progress: Progress | None
) -> dict[str, dict[int, float]]:
    result: dict[str, dict[int, float]] = {}
    told = Bytes(progress, sum(unit.kept for unit in found))
    for unit in found:
        each = [weight_errors(readers[unit.component].tensor(f"{name}.weight"), group) for name in unit.layers]
        result[unit.key] = {bits: sum(errors[bits] for errors in each) for bits in unit.allowed}
        told.part(unit.kept, unit.kept)
    return result


def _specs(reader: TensorReader) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (info.dtype, info.shape) for name, info in reader.infos.items()}


def _write(
    folder: Path, component: str, reader: TensorReader, bits: Mapping[str, int], group: int, told: Bytes
) -> ComponentReport:
    before = reader.nbytes()
    if not bits:
        pass_through(folder, component, reader, told.part)
        return ComponentReport(before, before, {}, None)
    plan: dict[str, TensorSpec] = {}
    for name, info in reader.infos.items():
        layer = name.removesuffix(".weight")
        if layer == name or layer not in bits:
            plan[name] = TensorSpec(info.dtype, info.shape)
            continue
        packed_shape, scale_shape = packed_shapes(info.shape, bits[layer], group)
        plan[layer + PACKED] = TensorSpec("I8" if bits[layer] == 8 else "U8", packed_shape)
        plan[layer + SCALE] = TensorSpec("F32" if info.dtype in ("F32", "F64") else "BF16", scale_shape)
    sums = torch.zeros(2, dtype=torch.float64)

    def write(writer: TensorWriter) -> None:
        for name in reader.infos:
            layer = name.removesuffix(".weight")
            if layer == name or layer not in bits:
                writer.write(name, reader.pieces(name))
                continue
            weight_NK = reader.tensor(name)
            if not bool(weight_NK.sum(dtype=torch.float64).isfinite()):
                raise CheckpointError(f"{component}: {name} holds NaN or infinity: use an earlier checkpoint")
            packed, scale = quantize(weight_NK, bits[layer], group)
            for part in _differences(weight_NK, packed, scale):
                sums.add_(part)
            writer.write(layer + PACKED, packed)
            writer.write(layer + SCALE, scale)

    write_component(folder, component, plan, write, reader.metadata, told.part)
    counts = {value: list(bits.values()).count(value) for value in sorted(set(bits.values()), reverse=True)}
    path = folder / component / "config.json"
    config = json.loads(path.read_bytes())  # which may begin with a mark of its encoding
    config[CONFIG_KEY] = {
        "format": FORMAT,
        "matrices": {f"{value}_bits": count for value, count in counts.items()},
        "group_size": group,
    }
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    error = float((sums[0] / sums[1].clamp_min(1e-30)).sqrt())
    return ComponentReport(before, sum(spec.nbytes for spec in plan.values()), counts, error)


def _differences(weight_NK: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
    """(squared error, squared weight) of each block of rows: whole matrices in float32 would take too much memory."""
    found = []
    for rows in row_blocks(tuple(weight_NK.shape), 1 << 22):
        part = weight_NK[rows].float()
        error = (dequantize(packed[rows], scale[rows], torch.float32) - part).square().sum(dtype=torch.float64)
        found.append(torch.stack([error, part.square().sum(dtype=torch.float64)]))
    return found
