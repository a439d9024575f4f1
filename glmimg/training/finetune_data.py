"""A user's pictures as the models see them: tokens, latents and glyph states, made once, and the order of the batches.

Legend: B batch, C latent channels, H x W tokens, h x w latents, T glyph tokens, G width of the glyph encoder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from glmimg.autoencoder import Autoencoder, compute_dtype
from glmimg.backends import Backend
from glmimg.checkpoint import Checkpoint
from glmimg.dataset.buckets import bucket_sizes
from glmimg.dataset.checking import Checked, Report, check_dataset
from glmimg.dataset.reading import Dataset
from glmimg.dataset.store import Store
from glmimg.errors import BadInput
from glmimg.glyph_encoder import GlyphEncoder
from glmimg.image_io import to_tensor
from glmimg.prompt import PromptBuilder, glyph_texts
from glmimg.semantic_tokenizer import SemanticTokenizer
from glmimg.token_grid import TOKEN_SIDE, preview_grid
from glmimg.training.finetune_config import FineTuneConfig

__all__ = ["BatchOrder", "Encoder", "Pictures", "prompt_builder", "survey", "views"]

Progress = Callable[[int, int], None]


def prompt_builder(checkpoint: Checkpoint) -> PromptBuilder:
    return PromptBuilder(checkpoint.tokenizer(), checkpoint.config("vision_language_encoder"))


def survey(
    dataset: Dataset,
    checkpoint: Checkpoint,
    config: FineTuneConfig,
    *,
    thumbnail: int = 0,
    progress: Progress | None = None,
) -> Report:
    """`check_dataset` with a checkpoint's sizes and tokenizer."""
    settings, builder = checkpoint.settings, prompt_builder(checkpoint)
    resolution = config.resolution or settings.default_size[0]
    buckets = bucket_sizes(resolution, settings.min_size, settings.max_size, config.max_aspect)
    grids = 2 if dataset.edits else 1
    fixed = grids * (resolution // TOKEN_SIDE) ** 2 + settings.preview_side**2 + 32
    most = settings.max_positions - fixed

    def count(caption: str) -> int:
        """Of the longest text that it is shown with."""
        longest = 0
        for text in config.captions.texts([caption]):
            tokens = len(builder.tokenizer.encode(text).ids)
            longest = max(longest, tokens)
            if tokens <= most:
                builder.build(text, (1, 1))  # refuses control tokens
        return longest

    return check_dataset(
        dataset,
        buckets,
        count,
        max_tokens=most,
        captions_needed=not config.captions.trigger,
        thumbnail=thumbnail,
        progress=progress,
    )


def views(checked: Checked, config: FineTuneConfig) -> list[Checked]:
    """The picture as it is, and `config.views - 1` others, which depend on its content and the seed alone.

    Words that its texts quote are to be read: such a picture stays as it is.
    """
    found = [checked]
    if any(map(glyph_texts, config.captions.texts(checked.example.captions))):
        return found
    for number in range(1, config.views):
        seed = int(Store.key("view", config.seed, checked.digest, number), 16)
        fit, other = checked.fit.varied(seed, config.zoom, config.mirror), checked.reference_fit
        other = other and other.varied(seed, config.zoom, config.mirror)
        found.append(replace(checked, fit=fit, reference_fit=other))
    return found


class Encoder:
    """The frozen parts, each loaded when something is not in the store yet, and dropped by `release`."""

    def __init__(self, checkpoint: Checkpoint, store: Store, backend: Backend, dtype: torch.dtype) -> None:
        self.checkpoint, self.store, self.backend, self.dtype = checkpoint, store, backend, dtype
        self._parts: dict[str, Any] = {}

    def picture_key(self, checked: Checked) -> str:
        return Store.key("picture/2", self.dtype, checked.digest, checked.fit, checked.reference_fit)

    def glyph_key(self, words: Sequence[str]) -> str:
        return Store.key("glyphs/1", self.dtype, json.dumps(list(words)))

    @torch.no_grad()
    def picture(self, checked: Checked) -> str:
        """Puts a picture's target_HW, preview_HW, latents_Chw (and those of its reference) into the store."""
        key = self.picture_key(checked)
        if key in self.store:
            return key
        found = {}
        sources = [("", checked.example.picture, checked.fit)]
        if checked.example.reference is not None and checked.reference_fit is not None:
            sources.append(("reference_", checked.example.reference, checked.reference_fit))
        for name, source, fit in sources:
            pixels_13HW = to_tensor([fit.apply(source.open())])
            tokenizer = self._part("tokenizer")
            preview = preview_grid(*fit.bucket, self.checkpoint.settings.preview_side)
            found[f"{name}tokens"] = tokenizer.tokenize(pixels_13HW)[0].int().cpu()
            found[f"{name}preview"] = tokenizer.tokenize(pixels_13HW, preview)[0].int().cpu()
            pixels_13HW = pixels_13HW.to(self.backend.device)
            found[f"{name}latents"] = self._part("autoencoder").encode(pixels_13HW)[0].half().cpu()
        if checked.digest != "".join(source.digest() for _, source, _ in sources):  # or it would be kept as the old one
            raise BadInput(f"{checked.example.label} was changed while it was encoded: begin again when all is there")
        self.store.put(key, found)
        return key

    @torch.no_grad()
    def glyphs(self, words: Sequence[str]) -> str:
        """Puts the states_TG of a prompt's quoted strings into the store."""
        key = self.glyph_key(words)
        if key not in self.store:
            states_1TG, _ = self._part("glyphs").encode([list(words)])
            self.store.put(key, {"states": states_1TG[0].cpu()})
        return key

    def release(self) -> None:
        self._parts.clear()
        self.backend.empty_cache()

    def _part(self, name: str) -> Any:
        if name not in self._parts:
            device, dtype = self.backend.device, self.dtype
            if name == "tokenizer":
                self._parts[name] = SemanticTokenizer(*self.checkpoint.vision(device, dtype))
            elif name == "autoencoder":
                dtype = compute_dtype(self.checkpoint.config("vae")) or dtype
                self._parts[name] = Autoencoder(self.checkpoint.vae(device, dtype), dtype)
            else:
                self._parts[name] = GlyphEncoder(self.checkpoint.glyph_encoder(device, dtype))
        return self._parts[name]


@dataclass(frozen=True)
class Pictures:
    """Examples whose tensors lie in the store. `encode` puts them there."""

    examples: tuple[Checked, ...]
    encoder: Encoder
    config: FineTuneConfig

    def __len__(self) -> int:
        return len(self.examples)

    def encode(self, rows: Sequence[int] | None = None, progress: Progress | None = None) -> None:
        """Makes what is missing of these examples (default: all), and of their texts."""
        rows = range(len(self.examples)) if rows is None else rows
        self.encoder.glyphs([])
        for done, row in enumerate(rows, 1):
            self.encoder.picture(self.examples[row])
            for text in self.config.captions.texts(self.examples[row].example.captions):
                self.encoder.glyphs(glyph_texts(text))
            if progress is not None:
                progress(done, len(rows))

    def tensors(self, row: int) -> dict[str, torch.Tensor]:
        checked = self.examples[row]
        return self._stored(self.encoder.picture_key(checked), lambda: self.encoder.picture(checked))

    def glyph_states(self, text: str) -> torch.Tensor:
        words = glyph_texts(text)
        return self._stored(self.encoder.glyph_key(words), lambda: self.encoder.glyphs(words))["states"]

    def _stored(self, key: str, make: Callable[[], object]) -> dict[str, torch.Tensor]:
        store = self.encoder.store
        found = store.get(key)
        if found is None:  # deleted by somebody, or damaged
            store.path(key).unlink(missing_ok=True)
            make()
            found = store.get(key)
        assert found is not None
        return found

    @cached_property
    def groups(self) -> dict[tuple[tuple[int, int], bool], list[int]]:
        """Rows that can share a batch: of one size, edits apart."""
        groups: dict[tuple[tuple[int, int], bool], list[int]] = {}
        for row, checked in enumerate(self.examples):
            groups.setdefault((checked.fit.bucket, checked.example.reference is not None), []).append(row)
        return dict(sorted(groups.items()))


class BatchOrder:
    """Which rows the n-th batch holds: a pure function of the seed and n. Each epoch shows every row, in new company.

    A group's last batch is filled up from its beginning, so that all batches are equally large.
    """

    def __init__(self, pictures: Pictures, size: int, seed: int) -> None:
        self.groups, self.size, self.seed = list(pictures.groups.values()), size, seed
        self.per_epoch = sum(-(-len(rows) // size) for rows in self.groups)
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def rows(self, number: int) -> list[int]:
        epoch, place = divmod(number, self.per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._shuffled(epoch))
        return self._epoch[1][place]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng((self.seed, epoch))
        batches = []
        for rows in self.groups:
            order = [rows[k] for k in rng.permutation(len(rows))]
            count = -(-len(order) // self.size)
            order = (order * (1 + count * self.size // len(order)))[: count * self.size]
            batches += [order[k * self.size : (k + 1) * self.size] for k in range(count)]
        return [batches[k] for k in rng.permutation(len(batches))]
