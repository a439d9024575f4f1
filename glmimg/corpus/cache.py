"""Rendered scenes on disk: drawing costs 5 ms a scene, and every trainer reads the same ones several times.

A cache folder holds pictures.npy (n, h, w, 3 uint8), done (how many rows are complete) and settings.json. Scene k of
the cache is `sampler.sample(start + k)`, so captions and ground truth are drawn again from the sampler, not stored. So
are pictures where pictures.npy is absent: who looks at each once needs no 200 KB for it.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np

from glmimg.atomic_write import reserve, write_text
from glmimg.corpus.captions import caption
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
        self.settings: dict[str, Any] = json.loads((self.directory / "settings.json").read_text("utf-8"))
        size = (self.settings["height"], self.settings["width"])
        self.sampler = SceneSampler(
            bank, self.settings["split"], seed=self.settings["seed"], sizes=((size, 1.0),), **self.settings["options"]
        )
        self.pictures = _kept(self.directory)
        self._scenes: dict[int, Scene] = {}

    def __len__(self) -> int:
        """Rows that are complete."""
        return int((self.directory / "done").read_text("utf-8"))

    def picture(self, k: int) -> np.ndarray:
        return draw(self.scene(k), self.bank) if self.pictures is None else self.pictures[k]

    def scene(self, k: int) -> Scene:
        if k not in self._scenes:  # training asks for each many times
            self._scenes[k] = self.sampler.sample(self.settings["start"] + k)
        return self._scenes[k]

    def caption(self, k: int, rng: np.random.Generator) -> str:
        return caption(self.scene(k), self.bank, rng)

    def draw_rows(self, start: int, end: int) -> None:
        pictures = np.lib.format.open_memmap(self.directory / "pictures.npy", mode="r+")
        for k in range(start, end):
            pictures[k] = draw(self.scene(k), self.bank)
        pictures.flush()  # before `done` tells of them: that is on the disk at once


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
    workers: int = 0,
    keep: bool = True,
    **options: Any,
) -> SceneCache:
    """Draw scenes start .. start+count into `directory`; an interrupted run goes on where it stopped.

    workers: so many processes draw (0: this one). keep: False writes no pictures, they are drawn when asked for.
    """
    directory.mkdir(parents=True, exist_ok=True)
    settings = dict(split=split, seed=seed, start=start, height=height, width=width, count=count, options=options)
    file = directory / "settings.json"
    if file.exists() and json.loads(file.read_text("utf-8")) != json.loads(json.dumps(settings)):
        raise BadInput(f"{directory} holds a cache of other settings: choose another folder or delete it")
    if not file.exists():
        if keep:
            _new_pictures(directory, (count, height, width, 3))
        _write(directory / "done", "0" if keep else str(count))
        _write(file, json.dumps(settings))
    cache = SceneCache(directory, bank)
    begun, first = time.monotonic(), len(cache)
    last = begun
    for end in _draw_parts(SceneCache, directory, bank, first, count, workers):
        _write(directory / "done", str(end))
        if time.monotonic() - last > report:
            last = time.monotonic()
            left = (last - begun) / (end - first) * (count - end)
            print(f"scenes {end}/{count}, {left:.0f} s left", flush=True)
    return cache


def _new_pictures(directory: Path, shape: tuple[int, ...]) -> None:
    file = directory / "pictures.npy"
    np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=shape).flush()
    reserve(file)


def _write(file: Path, text: str) -> None:
    write_text(file, text)


def _draw_parts(
    kind: type[SceneCache] | type[EditCache], directory: Path, bank: StickerBank, first: int, count: int, workers: int
) -> Iterator[int]:
    """Draws the rows from `first` to `count` part by part; tells after each how many are complete."""
    parts = [(start, min(start + 256, count)) for start in range(first, count, 256)]
    if workers < 2 or len(parts) < 2:
        cache = kind(directory, bank)
        for start, end in parts:
            cache.draw_rows(start, end)
            yield end
        return
    with ProcessPoolExecutor(
        min(workers, len(parts)), get_context("spawn"), _open_in_worker, (kind, directory, bank.directory)
    ) as pool:
        for (_, end), _ in zip(parts, pool.map(_draw_in_worker, parts), strict=True):
            yield end


def pictures_of(cache: SceneCache | EditCache, count: int, workers: int = 0, block: int = 64) -> Iterator[np.ndarray]:
    """The first `count` pictures in order, (block, h, w, 3) at a time; `workers` processes draw ahead what is not
    kept."""
    parts = [(start, min(start + block, count)) for start in range(0, count, block)]
    if workers < 2 or cache.pictures is not None:
        yield from (_pictures(cache, part) for part in parts)
        return
    with ProcessPoolExecutor(
        workers, get_context("spawn"), _open_in_worker, (type(cache), cache.directory, cache.bank.directory)
    ) as pool:
        coming: deque[Future[np.ndarray]] = deque()
        for part in parts:
            coming.append(pool.submit(_pictures_in_worker, part))
            if len(coming) > 4 * workers:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def _pictures(cache: SceneCache | EditCache, rows: tuple[int, int]) -> np.ndarray:
    return np.stack([cache.picture(k) for k in range(*rows)])


def _kept(directory: Path) -> np.ndarray | None:
    file = directory / "pictures.npy"
    return np.load(file, mmap_mode="r") if file.exists() else None


_opened: list[SceneCache | EditCache] = []  # of a worker: the cache that it draws


def _open_in_worker(kind: type[SceneCache] | type[EditCache], directory: Path, bank: Path) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _opened.append(kind(directory, StickerBank(bank)))


def _end_with_parent() -> None:
    """Workers hold both ends of their queue: of one that is killed they would hear nothing, and wait for ever."""
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)


def _draw_in_worker(rows: tuple[int, int]) -> None:
    _opened[0].draw_rows(*rows)


def _pictures_in_worker(rows: tuple[int, int]) -> np.ndarray:
    return _pictures(_opened[0], rows)


class EditCache:
    """Edit pairs: `picture(2k)` is the source of pair k, `picture(2k + 1)` its target; `edit(k)` the ground truth."""

    def __init__(self, directory: Path | str, bank: StickerBank) -> None:
        self.directory, self.bank = Path(directory), bank
        self.settings: dict[str, Any] = json.loads((self.directory / "settings.json").read_text("utf-8"))
        size = (self.settings["height"], self.settings["width"])
        self.sampler = EditSampler(
            bank, self.settings["split"], seed=self.settings["seed"], sizes=((size, 1.0),), **self.settings["options"]
        )
        self.pictures = _kept(self.directory)
        self._edits: dict[int, Edit] = {}

    def __len__(self) -> int:
        """Pictures, two a pair."""
        return 2 * int((self.directory / "done").read_text("utf-8"))

    def picture(self, k: int) -> np.ndarray:
        if self.pictures is not None:
            return self.pictures[k]
        edit = self.edit(k // 2)
        return draw(edit.target if k % 2 else edit.source, self.bank)

    def edit(self, k: int) -> Edit:
        if k not in self._edits:
            self._edits[k] = self.sampler.sample(self.settings.get("start", 0) + k)
        return self._edits[k]

    def draw_rows(self, start: int, end: int) -> None:
        pictures = np.lib.format.open_memmap(self.directory / "pictures.npy", mode="r+")
        for k in range(start, end):
            edit = self.edit(k)
            pictures[2 * k], pictures[2 * k + 1] = draw(edit.source, self.bank), draw(edit.target, self.bank)
        pictures.flush()


def render_edits(
    directory: Path,
    bank: StickerBank,
    count: int,
    *,
    split: str = "train",
    seed: int = 0,
    start: int = 0,
    height: int = 256,
    width: int = 256,
    workers: int = 0,
    keep: bool = True,
    **options: Any,
) -> EditCache:
    """Draw edit pairs start .. start+count into `directory`; a folder that is finished is used as it is. See `render`
    for `workers` and `keep`."""
    settings = dict(split=split, seed=seed, start=start, height=height, width=width, options=options)
    if (directory / "done").exists():
        told = json.loads((directory / "settings.json").read_text("utf-8"))
        if told != json.loads(json.dumps(settings)) or int((directory / "done").read_text("utf-8")) != count:
            raise BadInput(f"{directory} holds a cache of other settings: choose another folder or delete it")
    else:
        directory.mkdir(parents=True, exist_ok=True)
        if keep:
            _new_pictures(directory, (2 * count, height, width, 3))
        _write(directory / "settings.json", json.dumps(settings))
        for _ in _draw_parts(EditCache, directory, bank, 0, count if keep else 0, workers):
            pass
        _write(directory / "done", str(count))
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
    parser.add_argument("--workers", type=int, default=0, help="processes that draw (0: this one)")
    a = parser.parse_args()
    w, h = (int(v) for v in a.size.split("x"))
    told = {"split": a.split, "seed": a.seed, "start": a.start, "workers": a.workers}
    made = render(a.directory, StickerBank(a.bank), a.count, height=h, width=w, **told)
    print(f"{len(made)} scenes in {a.directory}")
