"""Layers whose weights lie in eight or four bits with scales, and are made whole for each product.

8 bits: int8, in the weight's own shape, and one scale a row; convolutions know no other. 4 bits: two columns in a byte,
uint8 (N, K/2), column k low and column k + K/2 high, with 8 added, and one scale for each group of columns, (N,
groups). A weight is its integer times its scale.

Letters: N outputs, K inputs, G columns of a group, R rows of input.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glmimg.errors import BadInput, CheckpointError
from glmimg.fused_linear import product
from glmimg.packed_format import (
    BITS,
    CONFIG_KEY,
    FORMAT,
    GROUP,
    KERNEL_GROUPS,
    PACKED,
    SCALE,
    group_size,
    packed_shapes,
)

__all__ = [
    "Packed",
    "PackedConv2d",
    "PackedEmbedding",
    "PackedLinear",
    "dequantize",
    "joined",
    "packed_product",
    "packed_rows",
    "quantize",
    "ready",
    "use_packed",
]

_ALIGNED = 16  # bytes that the kernel for 8 bits needs addresses to be multiples of
_FEW_ROWS = 16  # up to here a processor's own kernels for packed weights beat unpacking them (measured: 8 to 32)
_MANY = 1 << 20  # numbers of a weight: in float32 the kernel takes as long as unpacking, but needs no memory for it
_KERNEL_ROWS = 16  # torch's 4-bit kernel for processors wants N a multiple of it
_TILES = 8  # sixteens of columns in a tile of CUDA's; K must be a multiple of all of them
_BLOCK = 1 << 22  # weights quantised at a time: bounds the memory that their errors take
# What the extreme of a group is multiplied by before it is given the last level: cutting it off may pay for the rest.
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)


@torch.no_grad()
def quantize(weight_NK: Tensor, bits: int, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """The packed weight and its scales, in float32 for a float32 weight and in bfloat16 for any other. In 8 bits the
    weight may have more dimensions than two.

    8 bits: levels -127 to 127. 4 bits: levels -8 to 7; of a few scales for each group, whose sign is such that the
    extreme gets level -8, the one with the least squared error is taken.
    """
    if bits not in BITS:
        raise BadInput(f"bits {bits}: choose from {', '.join(map(str, BITS))}")
    shape = weight_NK.shape
    if len(shape) < 2 or (bits == 4 and (len(shape) > 2 or shape[1] % 2)):
        raise BadInput(f"a weight of shape {list(shape)} cannot be packed in {bits} bits")
    weight_NK = weight_NK.flatten(1)
    rows = max(1, _BLOCK // weight_NK.shape[1])
    blocks = [_quantize_rows(block.float(), bits, group, _scale_dtype(weight_NK)) for block in weight_NK.split(rows)]
    packed, scale = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return packed.view(shape) if bits == 8 else packed, scale


def _scale_dtype(weight: Tensor) -> torch.dtype:
    return torch.float32 if weight.dtype in (torch.float32, torch.float64) else torch.bfloat16


def _quantize_rows(weight: Tensor, bits: int, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if bits == 8:
        # The integers are found with the scale as it is stored, so that rounding the scale adds no error of its own.
        scale_N = (weight.abs().amax(1) / 127).to(dtype)
        divisor = scale_N.float().masked_fill(scale_N == 0, 1.0)
        return (weight / divisor[:, None]).round().clamp(-127, 127).to(torch.int8), scale_N
    groups = weight.unflatten(1, (-1, group_size(weight.shape[1], group)))
    extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    best = torch.full_like(extreme, torch.inf)
    scale, levels = torch.zeros_like(extreme), torch.zeros_like(groups)
    for shrink in _SHRINK:
        candidate = (extreme * (-shrink / 8)).to(dtype).float()
        rounded = (groups / candidate.masked_fill(candidate == 0, 1.0)).round().clamp(-8, 7)
        error = (rounded * candidate - groups).square().sum(2, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scale, levels = torch.where(better, candidate, scale), torch.where(better, rounded, levels)
    low, high = (levels + 8).to(torch.uint8).flatten(1).chunk(2, 1)
    return low | (high << 4), scale[..., 0].to(dtype)


def _levels(packed: Tensor) -> Tensor:
    """The integers of four bits, uint8 (N, K) from 0 to 15."""
    return torch.cat([packed & 15, packed >> 4], 1)


def dequantize(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight, (N, K) or of more dimensions, in `dtype`."""
    if packed.dtype == torch.int8:
        return packed.to(dtype) * scale.to(dtype).view(-1, *[1] * (packed.dim() - 1))
    groups = _levels(packed).to(dtype).sub_(8).unflatten(1, (scale.shape[1], -1))
    return groups.mul_(scale.to(dtype)[..., None]).flatten(1)


class _Unpacked(torch.autograd.Function):
    """The product with a weight that is made whole again for the backward pass, instead of being kept until then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(packed, scale)
        ctx.dtype = x.dtype
        bias = None if bias is None else bias.to(dtype)
        return F.linear(x.to(dtype), dequantize(packed, scale, dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        packed, scale = ctx.saved_tensors
        return (grad @ dequantize(packed, scale, grad.dtype)).to(ctx.dtype), None, None, None, None


class Packed(nn.Module):
    """Holds a packed weight. `weight` is computed anew each time it is asked for, and cannot be set."""

    weight_packed: Tensor
    weight_scale: Tensor

    def __init__(self, shape: Sequence[int], bits: int, bias: Tensor | None = None) -> None:
        super().__init__()
        self.bits = bits
        packed, scale = packed_shapes(shape, bits)
        self.register_buffer("weight_packed", torch.empty(packed, dtype=torch.int8 if bits == 8 else torch.uint8))
        self.register_buffer("weight_scale", torch.empty(scale))
        self.bias: Any = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        return dequantize(self.weight_packed, self.weight_scale, self.weight_scale.dtype)


class PackedLinear(Packed):
    """Stands where a linear layer stood."""

    def __init__(self, in_features: int, out_features: int, bits: int, bias: Tensor | None = None) -> None:
        super().__init__((out_features, in_features), bits, bias)
        self.in_features, self.out_features = in_features, out_features

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, bias={self.bias is not None}"

    def forward(self, x: Tensor) -> Tensor:
        if self.bits == 8 and not torch.is_grad_enabled():
            y = packed_product(x.reshape(-1, x.shape[-1]), self.weight_packed, self.weight_scale)
            y = y.view(*x.shape[:-1], self.out_features)
            return y if self.bias is None else y.add_(self.bias)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if x.requires_grad and torch.is_grad_enabled():
            return _Unpacked.apply(x, self.weight_packed, self.weight_scale, self.bias, dtype)
        return F.linear(x, dequantize(self.weight_packed, self.weight_scale, dtype), self.bias)


class PackedEmbedding(Packed):
    """Stands where an embedding stood: the rows asked for are gathered packed, then made whole."""

    def __init__(self, num_embeddings: int, embedding_dim: int, bits: int) -> None:
        super().__init__((num_embeddings, embedding_dim), bits)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}"

    def forward(self, ids: Tensor) -> Tensor:
        rows = ids.flatten()
        scale = self.weight_scale[rows]
        return dequantize(self.weight_packed[rows], scale, scale.dtype).view(*ids.shape, self.embedding_dim)


class PackedConv2d(Packed):
    """Stands where a convolution stood, in 8 bits."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv.weight.shape, 8, conv.bias)
        self.in_channels, self.out_channels, self.kernel_size = conv.in_channels, conv.out_channels, conv.kernel_size
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"

    def forward(self, x: Tensor) -> Tensor:
        weight = dequantize(self.weight_packed, self.weight_scale, x.dtype)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


# For loops that call products and no modules. What they keep of a weight is a tuple: a plain one twice, (matrix_KN,
# weight_NK), for single rows and for several; a packed one, (packed, scale); or one in the layout of a processor's
# kernel, (packed, G, scales).


def packed_product(x_RK: Tensor, matrix: Tensor, *rest: Any) -> Tensor:
    """x times the weight that `ready` made: plain, packed, or in a kernel's own layout."""
    if matrix.dtype.is_floating_point:
        single = x_RK.shape[0] == 1 and matrix is not rest[0]
        return torch.mm(x_RK, matrix) if single else product(x_RK, rest[0])
    if len(rest) == 2:
        kernel = torch._weight_int4pack_mm_for_cpu if x_RK.is_cpu else torch._weight_int4pack_mm
        return kernel(x_RK, matrix, *rest)
    if matrix.dtype == torch.int8:
        most = _FEW_ROWS if x_RK.dtype == torch.bfloat16 else int(matrix.numel() > _MANY)
        if x_RK.is_cpu and x_RK.shape[0] <= most and x_RK.dtype == rest[0].dtype and _kernel_takes(matrix):
            x_RK = x_RK.contiguous()
            x_RK = x_RK if x_RK.data_ptr() % 32 == 0 else x_RK.clone()
            return torch._weight_int8pack_mm(x_RK, matrix, rest[0])
        if x_RK.dtype != torch.float16:  # whose range the unscaled sums may leave
            return product(x_RK, matrix.to(x_RK.dtype)).mul_(rest[0])  # scaling the result touches less memory
    return torch.mm(x_RK, dequantize(matrix, rest[0], x_RK.dtype).T)


def packed_rows(x_RK: Tensor, matrix: Tensor, *rest: Any) -> Tensor:
    """The same for rows that must come out as they would alone, however many there are: more than the kernel for eight
    bits takes would be rounded otherwise."""
    if x_RK.shape[0] <= _FEW_ROWS or matrix.dtype != torch.int8 or not x_RK.is_cpu:
        return packed_product(x_RK, matrix, *rest)
    return torch.cat([packed_product(part, matrix, *rest) for part in x_RK.split(_FEW_ROWS)])


def _kernel_takes(matrix: Tensor) -> bool:
    """Whether torch's 8-bit kernel for processors may have it (2.13): it reads sixteen columns at a time, past the end
    where they do not come out even, and dies in bfloat16 unless weights lie at multiples of 16 bytes, and inputs of 32;
    what is mapped from a file may not."""
    return matrix.shape[1] % 16 == 0 and not torch.compiler.is_compiling() and matrix.data_ptr() % _ALIGNED == 0


def ready(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
    """What `packed_product` takes after its input in `dtype`: as stored, or for the device's own 4-bit kernel."""
    scale = scale.to(dtype)
    group = 2 * packed.shape[1] // scale.shape[-1]
    if packed.dtype != torch.uint8 or group not in KERNEL_GROUPS:
        return packed, scale
    if packed.is_cpu and packed.shape[0] % _KERNEL_ROWS == 0:
        return torch._convert_weight_to_int4pack_for_cpu(_levels(packed).int(), 1), group, _with_zeros(scale)
    tiled = packed.shape[0] % 8 == 0 and packed.shape[1] % (8 * _TILES) == 0 and dtype == torch.bfloat16
    if packed.is_cuda and tiled and _cuda_kernel_agrees(packed.device):
        return _tiles(packed), group, _with_zeros(scale)
    return packed, scale


def _with_zeros(scale_NG: Tensor) -> Tensor:
    """Scales as the kernels take them, (groups, N, 2); the second number would be added to the weights."""
    return torch.stack([scale_NG, torch.zeros_like(scale_NG)], -1).transpose(0, 1).contiguous()


def _tiles(packed: Tensor) -> Tensor:
    """In the tiles of CUDA's kernel (torch's own, which torchao uses too), which takes the even columns as high."""
    levels = _levels(packed)
    return torch._convert_weight_to_int4pack(levels[:, ::2] << 4 | levels[:, 1::2], _TILES)


@cache
def _cuda_kernel_agrees(device: torch.device) -> bool:
    """Whether it is there (compute capability 8.0) and computes here what unpacked weights do: its layout is nowhere
    promised."""
    generator = torch.Generator().manual_seed(0)
    packed, scale = quantize(torch.randn(64, 256, generator=generator).bfloat16(), 4)
    x = torch.randn(4, 256, generator=generator).bfloat16().to(device)
    packed, scale = packed.to(device), scale.to(device)
    wanted = torch.mm(x, dequantize(packed, scale, x.dtype).T).float()
    try:
        found = torch._weight_int4pack_mm(x, _tiles(packed), GROUP, _with_zeros(scale)).float()
    except RuntimeError:
        return False
    return bool((found - wanted).norm() < 0.02 * wanted.norm())


def joined(layers: Iterable[nn.Module], place: str) -> tuple[Tensor, Tensor]:
    """One packed weight of several layers with the same input; CheckpointError, naming `place`, if they differ."""
    found = [layer if isinstance(layer, PackedLinear) else None for layer in layers]
    if len({layer and (layer.bits, layer.weight_scale.shape[1:]) for layer in found}) > 1 or found[0] is None:
        raise CheckpointError(f"{place}: its projections have different bits or groups; quantise the checkpoint anew")
    packed, scales = zip(*((layer.weight_packed, layer.weight_scale) for layer in found if layer), strict=True)
    if len(packed) == 1 and packed[0].data_ptr() % _ALIGNED == 0:  # stays mapped from its file; a copy is aligned
        return packed[0], scales[0]
    return torch.cat(packed), torch.cat(scales)


def use_packed(model: nn.Module, infos: Mapping[str, Any], config: Mapping[str, Any], folder: str | Path) -> None:
    """Puts a packed layer, on the meta device, where the files hold a packed weight for a linear layer, an embedding or
    a convolution of `model`.

    `infos` is `WeightFiles.infos`, `config` the component's config.json, whose "quantization" entry must agree with
    it: CheckpointError where it does not.
    """
    entry = config.get(CONFIG_KEY)
    entry = entry if isinstance(entry, dict | None) else {"format": entry}
    names = [name.removesuffix(PACKED) for name in infos if name.endswith(PACKED)]
    if bool(names) != bool(entry) or (entry and entry.get("format") != FORMAT):
        told = f"names the format {entry.get('format')!r}" if entry else "has no quantization entry"
        raise CheckpointError(
            f"{folder}: config.json {told}, and the files hold {len(names)} packed weights; {FORMAT!r} is known here.\n"
            "Its parts come from different checkpoints, or another version wrote it.\n"
            "Quantise the original checkpoint again: glmimg weights quantize SRC DST"
        )
    for name in names:
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            continue  # a part that was left out on purpose; otherwise the check of names finds it
        if not isinstance(layer, nn.Linear | nn.Embedding | nn.Conv2d):
            continue
        packed, scale = infos[name + PACKED], infos.get(name + SCALE)
        if scale is None or packed.dtype not in ("I8", "U8"):
            told = f"has no {SCALE} beside it" if scale is None else f"is stored as {packed.dtype}, not I8 or U8"
            raise CheckpointError(f"{folder}: {name}{PACKED} {told}: quantise or download it again")
        bits = 8 if packed.dtype == "I8" else 4
        rows, columns = layer.weight.shape[:2]
        groups = scale.shape[1] if len(scale.shape) == 2 else 1
        if columns % max(groups, 1) or groups == 0:
            raise CheckpointError(f"{folder}: {name}{SCALE} has {groups} groups for {columns} columns")
        if bits == 4 and isinstance(layer, nn.Conv2d):
            raise CheckpointError(f"{folder}: {name} is a convolution in 4 bits, which no convolution is packed in")
        with torch.device("meta"):
            taken: Packed
            if isinstance(layer, nn.Conv2d):
                taken = PackedConv2d(layer)
            elif isinstance(layer, nn.Embedding):
                taken = PackedEmbedding(rows, columns, bits)
            else:
                taken = PackedLinear(columns, rows, bits, bias=layer.bias)
            if bits == 4:
                taken.weight_scale = torch.empty(rows, groups)
        model.set_submodule(name, taken)
