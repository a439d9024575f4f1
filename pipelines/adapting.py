"""Adapters on parts that are loaded already: the layers that they touch are read anew and changed, no others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from glmimg.checkpoint import Checkpoint
from glmimg.decoder import Decoder
from glmimg.errors import BadInput
from glmimg.fused_linear import fuse_qkv
from glmimg.generator import TokenGenerator
from glmimg.lora import COMPONENT, Adapter, Stacked, merge
from glmimg.packed_format import CONFIG_KEY, PACKED

__all__ = ["Weighted", "by_stage", "swap_decoder", "swap_generator"]

Weighted = Sequence[tuple[Adapter, float]]
BLOCKS = {"generator": "model.language_model.layers.", "decoder": "transformer_blocks."}


def by_stage(
    stacked: Sequence[Stacked], checkpoint: Checkpoint, codebook: str
) -> dict[str, list[tuple[Adapter, float]]]:
    """The adapters of each stage with their strengths; BadInput for one that does not fit the checkpoint."""
    sorted_out: dict[str, list[tuple[Adapter, float]]] = {stage: [] for stage in COMPONENT}
    for one in stacked:
        for stage, adapter in one.stages.items():
            adapter.require_fit(_shapes(checkpoint, COMPONENT[stage]), codebook, one.name)
            sorted_out[stage].append((adapter, one.strength))
    return sorted_out


def _shapes(checkpoint: Checkpoint, component: str) -> dict[str, tuple[int, ...]]:
    """The shape of every matrix, by the name of its layer."""
    shapes = {}
    for name, info in checkpoint.weights[component].infos.items():
        if name.endswith(".weight"):
            shapes[name.removesuffix(".weight")] = info.shape
        elif name.endswith(PACKED):
            rows, columns = info.shape
            shapes[name.removesuffix(PACKED)] = (rows, columns if info.dtype == "I8" else 2 * columns)
    return shapes


def touched(*sets: Weighted) -> list[str]:
    """Names of the layers that any of the adapters change."""
    return sorted({name for adapters in sets for adapter, _ in adapters for name in adapter.layers})


def require_plain(checkpoint: Checkpoint, stage: str) -> None:
    """Streamed blocks are changed on their way; packed ones could not be put back."""
    if CONFIG_KEY in checkpoint.config(COMPONENT[stage]):
        raise BadInput(
            "offload='block' takes no adapters on a quantised checkpoint: make one of both with glmimg weights merge"
        )


def _fresh(checkpoint: Checkpoint, component: str, skeleton: Any, name: str, device: Any, dtype: Any) -> Any:
    """A part of the component as its files hold it."""
    part = skeleton.get_submodule(name)
    weights = checkpoint.weights[component]
    keys = {f"{name}.{key}": key for key in part.state_dict()}
    tensors = weights.load(keys, device=device, dtype=dtype)
    part.load_state_dict({keys[key]: tensor for key, tensor in tensors.items()}, assign=True)
    return part


def swap_decoder(
    decoder: Decoder, checkpoint: Checkpoint, old: Weighted, new: Weighted, device: torch.device, dtype: torch.dtype
) -> None:
    """Takes `old` out of a loaded decoder and puts `new` in."""
    skeleton = checkpoint.skeleton("transformer")
    for name in touched(old, new):
        fresh = _fresh(checkpoint, "transformer", skeleton, name, device, dtype)
        decoder.model.set_submodule(name, fresh.requires_grad_(False))
    merge(decoder.model, new)
    fuse_qkv(decoder.model)
    decoder.products.lay_out(decoder.model)


def swap_generator(
    generator: TokenGenerator,
    checkpoint: Checkpoint,
    old: Weighted,
    new: Weighted,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Takes `old` out of a loaded token generator and puts `new` in, block by block."""
    prefix, component = BLOCKS["generator"], COMPONENT["generator"]
    skeleton = checkpoint.skeleton(component)
    layers: list[Any] = list(generator.layers)
    generator.layers = layers
    for number in sorted({int(name.removeprefix(prefix).split(".")[0]) for name in touched(old, new)}):
        layers[number] = None  # two of every layer might not fit; if this fails the caller releases the generator
        block = _fresh(checkpoint, component, skeleton, f"{prefix}{number}", device, dtype)
        merge(block, new, f"{prefix}{number}.")
        layers[number] = generator._layer(block)
