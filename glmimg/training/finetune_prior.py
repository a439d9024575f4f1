"""What a model knew before: token grids and latents that it draws itself, once, to be held to while it learns.

Grids are drawn as they come (temperature 1, nothing left out), so that rare tokens are held to as well. The decoder has
no part in them: 256 of the embedded model's take seconds. Latents, for the decoder, follow from fewer of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch

from glmimg.dataset.buckets import Fit
from glmimg.dataset.captions import CaptionRules
from glmimg.dataset.checking import Checked
from glmimg.dataset.reading import Example, Source
from glmimg.dataset.store import Store
from glmimg.decoder import Decoder
from glmimg.diffusion import Schedule, guided, noise_generator, noise_like, sample
from glmimg.generator import TokenGenerator
from glmimg.prompt import glyph_texts
from glmimg.token_grid import patch_ids, preview_grid, target_grid
from glmimg.token_sampling import TokenSampling, generate_tokens
from glmimg.training.finetune_base import load_base
from glmimg.training.finetune_config import FineTuneConfig
from glmimg.training.finetune_data import Encoder, Pictures, Progress, prompt_builder

__all__ = ["OwnLatents", "OwnTokens"]

TOGETHER = 32  # grids drawn at a time
Own = TypeVar("Own", bound="OwnTokens")
LATENTS, STEPS = 64, 8  # at most so many, in so many steps: what shows where its way leads, not a finished picture


@dataclass(frozen=True)
class OwnTokens(Pictures):
    """Pictures without pixels: `tensors` are the target and preview grids alone. Kept in the store like any other."""

    most: ClassVar[int | None] = None

    @classmethod
    def of(cls: type[Own], prompts: Sequence[str], encoder: Encoder, config: FineTuneConfig) -> Own:
        """`config.prior_count` of them, or the most, of the prompts in turn; the user's trigger and templates are not
        theirs."""
        side = config.resolution or encoder.checkpoint.settings.default_size[0]
        fit = Fit((side, side), (side, side), 0, 0)
        examples = []
        count = min(config.prior_count, cls.most or config.prior_count)
        for number in range(count):  # of more prompts than that, some from everywhere
            prompt = prompts[number * len(prompts) // count if len(prompts) > count else number % len(prompts)]
            digest = Store.key("own tokens/2", prompt, config.seed + number, config.base_bits)
            examples.append(Checked(Example(Source(digest), (prompt,)), (side, side), fit, None, digest, 0))
        plain = replace(config, captions=CaptionRules(dropout=config.captions.dropout))
        return cls(tuple(examples), encoder, plain)

    @torch.no_grad()
    def encode(self, rows: Sequence[int] | None = None, progress: Progress | None = None) -> None:
        """Draws what is missing of these rows (default: all)."""
        encoder, store = self.encoder, self.encoder.store
        rows = range(len(self)) if rows is None else rows
        missing = [row for row in rows if encoder.picture_key(self.examples[row]) not in store]
        if not missing:
            return
        encoder.release()
        checkpoint = encoder.checkpoint
        model = TokenGenerator(self._load("generator"), consume=True)
        builder = prompt_builder(checkpoint)
        for start in range(0, len(missing), TOGETHER):
            part = missing[start : start + TOGETHER]
            prompts, generators = [], []
            for row in part:
                example = self.examples[row]
                size = example.fit.bucket
                preview = preview_grid(*size, checkpoint.settings.preview_side)
                prompts.append(builder.build(example.example.captions[0], target_grid(*size), preview))
                generators.append(torch.Generator().manual_seed(self.config.seed + row))
            grids = generate_tokens(model, prompts, generators, TokenSampling(1.0, top_p=1.0))
            for row, grid in zip(part, grids, strict=True):
                assert grid.preview_HW is not None
                tensors = {"tokens": grid.ids_HW.int(), "preview": grid.preview_HW.int()}
                store.put(encoder.picture_key(self.examples[row]), tensors)
            if progress is not None:
                progress(start + len(part), len(missing))

    def tensors(self, row: int) -> dict[str, torch.Tensor]:
        return self._stored(self.encoder.picture_key(self.examples[row]), lambda: self.encode([row]))

    def _load(self, stage: str) -> Any:
        """As small as it will be in training."""
        encoder = self.encoder
        return load_base(stage, encoder.checkpoint, self.config.base_bits, encoder.backend, encoder.dtype)


@dataclass(frozen=True)
class OwnLatents(OwnTokens):
    """With the latents that the decoder makes of the grids: without guidance, which is not learnt."""

    most: ClassVar[int | None] = LATENTS

    @torch.no_grad()
    def encode(self, rows: Sequence[int] | None = None, progress: Progress | None = None) -> None:
        """Draws what is missing of these rows (default: all)."""
        encoder, store = self.encoder, self.encoder.store
        rows = range(len(self)) if rows is None else rows
        super().encode(rows, progress)
        for row in rows:
            for text in self.config.captions.texts(self.examples[row].example.captions):
                encoder.glyphs(glyph_texts(text))
        missing = [row for row in rows if self._latents_key(row) not in store]
        if not missing:
            return
        encoder.release()
        checkpoint, device = encoder.checkpoint, encoder.backend.device
        settings, decoder = checkpoint.settings, Decoder(self._load("decoder"))
        for done, row in enumerate(missing, 1):
            ids_1HW = super().tensors(row)["tokens"].long()[None]
            glyphs_1TG = self.glyph_states(self.examples[row].example.captions[0])[None].to(device)
            size = self.examples[row].fit.bucket
            conditioning = decoder.condition(patch_ids(ids_1HW).to(device), glyphs_1TG, size=size)
            height, width = conditioning.grid
            generators = [noise_generator(self.config.seed + row)]
            noise = noise_like((settings.latent_channels, 2 * height, 2 * width), generators).to(device)
            schedule = Schedule.published(STEPS, height * width, settings.scheduler)
            latents = sample(guided(decoder.predictor(conditioning), 1.0), noise, schedule)
            store.put(self._latents_key(row), {"latents": latents[0].half().cpu()})
            if progress is not None:
                progress(done, len(missing))

    def tensors(self, row: int) -> dict[str, torch.Tensor]:
        return super().tensors(row) | self._stored(self._latents_key(row), lambda: self.encode([row]))

    def _latents_key(self, row: int) -> str:
        return Store.key("own latents/1", STEPS, self.encoder.picture_key(self.examples[row]))
