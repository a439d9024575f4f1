"""The decoder's part of a work: finished pictures from token grids, and first looks from preview grids.

Letters: B pictures, C latent channels, H x W tokens of a grid, h x w latents.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image

from glmimg.errors import Cancelled
from glmimg.image_io import to_pil
from glmimg.pipelines.candidates import choose_layouts
from glmimg.pipelines.result import Event
from glmimg.pipelines.stages import Stages
from glmimg.pipelines.steps import (
    PREVIEW_STEPS,
    condition,
    denoise,
    encode_glyphs,
    encode_references,
    hold_unchanged,
    to_pixels,
)
from glmimg.serving.work import Work

__all__ = ["choose", "decode", "first_look"]

# (steps done, of, makes small pictures of what the latents are heading for)
Told = Callable[[int, int, Callable[[], list[Image.Image]]], None]


def decode(stages: Stages, work: Work, pictures: tuple[int, ...], told: Told) -> list[Image.Image]:
    """The pictures of complete grids; Cancelled at the first step after the work is over."""
    ids_BHW = torch.stack([work.grids[k].ids_HW for k in pictures])
    return _run(stages, work, pictures, ids_BHW, told, None)


def choose(stages: Stages, work: Work, pictures: tuple[int, ...]) -> list[Image.Image]:
    """Decides which layouts become the pictures' grids, and gives small drafts of these; Cancelled as `decode`."""
    looks: list[Image.Image] = []

    def on_event(event: Event) -> None:
        if work.over:
            raise Cancelled("nobody waits for the picture any more")
        looks.extend(event.preview() or ())

    assert work.prompts is not None
    count = work.request.candidates
    layouts = [[work.layouts[k * count + number] for number in range(count)] for k in pictures]
    chosen = choose_layouts(stages, work.request, pictures, [work.prompts], layouts, on_event)
    work.grids.update(zip(pictures, chosen, strict=True))
    return looks


def first_look(stages: Stages, work: Work, pictures: tuple[int, ...]) -> list[Image.Image]:
    """Small pictures from the preview grids, in few steps."""
    steps = min(PREVIEW_STEPS, work.request.config.num_inference_steps)
    ids_BHW = torch.stack([work.looks[k] for k in pictures])
    return _run(stages, work, pictures, ids_BHW, lambda *_: None, steps)


def _run(
    stages: Stages, work: Work, pictures: tuple[int, ...], ids_BHW: torch.Tensor, told: Told, steps: int | None
) -> list[Image.Image]:
    request = work.request
    if work.glyphs is None:
        work.glyphs = encode_glyphs(stages, request)
    if work.references and work.shown is None:
        work.shown = encode_references(stages, list(zip(work.pixels, work.references, strict=True)))
    conditioning = condition(stages, request, pictures, ids_BHW, work.glyphs, work.shown)
    hold = hold_unchanged(stages, request, pictures, conditioning[0], work.glyphs, work.shown)

    def on_step(done: int, total: int, latents_BChw: torch.Tensor, x0_BChw: torch.Tensor) -> None:
        if work.over:
            raise Cancelled("nobody waits for the picture any more")
        told(done, total, lambda: to_pil(stages.autoencoder().preview(x0_BChw)))

    latents_BChw = denoise(stages, request, pictures, conditioning, on_step, steps, hold)
    return to_pixels(stages, latents_BChw)
