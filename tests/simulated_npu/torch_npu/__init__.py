"""Stands in for Huawei's torch_npu, so that torch, accelerate, transformers and diffusers take their NPU branches.

With this folder's parent on PYTHONPATH and SIMULATED_NPU naming the library that build.py made, plain `import torch`
loads it as it would load the real package, and `torch.device("npu")` works.
"""

from __future__ import annotations

import os

import torch

LIBRARY = os.environ.get("SIMULATED_NPU")
if not LIBRARY:
    raise ImportError("SIMULATED_NPU names no library: build it with tests/simulated_npu/build.py")

from torch_npu import npu  # noqa: E402

if not hasattr(torch, "npu"):
    torch.ops.load_library(LIBRARY)
    torch.utils.rename_privateuse1_backend("npu")
    torch._register_device_module("npu", npu)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)


def _autoload() -> None:
    """Called by torch at the end of its own import; importing this package has done the work."""


def npu_fusion_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_num: int,
    input_layout: str,
    *,
    atten_mask: torch.Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    **unused: object,
) -> tuple[torch.Tensor]:
    """Attention in the layouts BSND and BNSD; in `atten_mask` true means hidden, as in the real kernel."""
    if input_layout not in ("BSND", "BNSD"):
        raise ValueError(f"input_layout {input_layout!r} is not simulated")
    swap = input_layout == "BSND"
    if swap:
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    if query.shape[1] != head_num:
        raise ValueError(f"head_num is {head_num}, but the query has {query.shape[1]} heads")
    npu.fused_attention_calls += 1
    mask = None if atten_mask is None else ~atten_mask.bool()
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=1.0 - keep_prob, scale=scale
    )
    return (out.transpose(1, 2) if swap else out,)
