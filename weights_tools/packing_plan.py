"""Which weights of a checkpoint are packed, and in how many bits. Names and shapes are enough: no torch here.

Kept as they are, as published quantised versions keep them: embeddings, projectors, norms, adaptive layer norm, time
embedding, both heads, convolutions, biases. Most of what is large among them (`REST`) is packed on request. The vision
tower never gets less than 8 bits, since the ids of a reference picture are picked by nearest neighbour, nor does the
VAE, since convolutions know no other. Projections that share their input share their bits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from glmimg.errors import BadInput
from glmimg.packed_format import packed_shapes

__all__ = ["EIGHT_ONLY", "PACKABLE", "REST", "Choice", "Unit", "choose", "packed_nbytes", "require_possible", "units"]

# Component -> the linear layers that are multiplied often enough, and are robust enough, to be packed.
PACKABLE = {
    "vision_language_encoder": r"model\.(?:language_model\.layers|visual\.blocks)\.\d+\..*",
    "text_encoder": r"encoder\.block\.\d+\..*(?<!relative_attention_bias)",
    "transformer": r"transformer_blocks\.\d+\.(?:attn1|ff)\..*",
}
# Component -> what is otherwise kept: sensitive or small, but together half of a small model's bytes and 2.5 GB of the
# published one's. The vision tower's first layer, positions and codebook stay, so that pictures get the same ids.
REST = {
    "vision_language_encoder": r"lm_head|model\.language_model\.embed_tokens",
    "text_encoder": r"shared",
    "transformer": r"transformer_blocks\.\d+\.norm1\.linear|prior_token_embedding|(?:prior|glyph|image)_projector\..*"
    r"|time_condition_embed\..*|norm_out\.linear|proj_out",
    "vae": r"(?:encoder|decoder)\..*|(?:post_)?quant_conv",
}
# Single weights of these are thirty times larger than the others: in 8 bits they alone take 20 dB off a picture, so
# they are packed only with a rest of 4 bits, where much else is lost too.
_UPSAMPLERS = re.compile(r"decoder\.up_blocks\.\d+\.upsamplers\..*")
EIGHT_ONLY = re.compile(r"model\.visual\..*")
_FUSED = re.compile(r"\b(?:[qkv]_proj|to_[qkv]|SelfAttention\.[qkv])$")
_SCALE_BYTES = {"F32": 4, "F64": 4}  # of a scale for a weight of that dtype; 2 for any other
_DTYPE_BYTES = {"F32": 4, "F64": 8}


class Unit(NamedTuple):
    """Weights that get the same bits. `layers`: name without ".weight" -> (N, K), K of a convolution the product of its
    input channels and kernel; `kept` bytes as they are stored."""

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
    component: str,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    *,
    low: int = 4,
    rest: int | None = None,
) -> list[Unit]:
    """The packable weights among `tensors` (name -> dtype as safetensors names it, shape), in their order.

    `low` is the least number of bits that any may get, `rest` that of what is otherwise kept (None: it is kept).
    """
    usual = re.compile(PACKABLE.get(component, "(?!)"))
    others = re.compile("(?!)" if rest is None else REST.get(component, "(?!)"))
    grouped: dict[str, dict[str, tuple[int, int]]] = {}
    dtypes: dict[str, str] = {}
    for name, (dtype, shape) in tensors.items():
        layer = name.removesuffix(".weight")
        if (
            layer == name
            or len(shape) not in ((2, 4) if component == "vae" else (2,))
            or dtype not in ("F64", "F32", "BF16", "F16")
            or not (usual.fullmatch(layer) or others.fullmatch(layer))
            or (component == "vae" and rest == 8 and _UPSAMPLERS.fullmatch(layer))
        ):
            continue
        key = f"{component}/{_FUSED.sub('qkv', layer)}"
        grouped.setdefault(key, {})[layer] = (shape[0], math.prod(shape[1:]))
        dtypes[key] = dtype
    found = []
    for key, layers in grouped.items():
        name = next(iter(layers))
        even = all(columns % 2 == 0 for _, columns in layers.values())
        least = low if usual.fullmatch(name) else rest
        allowed = (8,) if least == 8 or not even or component == "vae" or EIGHT_ONLY.fullmatch(name) else (8, 4)
        kept = sum(rows * columns for rows, columns in layers.values()) * _DTYPE_BYTES.get(dtypes[key], 2)
        found.append(Unit(key, component, dtypes[key], layers, allowed, kept))
    return found


def packed_nbytes(unit: Unit, bits: int, group: int) -> int:
    """Bytes of a unit's packed weights and scales in that many bits (16: as stored); `group` columns share a scale."""
    if bits == 16:
        return unit.kept
    total = 0
    for shape in unit.layers.values():
        packed, scale = map(math.prod, packed_shapes(shape, bits, group))
        total += packed + scale * _SCALE_BYTES.get(unit.dtype, 2)
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
