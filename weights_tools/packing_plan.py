"""Which weights of a checkpoint are packed, and in how many bits. Names and shapes are enough: no torch here.

Kept as they are, as published quantised versions keep them: embeddings, projectors, norms, adaptive layer norm, time
embedding, both heads, convolutions, biases. The vision tower never gets less than 8 bits, since the ids of a reference
picture are picked by nearest neighbour. Projections that share their input share their bits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from glmimg.errors import BadInput
from glmimg.packed_format import group_size

__all__ = ["PACKABLE", "Choice", "Unit", "choose", "packed_nbytes", "require_possible", "units"]

# Component -> the linear layers that are multiplied often enough, and are robust enough, to be packed.
PACKABLE = {
    "vision_language_encoder": r"model\.(?:language_model\.layers|visual\.blocks)\.\d+\..*",
    "text_encoder": r"encoder\.block\.\d+\..*(?<!relative_attention_bias)",
    "transformer": r"transformer_blocks\.\d+\.(?:attn1|ff)\..*",
}
# Adaptive layer norm: a tenth of the published decoder. Sensitive, so on request only, and in 8 bits.
ADALN = r"transformer_blocks\.\d+\.norm1\.linear"
_EIGHT_ONLY = re.compile(rf"model\.visual\..*|{ADALN}")
_FUSED = re.compile(r"\b(?:[qkv]_proj|to_[qkv]|SelfAttention\.[qkv])$")
_SCALE_BYTES = {"F32": 4, "F64": 4}  # of a scale for a weight of that dtype; 2 for any other
_DTYPE_BYTES = {"F32": 4, "F64": 8}


class Unit(NamedTuple):
    """Weights that get the same bits. `layers`: name without ".weight" -> (N, K); `kept` bytes as they are stored."""

    key: str
    component: str
    dtype: str
    layers: dict[str, tuple[int, int]]
    allowed: tuple[int, ...]
    kept: int


class Choice(NamedTuple):
    """Bits for each unit's key (16 means kept), the bytes of all units together, and the sum of their errors."""

    bits: dict[str, int]
    nbytes: int
    error: float


def units(
    component: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]], *, adaln: bool = False, low: int = 4
) -> list[Unit]:
    """The packable weights among `tensors` (name -> dtype as safetensors names it, shape), in their order.

    `low` is the least number of bits that any may get.
    """
    pattern = re.compile(PACKABLE.get(component, "(?!)") + (rf"|{ADALN}" if adaln else ""))
    grouped: dict[str, dict[str, tuple[int, int]]] = {}
    dtypes: dict[str, str] = {}
    for name, (dtype, shape) in tensors.items():
        layer = name.removesuffix(".weight")
        if (
            layer == name
            or len(shape) != 2
            or dtype not in ("F64", "F32", "BF16", "F16")
            or not pattern.fullmatch(layer)
        ):
            continue
        key = f"{component}/{_FUSED.sub('qkv', layer)}"
        grouped.setdefault(key, {})[layer] = (shape[0], shape[1])
        dtypes[key] = dtype
    found = []
    for key, layers in grouped.items():
        even = all(columns % 2 == 0 for _, columns in layers.values())
        allowed = (8,) if low == 8 or not even or _EIGHT_ONLY.fullmatch(next(iter(layers))) else (8, 4)
        kept = sum(rows * columns for rows, columns in layers.values()) * _DTYPE_BYTES.get(dtypes[key], 2)
        found.append(Unit(key, component, dtypes[key], layers, allowed, kept))
    return found


def packed_nbytes(unit: Unit, bits: int, group: int) -> int:
    """Bytes of a unit's packed weights and scales in that many bits (16: as stored); `group` columns share a scale."""
    if bits == 16:
        return unit.kept
    total = 0
    for rows, columns in unit.layers.values():
        scales = rows if bits == 8 else rows * (columns // group_size(columns, group))
        total += rows * columns * bits // 8 + scales * _SCALE_BYTES.get(unit.dtype, 2)
    return total


def require_possible(found: Iterable[Unit], limit: int, group: int, fixed: int) -> None:
    """BadInput if even the fewest bits, with `fixed` other bytes, take more than `limit` bytes."""
    least = fixed + sum(min(packed_nbytes(unit, b, group) for b in (16, *unit.allowed)) for unit in found)
    if least > limit:
        raise BadInput(f"a budget of {limit:,} bytes cannot be met: the smallest packing takes {least:,}")


def choose(
    found: Iterable[Unit], errors: Mapping[str, Mapping[int, float]], limit: int, group: int, fixed: int
) -> Choice:
    """The bits that keep `fixed` other bytes and all units within `limit` bytes at the least sum of errors.

    `errors[key][bits]` is what a unit costs; kept weights cost nothing. From everything kept, the step with the least
    added error for each byte saved is taken until the rest fits: the best choice up to the last step. BadInput if even
    the fewest bits do not fit.
    """
    known = list(found)
    bits = {unit.key: 16 for unit in known}
    sizes = {unit.key: {b: packed_nbytes(unit, b, group) for b in (16, *unit.allowed)} for unit in known}
    total = fixed + sum(size[16] for size in sizes.values())
    require_possible(known, limit, group, fixed)
    while total > limit:
        steps = []
        for unit in known:
            size, error, now = sizes[unit.key], errors[unit.key], bits[unit.key]
            for to in unit.allowed:
                saved = size[now] - size[to]
                if saved > 0:
                    steps.append(((error[to] - error.get(now, 0.0)) / saved, unit.key, to))
        _, key, to = min(steps)
        total -= sizes[key][bits[key]] - sizes[key][to]
        bits[key] = to
    spent = sum(errors[key][b] for key, b in bits.items() if b != 16)
    return Choice(bits, total, spent)
