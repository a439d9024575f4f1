"""What the embedded model is shown: the kinds of scenes, and how many of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from glmimg.corpus.words import FIRST_THINGS

# Beside the square pictures: (height, width) in pixels.
OTHER_SIZES = {"scenes_wide": (192, 320), "scenes_tall": (320, 192)}
TRAINED_ON = ("scenes", "scenes_common", "scenes_first", *OTHER_SIZES)
# What a small model can learn by heart: mostly common things, alone in the middle of a light background, on whole
# tokens (32 pixels), two styles of five in most of them, most words in one font and on patches. `scenes` and
# `scenes_cells` are of everything, anywhere.
PLAIN: dict[str, Any] = {
    "kinds": (0.66, 0.12, 0.22),
    "common": 0.95,
    "grid": 32,
    "single": 0.85,
    "centre": 0.85,
    "styles": {"3d": 4.0, "flat": 2.5, "cartoon": 1.2, "simple": 0.8, "silhouette": 0.8},
    "pale": 0.85,
    "spaced": 0.9,
}
# Of fewer things still: most of what is trained on.
FIRST = {**PLAIN, "names": FIRST_THINGS, "centre": 0.9, "styles": {**PLAIN["styles"], "3d": 5.0}}


@dataclass(frozen=True)
class Scale:
    """How much data a run draws: scenes of everything (VAE and tokenizer take all of them), of common things, of the
    first things and of each other size; of how many of the first three tokens and latents are kept, and so how often
    they are drawn; edit pairs; texts for the text tokenizer's merges.
    """

    scenes: int = 16_000
    tokens: int = 3_000
    common: int = 12_000
    first: int = 28_000
    others: int = 300
    latents: int = 400
    common_latents: int = 1_600
    first_latents: int = 4_800
    edits: int = 2_000
    held_out: int = 1_000
    texts: int = 40_000
    concepts: int = 0  # 0: all


SMOKE = Scale(
    scenes=128,
    common=64,
    first=64,
    others=16,
    latents=64,
    common_latents=64,
    first_latents=64,
    edits=32,
    held_out=208,
    texts=300,
    concepts=40,
)
