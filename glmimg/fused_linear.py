"""Linear layers of the decoder at inference: three projections as one product, the activation inside the first of two.

On CPUs the products go through oneDNN, whose fp32 takes half as long as torch's usual one on some processors, and the
weights of small models are laid out once as it wants them (benchmarks/products.py). Where adapters, quantisation,
gradients, autocast or a compiler are at work, the modules themselves are called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["COPY_BELOW", "Products", "fuse_qkv", "lay_out", "product", "runs"]

# Laid out weights are a second copy. Up to here nobody misses the memory; larger models gain less by it.
COPY_BELOW = 256 << 20


def fuse_qkv(model: Any) -> None:
    """Lay the weights of each attention's three projections side by side in memory, so that one product does all.

    The parameters stay where they are in the module and its state dict, as views; optimisers, saving and adapters
    work as before. Moving the model to another device undoes it. Attentions whose projections are not plain linear
    layers (adapters, quantised weights) are left alone.
    """
    for block in model.transformer_blocks:
        linears = _projections(block.attn1)
        if linears is not None:
            for name in ("weight", "bias"):
                joined = torch.cat([getattr(linear, name).data for linear in linears])
                for linear, piece in zip(linears, joined.chunk(3), strict=True):
                    getattr(linear, name).data = piece


@dataclass(frozen=True)
class _LaidOut:
    """The copy of some weights, with what tells whether these are still the same."""

    weights: tuple[Tensor, ...]  # held: no other tensor gets their ids
    state: tuple[tuple[int, int], ...]
    copy: Tensor


class Products:
    """The matrix products of one decoder."""

    def __init__(self) -> None:
        self._laid_out: dict[int, _LaidOut] = {}

    def lay_out(self, model: Any) -> None:
        """Copy the weights of the blocks as oneDNN wants them, if they are small. To be called again when layers were
        replaced; what was changed in place is noticed."""
        self._laid_out.clear()
        blocks = model.transformer_blocks
        size = sum(t.numel() * t.element_size() for t in [*blocks.parameters(), *blocks.buffers()])  # packed ones too
        if size > COPY_BELOW:
            return
        for block in blocks:
            found = [[linear] for linear in (block.norm1.linear, block.attn1.to_out[0], block.ff.net[2])]
            found.append([block.ff.net[0].proj])
            projections = _projections(block.attn1)
            for linears in [*found, *([projections] if projections else [])]:
                weight = _joined(linears, "weight")
                if weight is None or not all(_plain(one) and runs(one.weight) for one in linears):
                    continue
                parts = tuple(linear.weight for linear in linears)
                self._laid_out[id(parts[0])] = _LaidOut(parts, _state(parts), lay_out(weight))

    def linear(self, linear: Any, x: Tensor) -> Tensor:
        """`linear(x)`."""
        if not (_plain(linear) and _fusing(x, linear.weight)):
            return linear(x)
        return self._product([linear], linear.weight, linear.bias, x)

    def qkv(self, attention: Any, x_BSD: Tensor) -> Tensor | None:
        """(B, S, 3D) of projections that `fuse_qkv` has joined, else None."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():  # gradients need the separate ones; a compiler
            return None  # sees no addresses, and fuses by itself
        linears = _projections(attention)
        if linears is None:
            return None
        weight, bias = _joined(linears, "weight"), _joined(linears, "bias")
        if weight is None or bias is None:
            return None
        if not _fusing(x_BSD, weight):
            return F.linear(x_BSD, weight, bias)
        return self._product(linears, weight, bias, x_BSD)

    def feed_forward(self, ff: Any, x_BSD: Tensor) -> Tensor:
        """`ff(x)`; on a CPU the activation rides in the first product: alone it costs a quarter of that product."""
        up = ff.net[0].proj
        if not (_plain(up) and _fusing(x_BSD, up.weight)):
            return ff(x_BSD)
        return self.linear(ff.net[2], self._product([up], up.weight, up.bias, x_BSD, "gelu", "tanh"))

    def _product(
        self, linears: Sequence[Any], weight: Tensor, bias: Tensor | None, x: Tensor, *activation: str
    ) -> Tensor:
        found = self._laid_out.get(id(linears[0].weight))
        if found is not None and found.state == _state([linear.weight for linear in linears]):
            weight = found.copy
        name, kind = activation or ("none", "")
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], kind)


def lay_out(weight_NK: Tensor) -> Tensor:
    """A copy for `product`, where `runs` says so (benchmarks/products.py --rows 8)."""
    return torch.ops.mkldnn._reorder_linear_weight(weight_NK)


def product(x_RK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`F.linear` without gradients; the weight may be transposed, or laid out."""
    if weight_NK.layout == torch.strided and not _fusing(x_RK, weight_NK):
        return F.linear(x_RK, weight_NK, bias_N)
    return torch.ops.mkldnn._linear_pointwise(x_RK, weight_NK, bias_N, "none", [], "")


def _state(weights: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    # what was made in inference mode counts no changes
    return tuple((weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights)


def _plain(linear: Any) -> bool:
    return type(linear) is nn.Linear and type(linear.weight) is nn.Parameter


def _projections(attention: Any) -> list[Any] | None:
    linears = [attention.to_q, attention.to_k, attention.to_v]
    return linears if all(_plain(linear) and linear.bias is not None for linear in linears) else None


def _joined(linears: Sequence[Any], name: str) -> Tensor | None:
    """The view over adjacent weights or biases, or None."""
    parts = [getattr(linear, name) for linear in linears]
    first = parts[0]
    step = first.numel() * first.element_size()
    for before, after in zip(parts, parts[1:], strict=False):
        if after.data_ptr() - before.data_ptr() != step:
            return None
        if after.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
    return first.detach().as_strided((len(parts) * first.shape[0], *first.shape[1:]), first.stride())


def _fusing(x: Tensor, weight: Tensor) -> bool:
    """Whether the product is one for oneDNN."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.dtype != weight.dtype or not x.is_cpu:
        return False
    return runs(weight) and not torch.is_autocast_enabled(x.device.type)


def runs(weight: Tensor) -> bool:
    """Whether oneDNN's products run on such a weight's device and dtype here."""
    return weight.is_cpu and _has_product(weight.dtype)


@cache
def _has_product(dtype: torch.dtype) -> bool:
    """Whether oneDNN has the fused product (the one torch.compile uses) for this dtype on this processor."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
