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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glmimg.autoencoder import compute_dtype
from glmimg.backends import Backend
from glmimg.checkpoint import empty_component
from glmimg.decoder import Decoder, fuse_qkv
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
    costs: Costs, work: Workload, backend: Backend, *, bits: Sequence[int] = (16, 8, 4)
) -> dict[tuple[int, bool], Timed]:
    """(bits, whether blocks are streamed) -> seconds on this device, one picture at a time in the decoder."""
    found = {}
    with torch.inference_mode():
        vae = _vae(costs, work, backend)
        for some in bits:
            forward, reading = _whole(costs, _DECODER, lambda count, b=some: _forward(costs, work, backend, count, b))  # type: ignore[misc]
            for streamed in (False, True):
                prompt, step = _whole(
                    costs,
                    _GENERATOR,
                    lambda count, b=some, s=streamed: _tokens(costs, work, backend, count, b, s),  # type: ignore[misc]
                )
                # streamed blocks are read once for both halves of guidance
                found[some, streamed] = Timed(prompt, step, forward + reading * streamed, vae)
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
    costs: Costs, work: Workload, backend: Backend, layers: int, bits: int, streamed: bool
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
        if streamed:
            generator.layers = [generator._layer(block) for block in blocks]
        uniform_B = torch.rand(work.pictures).to(generator.device)
        logits_BV = generator.step(state, draw(logits_BV, sampling, uniform_B))

    reading = layers * _reading(costs, _GENERATOR, blocks[0], backend) if streamed else 0.0
    seconds = seconds_of(prompt, backend)
    return seconds * work.prompt_tokens / before + reading, seconds_of(step, backend) + reading


def _forward(costs: Costs, work: Workload, backend: Backend, layers: int, bits: int) -> tuple[float, float]:
    """Seconds of one decoder step of one picture, and of reading all blocks from a file."""
    config = copy.deepcopy(costs.configs[_DECODER]) | {"num_layers": layers}
    model = empty_component(_DECODER, config)
    _materialise(model, _DECODER, backend, backend.dtype, bits)
    reading = layers * _reading(costs, _DECODER, model.transformer_blocks[0], backend)
    fuse_qkv(model)
    decoder, device = Decoder(model), backend.device
    ids_BP = torch.randint(int(config["prior_vq_quantizer_codebook_size"]), (1, work.patches), device=device)
    glyphs_BTG = torch.zeros(1, GLYPH_TOKENS, int(config["text_embed_dim"]), device=device, dtype=backend.dtype)
    size = (work.height, work.width)
    conditioning = decoder.condition(ids_BP, glyphs_BTG, size=size)
    without = decoder.condition(ids_BP, glyphs_BTG, size=size, drop_prior=True) if work.guidance else None
    predict = decoder.predictor(conditioning, without)
    shape = (1, int(config["in_channels"]), 2 * conditioning.grid[0], 2 * conditioning.grid[1])
    noise_BChw = torch.randn(shape).to(device)
    return seconds_of(lambda: predict(noise_BChw, 500.0, work.guidance), backend), reading


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


def _reading(costs: Costs, component: str, block: nn.Module, backend: Backend) -> float:
    """Of reading one streamed block from a file that holds as many tensors as the component's; 0 on an accelerator,
    where copies from the host count."""
    from safetensors.torch import save_file

    if backend.has_pinned_memory:
        return 0.0
    stored = {
        f"0.{name}": tensor.bfloat16() if tensor.is_floating_point() else tensor
        for name, tensor in block.state_dict().items()
    }
    others = {f"{k}.weight": torch.zeros(1) for k in range(1, len(costs.shapes[component]) - len(stored))}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "blocks.safetensors"
        save_file(stored | others, path)
        weights = WeightFiles(path)
        return seconds_of(
            lambda: weights.load(stored, device=backend.device, dtype=backend.dtype, check_finite=False), backend
        )


def _materialise(model: nn.Module, component: str, backend: Backend, dtype: torch.dtype, bits: int) -> None:
    """Gives a module on the meta device random weights, packed ones where quantising would pack."""
    pattern = re.compile(PACKABLE.get(component, "(?!)"))
    for name, linear in list(model.named_modules()):
        if bits < 16 and isinstance(linear, nn.Linear) and pattern.fullmatch(name):
            least = bits if linear.in_features % 2 == 0 else 8
            packed = PackedLinear(linear.in_features, linear.out_features, least, bias=linear.bias)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, packed)
    model.to(dtype).to_empty(device=backend.device)
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
