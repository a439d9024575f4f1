"""What the embedded model is shown: the kinds of scenes, and how many of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from glmimg.corpus.cache import render, render_edits
from glmimg.corpus.stickers import StickerBank
from glmimg.corpus.words import FIRST_THINGS
from glmimg.errors import BadInput, UnknownName

# Beside the square pictures: (height, width) in pixels.
OTHER_SIZES = {"scenes_wide": (192, 320), "scenes_tall": (320, 192)}
EDITS = ("edits", "edits_any")
TRAINED_ON = ("scenes", "scenes_plain", "scenes_common", "scenes_first", "scenes_words", *OTHER_SIZES)
# What a small model can learn by heart: mostly common things, alone in the middle of a light background, on whole
# tokens (32 pixels), two styles of five in most of them, short words, most in one font and on patches. `scenes` and
# `scenes_cells` are of everything, anywhere.
PLAIN: dict[str, Any] = {
    "kinds": (0.58, 0.2, 0.22),
    "common": 0.95,
    "grid": 32,
    "single": 0.75,
    "centre": 0.8,
    "styles": {"3d": 3.0, "flat": 2.5, "cartoon": 1.5, "simple": 1.2, "silhouette": 1.2},
    "pale": 0.7,
    "spaced": 0.9,
    "longest": 6,
}
# Of fewer things still, and of all things as plainly.
FIRST = {**PLAIN, "names": FIRST_THINGS}
EVERYTHING = {**PLAIN, "common": 0.0}
# Nothing but words, half of them random: each letter must be taken from the prompt, none can be guessed.
WORDS = {**PLAIN, "kinds": (0.0, 0.0, 1.0), "spaced": 1.0, "large": True, "strings": 0.5}

# The square training scenes, by name: the sampler's seed and options.
SQUARE: dict[str, tuple[int, dict[str, Any]]] = {
    "scenes": (0, {}),
    "scenes_common": (6, PLAIN),
    "scenes_first": (9, FIRST),
    "scenes_plain": (10, EVERYTHING),
    "scenes_words": (11, WORDS),
}


@dataclass(frozen=True)
class Scale:
    """How much data a run draws: scenes of everything (VAE and tokenizer take all of them), everything shown plainly,
    common things, the first things, words, and each other size; of how many of them tokens and latents are kept, and
    so how often they are drawn; edit pairs, of plain scenes and of any; texts for the text tokenizer's merges.
    """

    scenes: int = 16_000
    tokens: int = 3_000
    plain: int = 4_000
    common: int = 12_000
    first: int = 28_000
    words: int = 4_000
    others: int = 300
    latents: int = 400
    plain_latents: int = 800
    common_latents: int = 1_600
    first_latents: int = 4_800
    words_latents: int = 1_600
    edits: int = 2_000
    edits_any: int = 1_000
    held_out: int = 1_000
    texts: int = 40_000
    concepts: int = 0  # 0: all


# As much as an accelerator trains on in minutes.
LARGE = Scale(
    scenes=4_000,
    tokens=4_000,
    plain=20_000,
    common=18_000,
    first=12_000,
    words=12_000,
    others=3_000,
    latents=2_000,
    plain_latents=20_000,
    common_latents=18_000,
    first_latents=12_000,
    words_latents=12_000,
    edits=5_000,
    edits_any=5_000,
)
SMOKE = Scale(
    scenes=128,
    plain=64,
    common=64,
    first=64,
    words=64,
    others=16,
    latents=64,
    plain_latents=64,
    common_latents=64,
    first_latents=64,
    words_latents=64,
    edits=32,
    edits_any=32,
    held_out=208,
    texts=300,
    concepts=40,
)


def scaled(scale: Scale, changes: Sequence[str]) -> Scale:
    """The scale with some of its numbers replaced, each told as NAME=N."""
    names = [f.name for f in fields(Scale)]
    for text in changes:
        name, _, number = text.partition("=")
        if name not in names:
            raise UnknownName.of("--scale", name, names)
        if not number.isdecimal() or (name in ("scenes", "tokens", "held_out", "texts") and not int(number)):
            raise BadInput(f"--scale {text}: write {name}=N with a whole number, such as {name}={getattr(scale, name)}")
        scale = replace(scale, **{name: int(number)})
    return scale


def draw_all(work: Path, bank: StickerBank, scale: Scale, *, start: int, workers: int, keep: bool) -> None:
    """A cache of each kind in `work`: the training scenes from number `start` on, whose pictures are written if
    `keep`."""

    def draw(name: str, count: int, **options: Any) -> None:
        render(work / name, bank, count, workers=workers, **options)

    draw("scenes_held_out", scale.held_out, seed=1, held_out=True, **PLAIN)
    draw("scenes_cells", min(300, scale.held_out), split="cells", seed=2)
    new: dict[str, Any] = {"start": start, "keep": keep, "held_out": False}
    counts = (scale.scenes, scale.common, scale.first, scale.plain, scale.words)
    for (name, (seed, options)), count in zip(SQUARE.items(), counts, strict=True):
        draw(name, count, seed=seed, **new, **options)
    for k, (name, (height, width)) in enumerate(OTHER_SIZES.items()):
        draw(name, scale.others, seed=4 + k, height=height, width=width, **new, **PLAIN)
    render_edits(work / "edits", bank, scale.edits, seed=3, workers=workers, **new, **PLAIN)
    render_edits(work / "edits_any", bank, scale.edits_any, seed=12, workers=workers, **new)
