"""Two operations whose stock versions are slow to train on CPUs: RMS norm and causal attention.

Measured on one core in bf16 at 48 x 125 tokens of width 320, forward and backward: RMS norm 24 ms stock, 7 ms here;
attention 159 ms fused, 53 ms written out. In fp32 the fused kernel is the faster one.

Legend: B batch, H heads, G key/value heads, T sequence, D width, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        size = x.shape[-1]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (norm.square() / size + eps).rsqrt().to(x.dtype)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        unit = x * scale
        inner = (grad * unit).flatten(0, -2)
        grad_weight = inner.sum(0, dtype=torch.float32) if ctx.needs_input_grad[1] else None  # frozen: fine-tuning
        along = (inner @ weight.to(x.dtype)).view(scale.shape) / x.shape[-1]
        return ((grad * weight.to(x.dtype)).sub_(unit.mul_(along))).mul_(scale), grad_weight, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension; statistics in fp32, result in x's dtype."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():  # a compiler makes one loop of it
        return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)
    return _RMSNorm.apply(x, weight, eps)


def causal_attention(q_BHTd: torch.Tensor, k_BGTd: torch.Tensor, v_BGTd: torch.Tensor) -> torch.Tensor:
    """Causal attention (B, H, T, d); H is a multiple of G, and query heads of a group are neighbours."""
    B, H, T, d = q_BHTd.shape
    G = k_BGTd.shape[1]
    if q_BHTd.dtype == torch.float32 and not q_BHTd.is_cpu:  # whose fast kernels for it know no groups
        k_BGTd, v_BGTd = (part.repeat_interleave(H // G, 1) for part in (k_BGTd, v_BGTd))
        return F.scaled_dot_product_attention(q_BHTd, k_BGTd, v_BGTd, is_causal=True)
    if not q_BHTd.is_cpu or q_BHTd.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q_BHTd, k_BGTd, v_BGTd, is_causal=True, enable_gqa=G != H)
    scores = (q_BHTd * d**-0.5).reshape(B, G, H // G * T, d) @ k_BGTd.transpose(-1, -2)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    scores = scores.view(B, G, H // G, T, T).masked_fill(future, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).to(v_BGTd.dtype)
    return (weights.view(B, G, H // G * T, T) @ v_BGTd).view(B, H, T, d)
