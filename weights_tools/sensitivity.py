"""How much each stage's output minds a matrix in fewer bits: the matrix alone is packed, the stage is run, the outputs
are compared.

One stage is in memory at a time, and one group of matrices (those that share their bits) is changed at a time. What is
compared: the generator's logits over the tokens that it drew itself, the decoder's velocities at several times, the
glyph encoder's states, the vision tower's features of smooth random pictures, and those pictures after the VAE's
encoder and decoder. Each error is relative to its own stage's output: |changed - plain|^2 / |plain - mean|^2; that all
stages count alike is a choice, not a measurement.

Letters: B pictures, T sequence, N emitted tokens, V codebook, P decoder patches, D width.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from glmimg.autoencoder import Autoencoder, compute_dtype
from glmimg.backends import Backend
from glmimg.checkpoint import Checkpoint
from glmimg.decoder import Decoder
from glmimg.diffusion import noise_like
from glmimg.errors import CheckpointError
from glmimg.generator import TokenGenerator
from glmimg.glyph_encoder import GlyphEncoder
from glmimg.packed_linear import dequantize, quantize
from glmimg.prompt import glyph_texts
from glmimg.semantic_tokenizer import TOKEN_SIDE, SemanticTokenizer
from glmimg.token_grid import patch_ids
from glmimg.token_sampling import grid_logits
from glmimg.weights_tools.packing_plan import Unit
from glmimg.weights_tools.sampled import PROMPTS, Sample, draw_samples
from glmimg.weights_tools.streaming import Progress

__all__ = ["output_errors"]

TIMES = (99.0, 499.0, 899.0)  # timesteps at which velocities are compared
_VISUAL, _LAYERS = "model.visual.", "model.language_model.layers."

# Runs a stage and gives what it puts out, one tensor a sample.
Outputs = Callable[[], list[torch.Tensor]]


@torch.no_grad()
def output_errors(
    checkpoint: Checkpoint,
    backend: Backend,
    found: Sequence[Unit],
    group: int,
    *,
    prompts: Sequence[str] = PROMPTS,
    size: tuple[int, int] | None = None,
    dtype: str | torch.dtype | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[int, float]]:
    """Unit's key -> bits -> error of its stage's output, over one picture of `size` (height, width) for each prompt.

    `progress(done, total)` counts runs. CheckpointError if an output is not finite.
    """
    dtype = backend.resolve_dtype(dtype)
    model: Any = TokenGenerator(checkpoint.generator(backend.device, dtype))
    samples = draw_samples(checkpoint, model, prompts, size)
    del model
    parts = {
        "vision_language_encoder": _generator,
        "visual": _vision,
        "text_encoder": _glyphs,
        "transformer": _decoder,
        "vae": _vae,
    }
    by_part: dict[str, list[Unit]] = {part: [] for part in parts}
    for unit in found:
        visual = next(iter(unit.layers)).startswith(_VISUAL)
        by_part["visual" if visual else unit.component].append(unit)
    done, total = 0, sum(len(unit.allowed) for unit in found)
    errors: dict[str, dict[int, float]] = {}
    for part, mine in by_part.items():
        if not mine:
            continue
        model, prefix, run, refresh = parts[part](checkpoint, backend, dtype, samples)
        plain = run()
        if not all(bool(output.isfinite().all()) for output in plain):
            raise CheckpointError(f"{checkpoint.name}: the {part} puts out NaN or infinity: use an earlier checkpoint")
        spread = sum(float((output - output.mean(-1, keepdim=True)).square().sum()) for output in plain)
        for unit in mine:
            errors[unit.key] = {}
            for bits in unit.allowed:
                with _changed(model, prefix, unit, bits, group, refresh):
                    change = sum(float((a - b).square().sum()) for a, b in zip(run(), plain, strict=True))
                errors[unit.key][bits] = change / max(spread, 1e-30)
                done += 1
                if progress:
                    progress(done, total)
        del model, run, refresh, plain
        gc.collect()
        backend.empty_cache()
    return errors


@contextmanager
def _changed(
    model: Any, prefix: str, unit: Unit, bits: int, group: int, refresh: Callable[[str], None]
) -> Iterator[None]:
    """The unit's matrices as they would be in that many bits, for the time of the block."""
    names = [name.removeprefix(prefix) for name in unit.layers]
    layers = [model.get_submodule(name) for name in names]
    kept = [layer.weight.data for layer in layers]
    try:
        for layer, weight_NK in zip(layers, kept, strict=True):
            layer.weight.data = dequantize(*quantize(weight_NK, bits, group), weight_NK.dtype)
        refresh(names[0])
        yield
    finally:
        for layer, weight_NK in zip(layers, kept, strict=True):
            layer.weight.data = weight_NK
        refresh(names[0])


Stage = tuple[Any, str, Outputs, Callable[[str], None]]
Samples = Sequence[Sample]


def _generator(checkpoint: Checkpoint, backend: Backend, dtype: torch.dtype, samples: Samples) -> Stage:
    model = checkpoint.generator(backend.device, dtype)
    generator = TokenGenerator(model, packed=False)
    blocks, layers = model.model.language_model.layers, list(generator.layers)
    generator.layers = layers

    def refresh(name: str) -> None:
        """The loop holds projections side by side, and what is packed in a layout of its own."""
        if name == "lm_head":
            generator.head = generator._head(model.lm_head)
        if not name.startswith(_LAYERS):
            return
        number = int(name.removeprefix(_LAYERS).split(".")[0])
        layers[number] = generator._layer(blocks[number])

    def run() -> list[torch.Tensor]:
        outputs = []
        for _, prompt, tokens in samples:
            logits_NV, _ = grid_logits(generator, prompt, tokens)
            outputs.append(logits_NV - logits_NV.mean(-1, keepdim=True))  # a shift of all changes no draw
        return outputs

    return model, "", run, refresh


def _vision(checkpoint: Checkpoint, backend: Backend, dtype: torch.dtype, samples: Samples) -> Stage:
    """Features of smooth random pictures: real ones would ask for the whole pipeline, and none are at hand."""
    visual, vqmodel = checkpoint.vision(backend.device, dtype)
    tokenizer = SemanticTokenizer(visual, vqmodel)
    pictures = [picture.to(backend.device) for picture in _pictures(samples, tokenizer.patch)]
    return visual, _VISUAL, lambda: [tokenizer.features(p).float().cpu() for p in pictures], lambda name: None


def _pictures(samples: Samples, scale: int) -> list[torch.Tensor]:
    """A picture_13HW for each sample, as many pixels to a token's side."""
    made = []
    for k, (_, _, tokens) in enumerate(samples):
        coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(k)) * 2 - 1
        size = (scale * tokens.ids_HW.shape[0], scale * tokens.ids_HW.shape[1])
        made.append(torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(-1, 1))
    return made


def _vae(checkpoint: Checkpoint, backend: Backend, dtype: torch.dtype, samples: Samples) -> Stage:
    wanted = compute_dtype(checkpoint.config("vae")) or dtype
    encoder = any(name.startswith("encoder.") for name in checkpoint.weights["vae"].infos)
    vae = checkpoint.vae(backend.device, wanted, encoder=encoder)
    autoencoder = Autoencoder(vae, wanted)
    pictures = [picture.to(backend.device) for picture in _pictures(samples, TOKEN_SIDE)]

    def latents(k: int, picture: torch.Tensor) -> torch.Tensor:
        if encoder:
            return autoencoder.encode(picture)
        shape = (1, checkpoint.settings.latent_channels, *(side // autoencoder.factor for side in picture.shape[2:]))
        return torch.randn(shape, generator=torch.Generator().manual_seed(k)).to(backend.device)

    return vae, "", lambda: [autoencoder.decode(latents(k, p)).cpu() for k, p in enumerate(pictures)], lambda name: None


def _glyphs(checkpoint: Checkpoint, backend: Backend, dtype: torch.dtype, samples: Samples) -> Stage:
    model = checkpoint.glyph_encoder(backend.device, dtype)
    encoder = GlyphEncoder(model)

    def run() -> list[torch.Tensor]:
        states_BTG, mask_BT = encoder.encode([glyph_texts(caption) for caption, _, _ in samples])
        return [states_BTG[mask_BT].float().cpu()]

    return model, "", run, lambda name: None


def _decoder(checkpoint: Checkpoint, backend: Backend, dtype: torch.dtype, samples: Samples) -> Stage:
    device, channels = backend.device, checkpoint.settings.latent_channels
    encoder = GlyphEncoder(checkpoint.glyph_encoder(device, dtype))
    states_BTG, mask_BT = encoder.encode([glyph_texts(caption) for caption, _, _ in samples])
    del encoder
    model = checkpoint.decoder(device, dtype)
    decoder = Decoder(model)

    def run() -> list[torch.Tensor]:
        outputs = []
        for k, (_, _, tokens) in enumerate(samples):
            ids_1P = patch_ids(tokens.ids_HW[None]).to(device)
            size = (tokens.height, tokens.width)
            conditioning = decoder.condition(ids_1P, states_BTG[k][mask_BT[k]][None], size=size)
            shape = (channels, 2 * conditioning.grid[0], 2 * conditioning.grid[1])
            noise_1Chw = noise_like(shape, [torch.Generator().manual_seed(k)]).to(device)
            outputs += [decoder.velocity(noise_1Chw, time, conditioning).float().cpu() for time in TIMES]
        return outputs

    return model, "", run, lambda name: None
