"""The steps that the pipelines' recipes are made of: tokens, conditioning, denoising; with their events.

Letters: B batch, C latent channels, H x W tokens of a grid, N emitted tokens, P decoder patches, T glyph tokens,
G width of the glyph encoder, h x w latents.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image

from glmimg.autoencoder import Autoencoder
from glmimg.decoder import Conditioning, Reference, ReferenceCache
from glmimg.diffusion import (
    Schedule,
    guided,
    held,
    interpolate,
    noise_like,
    sample,
    training_sigmas,
)
from glmimg.errors import out_of_memory
from glmimg.image_io import to_pil, to_tensor
from glmimg.pipelines.request import Request
from glmimg.pipelines.result import Callback, Reporter
from glmimg.pipelines.stages import TILE, Stages
from glmimg.prompt import Prompt, glyph_texts
from glmimg.token_grid import TOKEN_SIDE, TokenGrid, patch_ids, preview_grid
from glmimg.token_sampling import generate_tokens, split_grids

__all__ = [
    "Glyphs",
    "Held",
    "References",
    "batches",
    "condition",
    "decoder_events",
    "denoise",
    "draw_tokens",
    "encode_glyphs",
    "encode_references",
    "hold_unchanged",
    "read_tokens",
    "to_pixels",
    "together",
]

logger = logging.getLogger(__name__)

PREVIEW_STEPS = 8
# Where an edit changes nothing is found at this timestep, high enough for the tokens to decide, with so many noises.
_COMPARED_AT, _COMPARISONS = 800.0, 2
_NO_CHANGE = 0.05  # in deviations of the latents: what two layouts of the same differ by
BATCH_PATCHES = 1024  # decoder patches that an accelerator takes at a time; more pictures at once gain nothing


@dataclass(frozen=True)
class Glyphs:
    """Glyph states of each prompt, (T, G), and those of guidance's other half."""

    prompts: list[torch.Tensor]
    negative: torch.Tensor


@dataclass(frozen=True)
class References:
    """A prompt's reference pictures as the decoder attends to them, and the first one, which an edit changes."""

    cache: ReferenceCache
    first: Reference
    first_ids_HW: torch.Tensor


@dataclass(frozen=True)
class Held:
    """Latents_1Chw to end at where keep_B1hw is 1."""

    latents_1Chw: torch.Tensor
    keep_B1hw: torch.Tensor


def draw_tokens(
    stages: Stages,
    request: Request,
    prompts: Sequence[Prompt],
    unconditional: Sequence[Prompt],
    callback: Callback | None = None,
) -> list[TokenGrid]:
    """A token grid for each candidate, all in one batch; given ones are handed back. Events tell of the first ones."""
    if request.tokens is not None and request.region is None:
        return list(request.tokens)
    rows = [prompt for prompt in prompts for _ in range(request.copies)]
    model, count = stages.generator, request.candidates
    reporter = Reporter(callback, "tokens", max(sum(h * w for h, w in row.grids) for row in rows))

    def on_step(done: int, total: int, ids_BN: torch.Tensor) -> None:
        if callback is None:
            return
        drawn_BN = ids_BN[::count].clone()  # the loop goes on writing into its own
        reporter.step(
            tuple(range(len(rows))),
            _undisturbed(stages, lambda: _token_preview(stages, request, rows, drawn_BN)),
            lambda: [split_grids(ids_N, row) for row, ids_N in zip(rows, drawn_BN.cpu(), strict=True)],
            done=done,
        )

    return generate_tokens(
        model,
        prompts,
        request.token_generators(),
        request.token_sampling,
        unconditional=unconditional,
        forced=request.forced(),
        on_step=on_step,
        checkpoint=stages.codebook,
    )


def encode_glyphs(stages: Stages, request: Request) -> Glyphs:
    """What the decoder is told to spell, prompt by prompt."""
    texts = [tuple(glyph_texts(caption)) for caption in (*request.prompts, request.negative_prompt)]
    # One by one: padding to another prompt's length would change how they round.
    states = {text: stages.glyphs.encode([text])[0][0] for text in dict.fromkeys(texts)}
    *prompts, negative = [states[text] for text in texts]
    return Glyphs(prompts, negative)


def batches(stages: Stages, request: Request) -> Iterator[tuple[int, ...]]:
    """Which pictures the decoder makes together."""
    size = together(stages, request)
    for start in range(0, request.pictures, size):
        yield tuple(range(start, min(start + size, request.pictures)))


def together(stages: Stages, request: Request) -> int:
    """How many pictures the decoder makes at once: on processors one after the other, so that each is what it is alone
    whatever the others' words pad; on accelerators as many as fill the device."""
    if stages.backends["decoder"].has_pinned_memory and stages.guidance_batched and not request.references:
        return max(1, BATCH_PATCHES // request.patches)
    return 1


def condition(
    stages: Stages,
    request: Request,
    pictures: Sequence[int],
    ids_BHW: torch.Tensor,
    glyphs: Glyphs,
    references: References | None = None,
) -> tuple[Conditioning, Conditioning | None]:
    """What the decoder is told of these pictures besides noise and time, and the same without the prompt."""
    decoder, device = stages.decoder, stages.backends["decoder"].device
    prior_ids_BP = patch_ids(ids_BHW).to(device)
    size = (ids_BHW.shape[1] * TOKEN_SIDE, ids_BHW.shape[2] * TOKEN_SIDE)
    rows = [glyphs.prompts[k // request.copies] for k in pictures]
    states_BTG = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths_B = torch.tensor([len(row) for row in rows], device=device)
    mask_BT = torch.arange(states_BTG.shape[1], device=device) < lengths_B[:, None]
    cache = None if references is None else references.cache
    with_prompt = decoder.condition(prior_ids_BP, states_BTG, mask_BT, size=size, references=cache)
    if request.config.guidance_scale <= 1.0:
        return with_prompt, None
    negative_BTG = glyphs.negative[None].expand(len(rows), -1, -1)
    return with_prompt, decoder.condition(prior_ids_BP, negative_BTG, size=size, drop_prior=True)


def denoise(
    stages: Stages,
    request: Request,
    pictures: tuple[int, ...],
    conditioning: tuple[Conditioning, Conditioning | None],
    on_step: Callable[[int, int, torch.Tensor, torch.Tensor], None] | None = None,
    steps: int | None = None,
    hold: Held | None = None,
) -> torch.Tensor:
    """Latents_BChw from each picture's own noise."""
    config, settings = request.config, stages.checkpoint.settings
    rows, columns = conditioning[0].grid
    noise_BChw = noise_like((settings.latent_channels, 2 * rows, 2 * columns), request.noise_generators(pictures))
    predict = stages.decoder.predictor(
        *conditioning, batched=stages.guidance_batched and conditioning[0].references is None
    )
    velocity = guided(predict, config.guidance_scale, config.guidance_interval)
    if hold is not None:
        velocity = held(velocity, hold.latents_1Chw, hold.keep_B1hw)
    return sample(
        velocity,
        noise_BChw.to(stages.backends["decoder"].device),
        Schedule.published(steps or config.num_inference_steps, rows * columns, settings.scheduler),
        config.sampler,
        on_step,
    )


def hold_unchanged(
    stages: Stages,
    request: Request,
    pictures: tuple[int, ...],
    conditioning: Conditioning,
    glyphs: Glyphs,
    references: References | None,
) -> Held | None:
    """What of the first reference stays: the latents at which the decoder says much the same told the edit's layout
    and told the reference's own, seeing the noised reference (the mask of DiffEdit, arXiv 2210.11427, between layouts
    instead of captions). The edit's quoted text counts as changed. None where nothing is to be kept, or the result has
    another size.
    """
    share = request.config.keep_unchanged
    if share == 0.0 or references is None or references.first.size != (request.config.height, request.config.width):
        return None
    decoder, device = stages.decoder, stages.backends["decoder"].device
    source_1Chw = references.first.latents_CHW[None].float()
    ids_BHW = references.first_ids_HW.expand(len(pictures), -1, -1)
    unquoted = Glyphs([glyphs.negative] * len(glyphs.prompts), glyphs.negative)
    before = condition(stages, request, pictures, ids_BHW, unquoted, references)[0]
    sigma_1 = training_sigmas(torch.tensor([_COMPARED_AT]), request.patches, stages.checkpoint.settings.scheduler)
    generators, change_B1hw = request.noise_generators(pictures), torch.zeros(1)
    for _ in range(_COMPARISONS):
        noise_BChw = noise_like(source_1Chw.shape[1:], generators).to(device)
        noised_BChw = interpolate(source_1Chw, noise_BChw, sigma_1)
        after_BChw, before_BChw = (decoder.velocity(noised_BChw, _COMPARED_AT, c) for c in (conditioning, before))
        apart_BChw = float(sigma_1) * (after_BChw.float() - before_BChw.float())
        change_B1hw = change_B1hw + apart_BChw.pow(2).mean(1, keepdim=True).sqrt().cpu() / _COMPARISONS
    most_B = change_B1hw.flatten(1).quantile(0.98, dim=1)
    keep_B1hw = change_B1hw <= (share * most_B).clamp(min=_NO_CHANGE)[:, None, None, None]
    return Held(source_1Chw, keep_B1hw.float().to(device))


def decoder_events(
    stages: Stages, request: Request, callback: Callback | None
) -> Callable[[tuple[int, ...]], Callable[[int, int, torch.Tensor, torch.Tensor], None]]:
    """Gives, for each batch of pictures, what `denoise` calls after a step."""
    _ = stages.decoder  # loaded before the clock starts
    steps = request.config.num_inference_steps * len(list(batches(stages, request)))
    reporter = Reporter(callback, "decoder", steps)

    def of(pictures: tuple[int, ...]) -> Callable[[int, int, torch.Tensor, torch.Tensor], None]:
        return partial(on_step, pictures)

    def on_step(
        pictures: tuple[int, ...], done: int, total: int, latents_BChw: torch.Tensor, x0_BChw: torch.Tensor
    ) -> None:
        reporter.step(pictures, _undisturbed(stages, lambda: to_pil(stages.autoencoder().preview(x0_BChw))))

    return of


Look = Callable[[], list[Image.Image] | None]


def _undisturbed(stages: Stages, look: Look) -> Look:
    """That look as the call itself has it, also after the call or in another thread."""

    def alone() -> list[Image.Image] | None:
        with torch.inference_mode(False), torch.no_grad(), stages.running():
            return look()

    return alone


def _token_preview(
    stages: Stages, request: Request, rows: Sequence[Prompt], drawn_BN: torch.Tensor
) -> list[Image.Image] | None:
    """Small pictures from the preview grids, once these are complete, in few steps; none of a layout that may not be
    chosen."""
    if request.candidates > 1:
        return None
    previews = [split_grids(ids_N, row)[0] for row, ids_N in zip(rows, drawn_BN.cpu(), strict=True)]
    if any(preview_HW is None or int(preview_HW.min()) < 0 for preview_HW in previews):
        return None
    glyphs = encode_glyphs(stages, request)
    images = []
    for k, preview_HW in enumerate(previews):
        assert preview_HW is not None
        conditioning = condition(stages, request, (k,), preview_HW[None], glyphs)
        steps = min(PREVIEW_STEPS, request.config.num_inference_steps)
        latents_BChw = denoise(stages, request, (k,), conditioning, steps=steps)
        images += to_pixels(stages, latents_BChw)
    return images


def encode_references(stages: Stages, pictures: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> References | None:
    """A prompt's references, (pixels_3HW, ids_HW) each, as the decoder is given them: of the published checkpoint 2 GB
    for a picture of 1024 x 1024, so those of one prompt at a time."""
    if not pictures:
        return None
    device, autoencoder = stages.backends["decoder"].device, stages.autoencoder(encoder=True)
    encoded = [
        Reference(
            autoencoder.encode(pixels_3HW[None].to(device))[0],
            patch_ids(ids_HW[None])[0].to(device),
            (pixels_3HW.shape[1], pixels_3HW.shape[2]),
        )
        for pixels_3HW, ids_HW in pictures
    ]
    return References(stages.decoder.write_references([encoded]), encoded[0], pictures[0][1])


def to_pixels(stages: Stages, latents_BChw: torch.Tensor) -> list[Image.Image]:
    """The pictures; in tiles where they do not fit into memory as a whole, or the work until here would be lost."""
    autoencoder = stages.autoencoder()
    try:
        return to_pil(autoencoder.decode(latents_BChw))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error) or autoencoder.tile is not None:
            raise
    logger.warning("pixels are made in tiles of %d: as a whole they do not fit into memory (offload does so too)", TILE)
    stages.backends["decoder"].empty_cache()
    tiled = Autoencoder(autoencoder.vae, autoencoder.dtype, TILE)
    return [image for latents_Chw in latents_BChw for image in to_pil(tiled.decode(latents_Chw[None]))]


def read_tokens(stages: Stages, picture: Image.Image) -> TokenGrid:
    """The token grid of a picture whose sides are multiples of 32 pixels, with its preview grid."""
    pixels_1CHW = to_tensor([picture])
    preview = preview_grid(picture.height, picture.width, stages.checkpoint.settings.preview_side)
    target_1HW, preview_1HW = (stages.tokenizer.tokenize(pixels_1CHW, grid=grid).cpu() for grid in (None, preview))
    return TokenGrid(target_1HW[0], stages.tokenizer.codebook_size, preview_1HW[0], stages.codebook)
