"""Scaled dot-product attention for inference and training on any device.

Legend: B batch, H heads, S queries, K keys, d head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["attend"]

# Scores of one picture up to which writing them out is twice as fast as the fused kernel on CPUs in bf16. It goes by
# the picture, not the batch: a batch must do what its pictures would do alone.
_FEW_SCORES = 1 << 20


def attend(
    q_BHSd: torch.Tensor, k_BHKd: torch.Tensor, v_BHKd: torch.Tensor, mask_B11K: torch.Tensor | None = None
) -> torch.Tensor:
    """(B, H, S, d); `mask_B11K` (bool) is False on keys that nobody sees."""
    training = torch.is_grad_enabled()
    heads, queries, keys = q_BHSd.shape[1], q_BHSd.shape[2], k_BHKd.shape[2]
    few = q_BHSd.dtype == torch.bfloat16 and heads * queries * keys <= _FEW_SCORES
    if q_BHSd.device.type != "cpu" or not (training or few):
        return F.scaled_dot_product_attention(q_BHSd, k_BHKd, v_BHKd, attn_mask=mask_B11K)
    # Written out, training on CPUs is up to five times as fast: their fused backward is slow on short sequences.
    scores = (q_BHSd * q_BHSd.shape[-1] ** -0.5) @ k_BHKd.transpose(-1, -2)
    if mask_B11K is not None:
        scores = scores.masked_fill(~mask_B11K, float("-inf"))
    if not training:
        return scores.softmax(-1) @ v_BHKd
    return scores.softmax(-1, dtype=torch.float32).to(v_BHKd.dtype) @ v_BHKd
