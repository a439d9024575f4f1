"""A user's folder of captioned pictures, read by the trainers as they read drawn scenes.

Each picture is a scene of one thing that fills it and is called what its caption says: nothing more is known of it. A
cache folder holds the pictures of one size, pictures.npy (n, h, w, 3 uint8), and their captions, settings.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glmimg.atomic_write import reserve, write_text
from glmimg.corpus.scenes import Scene, Thing
from glmimg.dataset.checking import Checked, check_dataset
from glmimg.dataset.reading import Dataset
from glmimg.errors import BadInput
from glmimg.prompt import glyph_texts

__all__ = ["HELD_OUT", "FolderCache", "write_folder"]

HELD_OUT = "scenes_held_out"
_EVERY = 20  # of the most frequent size one in so many is held out
_TOLD = 10  # warnings


class FolderCache:
    """What `glmimg.corpus.cache.SceneCache` is for scenes: `picture(k)` is (h, w, 3) uint8."""

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        if not (self.directory / "settings.json").exists():
            raise BadInput(f"no pictures in {directory}: run the stage 'corpus' first")
        self.settings: dict[str, Any] = json.loads((self.directory / "settings.json").read_text(encoding="utf-8"))
        self.captions: list[list[str]] = self.settings["captions"]
        self.pictures = np.load(self.directory / "pictures.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.captions)

    def picture(self, k: int) -> np.ndarray:
        return self.pictures[k]

    def scene(self, k: int) -> Scene:
        """One thing, or one for each quoted word of the caption that quotes most."""
        height, width, name = self.settings["height"], self.settings["width"], self.captions[k][0]
        whole = Thing("picture", (0, 0, width, height), concept=name)
        quoted = max(map(glyph_texts, self.captions[k]), key=len)
        words = [Thing("picture", whole.box, concept=name, word=word) for word in quoted]
        return Scene(height, width, ("white",), "single:centre", tuple(words or [whole]))

    def caption(self, k: int, rng: np.random.Generator) -> str:
        return self.captions[k][int(rng.integers(len(self.captions[k])))]


def write_folder(
    work: Path,
    dataset: Dataset,
    buckets: Sequence[tuple[int, int]],
    count_tokens: Callable[[str], int],
    max_tokens: int,
) -> None:
    """Write every picture, scaled and cut to its bucket, into work/pictures_WxH, some into work/scenes_held_out.

    A folder written before must hold the same pictures and captions.
    """
    if dataset.edits:
        raise BadInput(f"{dataset.place} holds edit pairs: `glmimg finetune` trains on these")
    report = check_dataset(dataset, buckets, count_tokens, max_tokens=max_tokens)
    look = f"look it over with `glmimg dataset check {dataset.place}`"
    if report.errors:
        raise BadInput(f"{len(report.errors)} pictures cannot be trained on ({report.errors[0].message}): {look}")
    for finding in report.findings[:_TOLD]:
        print(f"warning: {finding.message}", file=sys.stderr)
    if len(report.findings) > _TOLD:
        print(f"... and {len(report.findings) - _TOLD} more: {look}", file=sys.stderr)
    for number, bucket in enumerate(report.buckets):
        members = [checked for checked in report.usable if checked.fit.bucket == bucket]
        if number == 0:
            if len(members) < 2:
                raise BadInput(f"{dataset.place} has one picture of each size: give several, one is held out")
            _write(work / HELD_OUT, bucket, members[::_EVERY])
            members = [checked for k, checked in enumerate(members) if k % _EVERY]
        _write(work / f"pictures_{bucket[1]}x{bucket[0]}", bucket, members)


def _write(directory: Path, bucket: tuple[int, int], members: Sequence[Checked]) -> None:
    height, width = bucket
    settings = {
        "height": height,
        "width": width,
        "captions": [list(checked.example.captions) for checked in members],
        "pictures": [checked.digest for checked in members],
    }
    file = directory / "settings.json"
    if file.exists():
        if json.loads(file.read_text(encoding="utf-8")) != settings:
            raise BadInput(f"{directory} holds other pictures or captions: choose another --work, or delete it")
        return
    directory.mkdir(parents=True, exist_ok=True)
    shape = (len(members), height, width, 3)
    pictures = np.lib.format.open_memmap(directory / "pictures.npy", mode="w+", dtype=np.uint8, shape=shape)
    reserve(directory / "pictures.npy")
    for k, checked in enumerate(members):
        pictures[k] = np.asarray(checked.fit.apply(checked.example.picture.open()))
    pictures.flush()
    write_text(file, json.dumps(settings, ensure_ascii=False))
