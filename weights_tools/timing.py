"""Seconds of a checkpoint's work on a device of this machine, measured with random weights of the very shapes.

A few blocks of each stage are built and run as the pipelines run them; a whole model is the first block and as many of
the others. No weights are read or downloaded. Where all blocks are small, all are built.

Letters: B pictures, T prompt, N emitted tokens, P decoder patches, G width of the glyph encoder.
"""

from __future__ import annotations

import copy
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glmimg.autoencoder import compute_dtype
from glmimg.backends import Backend
from glmimg.checkpoint import empty_component
from glmimg.decoder import Decoder
from glmimg.filling import put
from glmimg.fused_linear import fuse_qkv
from glmimg.generator import PACK_BELOW, TokenGenerator
from glmimg.packed_format import PACKED
from glmimg.packed_linear import PackedLinear
from glmimg.token_sampling import TokenSampling, draw
from glmimg.weight_files import WeightFiles
from glmimg.weights_tools.costs import GLYPH_TOKENS, Costs, Workload
from glmimg.weights_tools.packing_plan import PACKABLE

__all__ = ["Timed", "measure_work", "seconds_of"]

SECONDS = 0.4  # for which each thing is repeated
SMALL = 256 << 20  # bytes of blocks up to which all of them are built
_SIDE = 256  # pixels: the VAE is measured on no more, and scaled
_GENERATOR, _DECODER = "vision_language_encoder", "transformer"


@dataclass(frozen=True)
class Timed:
    """Seconds: `prompt` run once, `step` for a token of every picture, `forward` for one decoder step of one picture
    (both halves of guidance), `vae` for one picture."""

    prompt: float
    step: float
    forward: float
    vae: float


def measure_work(
    costs: Costs,
    work: Workload,
    backend: Backend,
    *,
    bits: Sequence[int] = (16, 8, 4),
    progress: Callable[[int, int], None] | None = None,
) -> dict[tuple[int, bool], Timed]:
    """(bits, whether blocks are streamed) -> seconds on this device, one picture at a time in the decoder.

    `progress` is told (done, total) after each of these."""
    found: dict[tuple[int, bool], Timed] = {}
    with torch.inference_mode():
        vae = _vae(costs, work, backend)
        for some in bits:
            for streamed in (False, True):
                forward_of = partial(_forward, costs, work, backend, some, streamed)
                tokens_of = partial(_tokens, costs, work, backend, some, streamed)
                (forward,) = _whole(costs, _DECODER, forward_of)
                prompt, step = _whole(costs, _GENERATOR, tokens_of)
                found[some, streamed] = Timed(prompt, step, forward, vae)
                if progress is not None:
                    progress(len(found), 2 * len(bits))
    return found


def _whole(costs: Costs, component: str, run: Callable[[int], tuple[float, ...]]) -> tuple[float, ...]:
    """What `run(blocks)` would give with all blocks."""
    layers = costs.layers(component)
    if costs.blocks(component, 16) <= SMALL or layers < 3:
        return run(layers)
    one, two = run(1), run(2)
    return tuple(first + max(0.0, second - first) * (layers - 1) for first, second in zip(one, two, strict=True))


def seconds_of(work: Callable[[], Any], backend: Backend, seconds: float = SECONDS) -> float:
    """Seconds of one call: after a first one, the mean of as many as take `seconds`."""
    work()
    backend.synchronize()
    began, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < seconds or not count:
        work()
        backend.synchronize()
        count += 1
    return passed / count


def _tokens(
    costs: Costs, work: Workload, backend: Backend, bits: int, streamed: bool, layers: int
) -> tuple[float, float]:
    """(prompt, step) with that many blocks, in the middle of a picture."""
    config = copy.deepcopy(costs.configs[_GENERATOR])
    text = config["text_config"]
    codes = int(config["vq_config"]["num_embeddings"])
    # Rows of the embedding that no token of a picture has are never read.
    text |= {"num_hidden_layers": layers, "vocab_size": int(text["vision_vocab_size"]), "pad_token_id": 0}
    model = empty_component(_GENERATOR, config)
    model.model.visual = model.model.vqmodel = None
    _materialise(model, _GENERATOR, backend, backend.dtype, bits)
    eight = backend.eight_bit_tokens and backend.dtype == torch.bfloat16 and bits == 16 and not streamed
    small = costs.blocks(_GENERATOR, 16) <= PACK_BELOW and not streamed
    generator = TokenGenerator(model, packed=small, weights="int8" if eight else None)
    blocks = list(model.model.language_model.layers)
    tokens = costs.tokens(work)
    before = work.prompt_tokens + tokens // 2
    positions_3BT = torch.arange(before + tokens).expand(3, 1, -1)
    ids_BT = torch.randint(codes, (1, before))
    mask_BT = torch.ones(1, before, dtype=torch.bool)
    sampling = TokenSampling()
    state: Any = None
    logits_BV = torch.empty(0)

    def prompt() -> None:
        nonlocal state, logits_BV
        logits_BV, state = generator.prefill(
            ids_BT, positions_3BT[..., :before], mask_BT, positions_3BT[..., before:], copies=work.pictures
        )

    def step() -> None:
        nonlocal logits_BV
        if state.length >= before + tokens - 1:
            state.length = before
        uniform_B = torch.rand(work.pictures).to(generator.device)
        logits_BV = generator.step(state, draw(logits_BV, sampling, uniform_B))

    with _Streamed(costs, _GENERATOR, blocks, backend, generator._layer) as layers_read:
        if streamed:
            generator.layers = layers_read
        return seconds_of(prompt, backend) * work.prompt_tokens / before, seconds_of(step, backend)


def _forward(costs: Costs, work: Workload, backend: Backend, bits: int, streamed: bool, layers: int) -> tuple[float]:
    """Seconds of one decoder step of one picture."""
    config = copy.deepcopy(costs.configs[_DECODER]) | {"num_layers": layers}
    model = empty_component(_DECODER, config)
    _materialise(model, _DECODER, backend, backend.dtype, bits)
    decoder, device = Decoder(model), backend.device
    if not streamed:
        fuse_qkv(model)
        decoder.products.lay_out(model)
    ids_BP = torch.randint(int(config["prior_vq_quantizer_codebook_size"]), (1, work.patches), device=device)
    glyphs_BTG = torch.zeros(1, GLYPH_TOKENS, int(config["text_embed_dim"]), device=device, dtype=backend.dtype)
    size = (work.height, work.width)
    conditioning = decoder.condition(ids_BP, glyphs_BTG, size=size)
    without = decoder.condition(ids_BP, glyphs_BTG, size=size, drop_prior=True) if work.guidance else None
    predict = decoder.predictor(conditioning, without)
    shape = (1, int(config["in_channels"]), 2 * conditioning.grid[0], 2 * conditioning.grid[1])
    noise_BChw = torch.randn(shape).to(device)
    with _Streamed(costs, _DECODER, list(model.transformer_blocks), backend, lambda block: block) as blocks_read:
        if streamed:
            decoder.blocks = lambda: blocks_read
        return (seconds_of(lambda: predict(noise_BChw, 500.0, work.guidance), backend),)


def _vae(costs: Costs, work: Workload, backend: Backend) -> float:
    config = costs.configs["vae"]
    vae = empty_component("vae", config)
    vae.encoder = vae.quant_conv = None
    dtype = compute_dtype(config) or backend.dtype
    _materialise(vae, "vae", backend, dtype, 16)
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    sides = [min(side, _SIDE) // factor for side in (work.height, work.width)]
    latents_BChw = torch.randn(1, int(config["latent_channels"]), *sides).to(backend.device, dtype)
    seconds = seconds_of(lambda: vae.decoder(latents_BChw), backend)
    return seconds * work.height * work.width / (sides[0] * sides[1] * factor**2)


class _Streamed:
    """What glmimg.pipelines.block_streaming does, from a temporary file that holds as many tensors as the component's.
    On an accelerator blocks are only prepared; their copies from the host count elsewhere."""

    def __init__(
        self, costs: Costs, component: str, blocks: list[Any], backend: Backend, prepare: Callable[[Any], Any]
    ) -> None:
        self.count, self.blocks = len(costs.shapes[component]), blocks
        self.backend, self.prepare = backend, prepare

    def __enter__(self) -> _Streamed:
        from safetensors.torch import save_file

        self.names: list[dict[str, str]] = [{f"{k}.{n}": n for n in b.state_dict()} for k, b in enumerate(self.blocks)]
        self.folder = tempfile.TemporaryDirectory()
        if self.backend.has_pinned_memory:
            return self
        stored = {
            f"{k}.{name}": tensor.bfloat16() if tensor.is_floating_point() else tensor
            for k, block in enumerate(self.blocks)
            for name, tensor in block.state_dict().items()
        }
        others = {f"other.{k}": torch.zeros(1) for k in range(self.count - len(stored))}
        path = Path(self.folder.name) / "blocks.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in (stored | others).items()}, path)
        self.weights = WeightFiles(path)
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.cleanup()

    def __iter__(self) -> Iterator[Any]:
        for block, names in zip(self.blocks, self.names, strict=True):
            if not self.backend.has_pinned_memory:
                place = {"device": self.backend.device, "dtype": self.backend.dtype, "check_finite": False}
                put(block, {names[name]: tensor for name, tensor in self.weights.load(names, **place).items()})  # type: ignore[arg-type]
            yield self.prepare(block)


def _materialise(model: nn.Module, component: str, backend: Backend, dtype: torch.dtype, bits: int) -> None:
    """Gives a module on the meta device random weights, packed ones where quantising would pack."""
    pattern = re.compile(PACKABLE.get(component, "(?!)"))
    for name, linear in list(model.named_modules()):
        if bits < 16 and isinstance(linear, nn.Linear) and pattern.fullmatch(name):
            least = bits if linear.in_features % 2 == 0 else 8
            packed = PackedLinear(linear.in_features, linear.out_features, least, bias=linear.bias)
            model.set_submodule(name, packed)
    nn.Module.to(model, dtype)  # diffusers' own `to` logs a warning about nothing
    model.to_empty(device=backend.device)
    generator = torch.Generator(backend.device).manual_seed(0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(PACKED):
            tensor.random_(0, 127, generator=generator)
        elif not tensor.is_floating_point():
            tensor.zero_()
        elif tensor.dim() > 1:
            tensor.normal_(std=0.02, generator=generator)
        else:
            tensor.fill_(1.0 if name.endswith("weight") else 0.01)
