"""The model that a stage's fine-tuning starts from, alone in memory: as it is, or with its large matrices packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from glmimg.backends import Backend
from glmimg.checkpoint import Checkpoint
from glmimg.lora import target_names
from glmimg.packed_linear import PackedLinear, quantize

__all__ = ["load_base"]


def load_base(stage: str, checkpoint: Checkpoint, bits: int, backend: Backend, dtype: torch.dtype) -> Any:
    """The stage's model on the backend's device; with `bits` (4 or 8) every target of adapters is packed."""
    load = checkpoint.generator if stage == "generator" else checkpoint.decoder
    # What is to be packed is packed before it comes to the device, which need not hold it as it was.
    model: Any = load("cpu" if bits else backend.device, dtype)
    if bits:
        model.requires_grad_(False)
        _pack(model, stage, bits, backend.device)
        nn.Module.to(model, backend.device)
    return model


def _pack(model: Any, stage: str, bits: int, device: torch.device) -> None:
    """Packs every target of the stage, adapted or not, one at a time on the device: on a processor billions of numbers
    take a quarter of an hour."""
    for name in target_names(model, stage):
        linear = model.get_submodule(name)
        if isinstance(linear, PackedLinear) or (bits == 4 and linear.in_features % 2):
            continue
        packed = PackedLinear(
            linear.in_features, linear.out_features, bits, bias=None if linear.bias is None else linear.bias.detach()
        )
        packed.weight_packed, packed.weight_scale = quantize(linear.weight.detach().to(device), bits)
        model.set_submodule(name, packed)
