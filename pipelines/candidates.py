"""Several layouts of a picture: each is painted as a draft in few steps, and the one that fits the prompt best is kept.

The drafts are read back by the semantic tokenizer, because the tokens that were drawn tell little about themselves:
what the generator took for likely once it finds likely again. What the decoder makes of them it judges much better, and
best by the preview grid alone, where a draft's want of detail does not show (docs/report-card.md has the figures).

Letters: B batch, H x W tokens of a grid, h x w latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image

from glmimg.pipelines.request import Request
from glmimg.pipelines.result import Callback, Reporter
from glmimg.pipelines.stages import Stages
from glmimg.pipelines.steps import Glyphs, condition, denoise, encode_glyphs, read_tokens, to_pixels, together
from glmimg.prompt import Prompt
from glmimg.token_grid import TokenGrid
from glmimg.token_sampling import token_bits

__all__ = ["choose_layouts"]

DRAFT_STEPS = 4


def choose_layouts(
    stages: Stages,
    request: Request,
    pictures: Sequence[int],
    sides: Sequence[tuple[Prompt, Prompt]],
    layouts: Sequence[Sequence[TokenGrid]],
    callback: Callback | None = None,
) -> list[TokenGrid]:
    """For each of those pictures that one of its layouts of which the draft's preview grid saves the token generator
    the most bits if it is told the prompt. `sides` has each prompt's with the caption and without."""
    config = replace(request.config, num_inference_steps=DRAFT_STEPS, guidance_scale=1.0, sampler="euler")
    draft = replace(request, config=config)
    reporter, numbers = Reporter(callback, "drafts", 2 * sum(map(len, layouts))), tuple(pictures)
    stages.enter("decoder")
    glyphs, drafts, chosen = encode_glyphs(stages, request), list[list[Image.Image]](), list[int]()

    def look() -> list[Image.Image] | None:
        if len(chosen) < len(layouts):
            return None
        return [images[k].reduce(2) for images, k in zip(drafts, chosen, strict=True)]

    for k, grids in zip(pictures, layouts, strict=True):
        drafts.append([])
        for start in range(0, len(grids), together(stages, request)):
            drafts[-1] += _painted(stages, draft, k, grids[start : start + together(stages, request)], glyphs)
            reporter.step(numbers, look, done=sum(map(len, drafts)))
    stages.enter("generator")
    for k, images in zip(pictures, drafts, strict=True):
        saved = list[float]()
        for image in images:
            grid = read_tokens(stages, image)
            told, untold = (token_bits(stages.generator, side, grid) for side in sides[k // request.copies])
            preview = 0 if grid.preview_HW is None else grid.preview_HW.numel()
            saved.append(float((untold - told)[: preview or None].sum()))
            if len(saved) == len(images):
                chosen.append(saved.index(max(saved)))
            reporter.step(numbers, look)
    return [grids[k] for grids, k in zip(layouts, chosen, strict=True)]


def _painted(
    stages: Stages, draft: Request, picture: int, grids: Sequence[TokenGrid], glyphs: Glyphs
) -> list[Image.Image]:
    """Those layouts under the picture's own noise."""
    same = (picture,) * len(grids)
    conditioning = condition(stages, draft, same, torch.stack([grid.ids_HW for grid in grids]), glyphs)
    return to_pixels(stages, denoise(stages, draft, same, conditioning))
