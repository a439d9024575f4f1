"""Models larger than the device's memory: transformer blocks that are there only while they are in use.

On a processor each block is mapped from its file, used, and let go, so that memory stays bounded by two blocks. On an
accelerator all blocks wait in pinned host memory, and the next one is copied while the present one works.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from glmimg.backends import Backend
from glmimg.checkpoint import Checkpoint
from glmimg.decoder import Decoder
from glmimg.filling import fill, put, require_fit
from glmimg.generator import TokenGenerator
from glmimg.lora import merge
from glmimg.pipelines.adapting import BLOCKS, Weighted
from glmimg.progress import tell
from glmimg.weight_files import WeightFiles

__all__ = ["StreamedBlocks", "streamed_decoder", "streamed_generator"]

Block = TypeVar("Block")
Tensors = dict[str, torch.Tensor]


class StreamedBlocks(Generic[Block]):
    """Yields `prepare(block)` for each block in order, adapters merged into it, every time it is iterated over.

    `blocks` are modules on the meta device, whose weights are `weights`' tensors "{prefix}{number}.{name}".
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        weights: WeightFiles,
        prefix: str,
        backend: Backend,
        dtype: torch.dtype,
        prepare: Callable[[Any], Block],
        adapters: Weighted = (),
    ) -> None:
        self.blocks = list(blocks)
        self.weights, self.prefix, self.backend, self.dtype, self.prepare = weights, prefix, backend, dtype, prepare
        self.adapters = adapters
        self._empty = [dict(block.state_dict(keep_vars=True)) for block in self.blocks]
        names = {f"{prefix}{k}.{name}": tuple(t.shape) for k, e in enumerate(self._empty) for name, t in e.items()}
        stored = {name: info.shape for name, info in weights.infos.items() if name.startswith(prefix)}
        require_fit(weights.folder, names, stored)
        self._sizes = [weights.nbytes(f"{prefix}{k}.{name}" for name in e) for k, e in enumerate(self._empty)]
        self._checked: set[int] = set()  # blocks known to hold no NaN
        self._pinned: dict[int, Tensors] = {}
        self._stream = torch.Stream(device=backend.device) if backend.has_pinned_memory else None

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[Block]:
        arriving = self._fetch(0)
        for k, block in enumerate(self.blocks):
            tensors, ready = arriving
            if ready is not None:
                torch.accelerator.current_stream(self.backend.device).wait_event(ready)
            if k + 1 < len(self.blocks):
                arriving = self._fetch(k + 1)
            put(block, tensors)
            del tensors
            merge(block, self.adapters, f"{self.prefix}{k}.")
            yield self.prepare(block)
            put(block, self._empty[k])

    def _fetch(self, k: int) -> tuple[Tensors, Any]:
        if self._stream is None:
            return self._read(k, self.backend.device), None
        if k not in self._pinned:
            host = self._read(k, torch.device("cpu"))
            self._pinned[k] = {name: self.backend.pin(tensor) for name, tensor in host.items()}
        # Memory that this copy gets was freed by blocks before the present one: their work must be done.
        self._stream.wait_event(torch.accelerator.current_stream(self.backend.device).record_event())
        with self._stream:
            tensors = {name: self.backend.transfer(tensor) for name, tensor in self._pinned[k].items()}
        return tensors, self._stream.record_event()

    def _read(self, k: int, device: torch.device) -> Tensors:
        start = f"{self.prefix}{k}."
        names = [start + name for name in self._empty[k]]
        new = k not in self._checked
        if not self._checked:
            tell("load", 0, sum(self._sizes))
        tensors = self.weights.load(names, device=device, dtype=self.dtype, check_finite=new)
        self._checked.add(k)
        if new:  # later passes are part of the steps
            tell("load", sum(self._sizes[k] for k in self._checked), sum(self._sizes))
        return {name.removeprefix(start): tensor for name, tensor in tensors.items()}


def streamed_generator(
    checkpoint: Checkpoint, backend: Backend, dtype: torch.dtype, adapters: Weighted = ()
) -> TokenGenerator:
    """The token generator with everything but its blocks on the device."""
    name, prefix = "vision_language_encoder", BLOCKS["generator"]
    model = checkpoint.skeleton(name)
    model.model.visual = model.model.vqmodel = None
    blocks, model.model.language_model.layers = model.model.language_model.layers, nn.ModuleList()
    elsewhere = ("model.visual.", "model.vqmodel.", prefix)
    weights = checkpoint.weights[name]
    fill(model, weights, device=backend.device, dtype=dtype, skip=lambda tensor: tensor.startswith(elsewhere))
    generator = TokenGenerator(model, packed=False)
    owner = weakref.proxy(generator)  # which holds the blocks: no cycle, so that it is freed at once
    generator.layers = StreamedBlocks(blocks, weights, prefix, backend, dtype, lambda b: owner._layer(b), adapters)
    return generator


def streamed_decoder(checkpoint: Checkpoint, backend: Backend, dtype: torch.dtype, adapters: Weighted = ()) -> Decoder:
    """The decoder with everything but its blocks on the device."""
    prefix = BLOCKS["decoder"]
    model = checkpoint.skeleton("transformer")
    blocks, model.transformer_blocks = model.transformer_blocks, nn.ModuleList()
    weights = checkpoint.weights["transformer"]
    fill(model, weights, device=backend.device, dtype=dtype, skip=lambda tensor: tensor.startswith(prefix))
    merge(model, adapters)
    model.eval()
    streamed: StreamedBlocks[Any] = StreamedBlocks(blocks, weights, prefix, backend, dtype, lambda b: b, adapters)
    return Decoder(model, blocks=lambda: streamed)
