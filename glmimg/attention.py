"""Scaled dot-product attention for inference and training on any device.

Legend: B batch, H heads, S queries, K keys, d head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from glmimg.backends import BACKENDS

__all__ = ["attend", "written_out"]

# Scores of one picture up to which writing them out is twice as fast as the fused kernel on CPUs in bf16. It goes by
# the picture, not the batch: a batch must do what its pictures would do alone.
_FEW_SCORES = 1 << 20


def attend(
    q_BHSd: torch.Tensor, k_BHKd: torch.Tensor, v_BHKd: torch.Tensor, mask_B11K: torch.Tensor | None = None
) -> torch.Tensor:
    """(B, H, S, d); `mask_B11K` (bool) is False on keys that nobody sees."""
    heads, queries, keys = q_BHSd.shape[1], q_BHSd.shape[2], k_BHKd.shape[2]
    written = torch.is_grad_enabled() or heads * queries * keys <= _FEW_SCORES
    kind = q_BHSd.device.type
    most = BACKENDS[kind].most_scores if kind in BACKENDS else None
    if most is not None and (together := len(q_BHSd) * heads * keys) * queries > most:
        parts = q_BHSd.split(max(1, most // together), 2)
        return torch.cat([F.scaled_dot_product_attention(q, k_BHKd, v_BHKd, attn_mask=mask_B11K) for q in parts], 2)
    if kind != "cpu" or q_BHSd.dtype != torch.bfloat16 or not written:
        return F.scaled_dot_product_attention(q_BHSd, k_BHKd, v_BHKd, attn_mask=mask_B11K)
    return written_out(q_BHSd, k_BHKd, v_BHKd, mask_B11K)


def written_out(
    q_BHSd: torch.Tensor, k_BHKd: torch.Tensor, v_BHKd: torch.Tensor, mask_B11K: torch.Tensor | None = None
) -> torch.Tensor:
    """Up to five times as fast to train in bf16 on CPUs, whose fused backward is slow on short sequences; in fp32 it
    takes half as long again on whole pictures (benchmarks/training_attention.py)."""
    scores = (q_BHSd * q_BHSd.shape[-1] ** -0.5) @ k_BHKd.transpose(-1, -2)
    if mask_B11K is not None:
        scores += scores.new_zeros(mask_B11K.shape).masked_fill_(~mask_B11K, float("-inf"))  # no copy of all scores
    if not torch.is_grad_enabled():
        return scores.softmax(-1) @ v_BHKd
    return scores.softmax(-1, dtype=torch.float32).to(v_BHKd.dtype) @ v_BHKd
