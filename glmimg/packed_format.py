"""How packed weights are named and laid out in files; see glmimg.packed_linear for what they mean. No torch here."""

from __future__ import annotations

import math
from collections.abc import Sequence

from glmimg.errors import BadInput

__all__ = [
    "BITS",
    "CONFIG_KEY",
    "FORMAT",
    "GROUP",
    "KERNEL_GROUPS",
    "PACKED",
    "SCALE",
    "group_size",
    "packed_shapes",
    "parameters",
]

BITS = (8, 4)
GROUP = 64  # columns that share a scale in 4 bits, unless asked otherwise
KERNEL_GROUPS = (256, 128, 64, 32)  # those of torch's 4-bit kernel for processors
# The entry of a component's config.json, and what its "format" says.
CONFIG_KEY = "quantization"
FORMAT = "glmimg-packed-1"
# What the names of a packed weight's two tensors end with, where ".weight" was.
PACKED, SCALE = ".weight_packed", ".weight_scale"


def group_size(columns: int, wanted: int = GROUP) -> int:
    """The most columns up to `wanted` that may share a scale in rows of `columns`.

    256, 128, 64 or 32 where they fit, since kernels know no others; else the largest divisor.
    """
    if wanted < 1:
        raise BadInput(f"group size {wanted}: give 1 or more, such as {GROUP}")
    fitting = [size for size in KERNEL_GROUPS if size <= wanted and columns % size == 0]
    return fitting[0] if fitting else max(size for size in range(1, min(wanted, columns) + 1) if columns % size == 0)


def packed_shapes(shape: Sequence[int], bits: int, group: int = GROUP) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the tensors that a weight of that shape is packed in, and of its scales."""
    rows, columns = shape[:2]
    if bits == 8:
        return tuple(shape), (rows,)
    return (rows, columns // 2), (rows, columns // group_size(columns, group))


def parameters(name: str, dtype: str, shape: Sequence[int]) -> int:
    """How many weights a tensor stands for: two in a byte where four bits are packed, none for scales."""
    if name.endswith(SCALE):
        return 0
    return math.prod(shape) * (2 if name.endswith(PACKED) and dtype == "U8" else 1)
