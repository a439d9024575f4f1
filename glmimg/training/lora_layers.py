"""Linear layers that learn by an adapter, and where they are put.

Letters: N outputs, K inputs, r rank, R rows of input.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glmimg.errors import BadInput
from glmimg.fused_linear import product
from glmimg.lora import Low, row_lengths, target_names

__all__ = ["LoraLinear", "attach", "unchanged"]


class _Adapted(torch.autograd.Function):
    """x W^T + bias + scale (x A^T) B^T with W frozen, in the dtype of W.

    Autograd would make some twenty nodes of it, which on small models take longer than the products.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, a_rK: Tensor, b_Nr: Tensor, scale: float
    ) -> Tensor:
        dtype = weight_NK.dtype
        x_RK, a_rK, b_Nr = x.to(dtype).flatten(0, -2), a_rK.to(dtype), b_Nr.mul(scale).to(dtype)
        y_RN = product(x_RK, weight_NK, bias_N)
        inner_Rr = x_RK @ a_rK.T
        ctx.save_for_backward(x_RK, inner_Rr, weight_NK, a_rK, b_Nr)
        ctx.scale, ctx.shape = scale, x.shape
        return y_RN.addmm_(inner_Rr, b_Nr.T).view(*x.shape[:-1], y_RN.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        x_RK, inner_Rr, weight_NK, a_rK, b_Nr = ctx.saved_tensors
        grad_RN = grad.flatten(0, -2)
        grad_inner_Rr = grad_RN @ b_Nr
        grad_a_rK, grad_b_Nr = (grad_inner_Rr.T @ x_RK).float(), (grad_RN.T @ inner_Rr).float().mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = product(grad_RN, weight_NK.T).addmm_(grad_inner_Rr, a_rK).view(ctx.shape)
        return grad_x, None, None, grad_a_rK, grad_b_Nr, None


class LoraLinear(nn.Module):
    """Stands where a linear layer, plain or packed, stood; that layer no longer learns. Starts as no change at all.

    The matrices are fp32 whatever the layer's dtype; under autocast the products run in its dtype.
    """

    def __init__(
        self,
        base: Any,
        rank: int,
        alpha: float,
        *,
        dora: bool = False,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= rank <= min(base.in_features, base.out_features):
            raise BadInput(f"rank {rank} for a layer of {base.out_features} x {base.in_features}: use 1 to the smaller")
        self.base_layer, self.scale, self.dropout = base.requires_grad_(False), alpha / rank, dropout
        self.off = False
        device = base.weight.device
        bound = 1 / math.sqrt(base.in_features)
        a_rK = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(a_rK.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.magnitude = nn.Parameter(base.weight.float().norm(dim=1)) if dora else None

    @property
    def low(self) -> Low:
        return Low(self.lora_A, self.lora_B, self.magnitude, self.scale)

    @property
    def weight(self) -> Tensor:
        """The unchanged weight: some callers ask for its dtype."""
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        base = self.base_layer
        if self.off:
            return base(x)
        if self._takes_one_node(x):
            return _Adapted.apply(x, base.weight, base.bias, self.lora_A, self.lora_B, self.scale)
        y = base(x)
        shown = F.dropout(x, self.dropout, self.training) if self.dropout else x
        if not torch.is_autocast_enabled(x.device.type):
            shown = shown.to(self.lora_A.dtype)
        inner_Rr = F.linear(shown, self.lora_A).mul(self.scale).flatten(0, -2)
        if self.magnitude is None:
            return torch.addmm(y.flatten(0, -2), inner_Rr.to(y.dtype), self.lora_B.T.to(y.dtype)).view_as(y)
        bias = 0 if base.bias is None else base.bias.to(y.dtype)
        gain_N = self.magnitude / row_lengths(base.weight, self.low)
        change = F.linear(inner_Rr, self.lora_B).view_as(y)
        return (y - bias + change).mul(gain_N).to(y.dtype) + bias

    def _takes_one_node(self, x: Tensor) -> bool:
        """Whether base and change are products of one dtype: a plain layer, its change neither scaled nor thinned."""
        base, kind = self.base_layer, x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.lora_A.dtype
        plain = type(base) is nn.Linear and type(base.weight) is nn.Parameter and base.weight.dtype == dtype
        return plain and self.magnitude is None and not (self.dropout and self.training)


def attach(
    model: nn.Module,
    stage: str,
    *,
    rank: int,
    alpha: float,
    groups: Sequence[str] = (),
    dora: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
) -> dict[str, LoraLinear]:
    """Freezes the model and puts a LoraLinear in the place of each target; returns them by name."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name in target_names(model, stage, groups):
        layer = LoraLinear(model.get_submodule(name), rank, alpha, dora=dora, dropout=dropout, generator=generator)
        model.set_submodule(name, layer)
        layers[name] = layer
    return layers


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Inside, the model is what it was before its adapters; BadInput if it has none."""
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    if not layers:
        raise BadInput("all weights learn: what the model was before is not kept")
    for layer in layers:
        layer.off = True
    try:
        yield
    finally:
        for layer in layers:
            layer.off = False
