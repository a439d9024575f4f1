"""Rendered scenes on disk: drawing costs 5 ms a scene, and every trainer reads the same ones several times.

A cache folder holds pictures.npy (n, h, w, 3 uint8), done (how many rows are complete) and settings.json. Scene k of
the cache is `sampler.sample(start + k)`, so captions and ground truth are drawn again from the sampler, not stored.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from glmimg.corpus.edits import Edit, EditSampler
from glmimg.corpus.scenes import Scene, SceneSampler, draw
from glmimg.corpus.stickers import StickerBank
from glmimg.errors import BadInput


class SceneCache:
    """`n` scenes of one size and split. `picture(k)` is (h, w, 3) uint8; `scene(k)` its ground truth."""

    def __init__(self, directory: Path | str, bank: StickerBank) -> None:
        self.directory, self.bank = Path(directory), bank
        if not (self.directory / "settings.json").exists():
            raise BadInput(f"no scene cache in {directory}: make one with `python -m glmimg.corpus.cache`")
        self.settings: dict[str, Any] = json.loads((self.directory / "settings.json").read_text())
        size = (self.settings["height"], self.settings["width"])
        self.sampler = SceneSampler(
            bank, self.settings["split"], seed=self.settings["seed"], sizes=((size, 1.0),), **self.settings["options"]
        )
        self.pictures = np.load(self.directory / "pictures.npy", mmap_mode="r")

    def __len__(self) -> int:
        """Rows that are complete."""
        return int((self.directory / "done").read_text())

    def picture(self, k: int) -> np.ndarray:
        return self.pictures[k]

    def scene(self, k: int) -> Scene:
        return self.sampler.sample(self.settings["start"] + k)


def render(
    directory: Path,
    bank: StickerBank,
    count: int,
    *,
    split: str = "train",
    seed: int = 0,
    start: int = 0,
    height: int = 256,
    width: int = 256,
    report: float = 30.0,
    **options: Any,
) -> SceneCache:
    """Draw scenes start .. start+count into `directory`; an interrupted run goes on where it stopped."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = dict(split=split, seed=seed, start=start, height=height, width=width, count=count, options=options)
    file = directory / "settings.json"
    if file.exists() and json.loads(file.read_text()) != json.loads(json.dumps(settings)):
        raise BadInput(f"{directory} holds a cache of other settings: choose another folder or delete it")
    if not file.exists():
        np.lib.format.open_memmap(
            directory / "pictures.npy", mode="w+", dtype=np.uint8, shape=(count, height, width, 3)
        ).flush()
        (directory / "done").write_text("0")
        file.write_text(json.dumps(settings))
    cache = SceneCache(directory, bank)
    pictures = np.lib.format.open_memmap(directory / "pictures.npy", mode="r+")
    begun, first = time.monotonic(), len(cache)
    last = begun
    for k in range(first, count):
        pictures[k] = draw(cache.scene(k), bank)
        if k % 256 == 255 or k == count - 1:
            (directory / "done").write_text(str(k + 1))
            if time.monotonic() - last > report:
                last = time.monotonic()
                left = (last - begun) / (k + 1 - first) * (count - k - 1)
                print(f"scenes {k + 1}/{count}, {left:.0f} s left", flush=True)
    return cache


class EditCache:
    """Edit pairs: `picture(2k)` is the source of pair k, `picture(2k + 1)` its target; `edit(k)` the ground truth."""

    def __init__(self, directory: Path | str, bank: StickerBank) -> None:
        self.directory, self.bank = Path(directory), bank
        self.settings: dict[str, Any] = json.loads((self.directory / "settings.json").read_text())
        size = (self.settings["height"], self.settings["width"])
        self.sampler = EditSampler(
            bank, self.settings["split"], seed=self.settings["seed"], sizes=((size, 1.0),), **self.settings["options"]
        )
        self.pictures = np.load(self.directory / "pictures.npy", mmap_mode="r")

    def __len__(self) -> int:
        """Pictures, two a pair."""
        return len(self.pictures)

    def picture(self, k: int) -> np.ndarray:
        return self.pictures[k]

    def edit(self, k: int) -> Edit:
        return self.sampler.sample(k)


def render_edits(
    directory: Path,
    bank: StickerBank,
    count: int,
    *,
    split: str = "train",
    seed: int = 0,
    height: int = 256,
    width: int = 256,
    **options: Any,
) -> EditCache:
    """Draw `count` edit pairs into `directory`; a folder that is there is used as it is."""
    if not (directory / "settings.json").exists():
        directory.mkdir(parents=True, exist_ok=True)
        sampler = EditSampler(bank, split, seed=seed, sizes=(((height, width), 1.0),), **options)
        shape = (2 * count, height, width, 3)
        pictures = np.lib.format.open_memmap(directory / "pictures.npy", mode="w+", dtype=np.uint8, shape=shape)
        for k in range(count):
            edit = sampler.sample(k)
            pictures[2 * k], pictures[2 * k + 1] = draw(edit.source, bank), draw(edit.target, bank)
        pictures.flush()
        settings = dict(split=split, seed=seed, height=height, width=width, options=options)
        (directory / "settings.json").write_text(json.dumps(settings))
    return EditCache(directory, bank)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Render scenes of the corpus into a cache folder.")
    parser.add_argument("bank", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--count", type=int, default=48_000)
    parser.add_argument("--split", default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--size", default="256x256", help="WIDTHxHEIGHT in pixels")
    a = parser.parse_args()
    w, h = (int(v) for v in a.size.split("x"))
    made = render(
        a.directory, StickerBank(a.bank), a.count, split=a.split, seed=a.seed, start=a.start, height=h, width=w
    )
    print(f"{len(made)} scenes in {a.directory}")
