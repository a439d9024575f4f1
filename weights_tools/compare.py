"""How a changed checkpoint behaves beside its source: the same tokens scored by both, the same noise decoded by both.

Letters: B pictures, N emitted tokens, T prompt, V codebook, P decoder patches, C latent channels, h x w latents.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from glmimg.autoencoder import Autoencoder, compute_dtype
from glmimg.backends import Backend
from glmimg.checkpoint import Checkpoint
from glmimg.decoder import Decoder
from glmimg.diffusion import Schedule, guided, noise_like, sample
from glmimg.errors import BadInput
from glmimg.fused_linear import fuse_qkv
from glmimg.generator import TokenGenerator
from glmimg.glyph_encoder import GlyphEncoder
from glmimg.prompt import glyph_texts
from glmimg.token_grid import patch_ids
from glmimg.token_sampling import grid_logits
from glmimg.torch_state import plain_torch
from glmimg.weights_tools.sampled import PROMPTS, Sample, draw_samples
from glmimg.weights_tools.streaming import Progress

__all__ = ["Comparison", "compare_checkpoints"]


@dataclass(frozen=True)
class Comparison:
    """Over `tokens` tokens, drawn by the source and scored by both: how often the likeliest one is the same, and the
    bits that each needs for one. Over `pictures` decoded from those tokens and the same noise: PSNR in dB of the other
    against the source (infinite where equal). `*_error`: standard errors of the mean over pictures, of `bits_error` the
    difference's; 0 for a single picture."""

    tokens: int
    top1_agreement: float
    top1_error: float
    bits_source: float
    bits_other: float
    bits_error: float
    pictures: int
    psnr: float
    psnr_error: float
    psnr_worst: float

    def to_dict(self) -> dict[str, Any]:
        """For --json, which knows no infinity."""
        return {name: None if value == math.inf else value for name, value in asdict(self).items()}


@torch.inference_mode()
@plain_torch()
def compare_checkpoints(
    source: Checkpoint,
    other: Checkpoint,
    backend: Backend,
    *,
    prompts: Sequence[str] = PROMPTS,
    dtype: torch.dtype | None = None,
    steps: int | None = None,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """One picture for each prompt, of `size` (height, width) and in `steps`, by default the source's own.

    One model is in memory at a time. `progress(done, total)` counts, for both and each prompt, tokens scored and
    pictures made. The checkpoints must share settings and tokenizer: BadInput if they do not.
    """
    if source.settings != other.settings:
        raise BadInput(f"{source.name} and {other.name} have different settings: only versions of one model compare")
    settings, dtype = source.settings, backend.resolve_dtype(dtype)
    samples: list[Sample] = []
    counted = 0

    def told(result: Any) -> Any:
        nonlocal counted
        counted += 1
        if progress:
            progress(counted, 4 * len(prompts))
        return result

    scored: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    for checkpoint in (source, other):
        model = TokenGenerator(checkpoint.generator(backend.device, dtype))
        samples = samples or draw_samples(source, model, prompts, size, seed)
        scored.append([told(_scores(model, sample)) for sample in samples])
        del model
        _release(backend)
    ours, theirs = ([torch.cat(column) for column in zip(*side, strict=True)] for side in scored)
    by_picture = list(zip(*scored, strict=True))

    steps = steps or settings.num_inference_steps
    pixels = [_pictures(checkpoint, backend, dtype, samples, steps, seed, told) for checkpoint in (source, other)]
    ratios = [_psnr(a, b) for a, b in zip(*pixels, strict=True)]
    return Comparison(
        len(ours[0]),
        float((ours[0] == theirs[0]).float().mean()),
        _error([float((a[0] == b[0]).float().mean()) for a, b in by_picture]),
        float(ours[1].mean()),
        float(theirs[1].mean()),
        _error([float((b[1] - a[1]).mean()) for a, b in by_picture]),
        len(ratios),
        sum(ratios) / len(ratios),
        0.0 if math.inf in ratios else _error(ratios),
        min(ratios),
    )


def _scores(model: TokenGenerator, sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """For each emitted token, the likeliest id_N and the bits_N that the emitted one takes."""
    logits_NV, emitted_N = grid_logits(model, sample.prompt, sample.tokens)
    bits_N = torch.nn.functional.cross_entropy(logits_NV, emitted_N, reduction="none") / math.log(2)
    return logits_NV.argmax(-1), bits_N


def _pictures(
    checkpoint: Checkpoint,
    backend: Backend,
    dtype: torch.dtype,
    samples: Sequence[Sample],
    steps: int,
    seed: int,
    told: Callable[[Any], Any],
) -> list[torch.Tensor]:
    """Pixels_3HW in [-1, 1] of each grid, picture k from noise of seed + k."""
    settings, device = checkpoint.settings, backend.device
    glyphs = GlyphEncoder(checkpoint.glyph_encoder(device, dtype))
    states_BTG, mask_BT = glyphs.encode([*(glyph_texts(sample.caption) for sample in samples), ()])
    model = checkpoint.decoder(device, dtype)
    fuse_qkv(model)
    decoder = Decoder(model)
    made = []
    for k, (_, _, tokens) in enumerate(samples):
        ids_1P = patch_ids(tokens.ids_HW[None]).to(device)
        size, patches = (tokens.height, tokens.width), ids_1P.shape[1]
        with_prompt = decoder.condition(ids_1P, states_BTG[k][mask_BT[k]][None], size=size)
        without = decoder.condition(ids_1P, states_BTG[-1][mask_BT[-1]][None], size=size, drop_prior=True)
        predict = decoder.predictor(with_prompt, without, batched=False)
        shape = (settings.latent_channels, 2 * with_prompt.grid[0], 2 * with_prompt.grid[1])
        noise_1Chw = noise_like(shape, [torch.Generator().manual_seed(seed + k)]).to(device)
        schedule = Schedule.published(steps, patches, settings.scheduler)
        made.append(told(sample(guided(predict, settings.guidance_scale), noise_1Chw, schedule)))
    del model, decoder, glyphs
    _release(backend)
    wanted = compute_dtype(checkpoint.config("vae")) or dtype
    autoencoder = Autoencoder(checkpoint.vae(device, wanted, encoder=False), wanted)
    return [autoencoder.decode(latents_1Chw)[0].cpu() for latents_1Chw in made]


def _error(values: Sequence[float]) -> float:
    """Standard error of the mean."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    error = float((a - b).square().mean())
    return 10 * math.log10(4 / error) if error else math.inf  # from -1 to 1 is a range of 2


def _release(backend: Backend) -> None:
    gc.collect()
    backend.empty_cache()
