"""The chain of `train_mini` on a user's folder of captioned pictures instead of drawn scenes: its option --data."""

from __future__ import annotations

import shutil
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

from glmimg.corpus.cache import SceneCache
from glmimg.dataset.buckets import bucket_sizes
from glmimg.dataset.reading import Dataset, read_dataset
from glmimg.pipelines.train_mini import MiniTraining
from glmimg.presets import Preset
from glmimg.prompt import PromptBuilder
from glmimg.training.folder import HELD_OUT, FolderCache, write_folder

__all__ = ["FolderTraining"]


class FolderTraining(MiniTraining):
    """`data`: what `glmimg.dataset.reading` reads; `resolution`: the side of a square with as many pixels, 0 for the
    preset's own. The rest as in MiniTraining."""

    def __init__(self, data: str, resolution: int, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.data = data
        self.resolution = resolution or self.preset["generation"]["default_size"][0]
        if resolution:  # what it learns to draw is what it draws unasked
            generation = self.preset["generation"] | {"default_size": [resolution] * 2}
            self.preset: Preset = self.preset | {"generation": generation}  # a new one: the table's stays

    @cached_property
    def dataset(self) -> Dataset:
        return read_dataset(self.data)

    def corpus(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        generation, side = self.preset["generation"], self.preset["generation"]["preview_side"]
        buckets = bucket_sizes(self.resolution, generation["min_size"], generation["max_size"])
        builder = PromptBuilder(self.bpe(), self.preset["vision_language_encoder"])

        def count(caption: str) -> int:
            return len(builder.build(caption, (1, 1)).ids)  # refuses control tokens

        grids = (self.resolution // 32) ** 2 + side**2
        write_folder(self.work, self.dataset, buckets, count, builder.max_length - grids - 32)

    @property
    def trained_on(self) -> tuple[str, ...]:
        return tuple(sorted(path.parent.name for path in self.work.glob("pictures_*x*/settings.json")))

    def scenes(self, name: str = HELD_OUT) -> SceneCache | FolderCache:
        return FolderCache(self.work / name)

    def looked_at(self) -> list[SceneCache | FolderCache]:
        return [self.scenes(name) for name in self.trained_on]

    def texts(self) -> list[str]:
        return [caption for example in self.dataset.examples for caption in example.captions]

    def teacher(self) -> None:
        print("teacher: names stickers only, and there are none in the folder", file=sys.stderr)

    def tokenizer_data(self) -> dict[str, Any]:
        from glmimg.training.tokenizer_task import Names

        caches = [self.scenes(name) for name in (HELD_OUT, *self.trained_on)]
        called = {cache.scene(k).things[0].concept: None for cache in caches for k in range(len(cache))}
        names = Names({name: [name] for name in called}, self.work / "name_vectors.npy")
        return {"cells": None, "crops": None, "teacher": None, "names": names}

    def write_attribution(self, folder: Path) -> None:
        """What a continued checkpoint was trained on before; the user's own pictures are the user's to credit."""
        for name in ("ATTRIBUTION.md", "corpus.json"):
            before = self.start_from / name if self.start_from else None
            if before and before.exists():
                shutil.copy(before, folder / name)
