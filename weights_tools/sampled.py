"""Token grids that a checkpoint draws for a few prompts, and the sequences that score them.

Letters: B pictures, T sequence, N emitted tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from glmimg.checkpoint import Checkpoint
from glmimg.errors import BadInput
from glmimg.generator import TokenGenerator
from glmimg.prompt import Prompt, PromptBuilder
from glmimg.token_grid import TokenGrid, preview_grid, target_grid
from glmimg.token_sampling import TokenSampling, generate_tokens

__all__ = ["PROMPTS", "Sample", "draw_samples"]

# Enough for a first impression; a quantised model that matters deserves the caller's own.
PROMPTS = ("a red apple on a wooden table", 'a sign that says "OPEN"', "a white cat and a black dog on the grass")


class Sample(NamedTuple):
    """A caption, its prompt as the generator takes it, and the tokens that it drew."""

    caption: str
    prompt: Prompt
    tokens: TokenGrid


def draw_samples(
    checkpoint: Checkpoint,
    model: TokenGenerator,
    prompts: Sequence[str],
    size: tuple[int, int] | None = None,
    seed: int = 0,
) -> list[Sample]:
    """One picture's tokens for each prompt, of `size` (height, width; default: the checkpoint's), all in one batch."""
    if not prompts:
        raise BadInput("no prompts to draw tokens for: give at least one")
    settings = checkpoint.settings
    height, width = size or settings.default_size
    grid, preview = target_grid(height, width), preview_grid(height, width, settings.preview_side)
    builder = PromptBuilder(checkpoint.tokenizer(), checkpoint.config("vision_language_encoder"))
    built = [builder.build(caption, grid, preview) for caption in prompts]
    seeds = [torch.Generator().manual_seed(seed + k) for k in range(len(built))]
    sampling = TokenSampling(settings.temperature, settings.top_k, settings.top_p)
    drawn = generate_tokens(model, built, seeds, sampling)
    return [Sample(*row) for row in zip(prompts, built, drawn, strict=True)]
