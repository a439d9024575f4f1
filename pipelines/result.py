"""What a pipeline hands back, and the events that it sends while it works.

Letters: H x W tokens of a grid, N tokens in the order of emission (preview grid first), B pictures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from glmimg import __version__
from glmimg.atomic_write import expanded
from glmimg.config import SamplingConfig
from glmimg.errors import BadInput
from glmimg.image_io import read_metadata, save_png
from glmimg.token_grid import TokenGrid

if TYPE_CHECKING:
    from glmimg.pipelines.stages import Stages

__all__ = [
    "Callback",
    "Clock",
    "Event",
    "Reporter",
    "Result",
    "metadata_tokens",
    "numbered",
    "picture_metadata",
    "read_settings",
]

FORMAT = "glmimg.picture/1"


@dataclass(frozen=True)
class Event:
    """One step of a stage: "tokens", "drafts" where one of several layouts is chosen, "decoder", or, of `best_of`,
    "judge", which has neither grids nor previews. A callback that raises, `Cancelled` by custom, ends the call.

    `pictures` are the numbers of those in work. `grids()` gives, in the token stage, (preview_HW or None, target_HW) of
    each one's first layout, with -1 where nothing is drawn yet. `preview()` makes small pictures, at a cost only when
    called: in the token stage from the preview grid once that is complete (None before, and of several layouts; both
    stages are then in memory, whatever `offload` says), at the last of the drafts' steps those of the chosen layouts,
    in the decoder stage from what the latents are heading for. Where memory is saved (`offload`), call it in the
    callback itself: another thread's preview waits for the whole call.
    """

    stage: str
    step: int
    total: int
    seconds: float
    eta: float
    pictures: tuple[int, ...]
    grids: Callable[[], list[tuple[torch.Tensor | None, torch.Tensor]]] = field(repr=False)
    preview: Callable[[], list[Image.Image] | None] = field(repr=False)


Callback = Callable[[Event], None]


@dataclass(frozen=True)
class Result:
    """Pictures, each with the token grid it was made from and the settings that make it again; seconds by stage."""

    images: list[Image.Image]
    tokens: list[TokenGrid]
    timings: dict[str, float]
    settings: list[dict[str, Any]]

    def save(self, path: str | Path) -> list[Path]:
        """Writes PNGs that carry settings and tokens: `path`, and path-2, path-3... where there are several."""
        if not Path(path).name:
            raise BadInput(f"{str(path)!r} names no file: give one, such as picture.png")
        paths = [numbered(expanded(path), k + 1) for k in range(len(self.images))]
        for k, target in enumerate(paths):
            save_png(self.images[k], target, picture_metadata(self.settings[k], self.tokens[k]))
        return paths


def numbered(path: str | Path, number: int) -> Path:
    """The name of the `number`-th picture, counted from 1: path, path-2, path-3..."""
    return Path(path) if number == 1 else Path(path).with_stem(f"{Path(path).stem}-{number}")


def picture_metadata(settings: dict[str, Any], tokens: TokenGrid) -> dict[str, Any]:
    """What a PNG carries."""
    return {"format": FORMAT, "version": __version__, **settings, "tokens": tokens.to_dict()}


def metadata_tokens(path: str | Path) -> TokenGrid:
    """The token grid that a PNG of ours was made from."""
    return TokenGrid.from_dict(read_metadata(path).get("tokens", {}))


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that a PNG of ours carries, checked; BadInput if they are another program's, or damaged."""
    settings = read_metadata(path)
    if settings.get("format") != FORMAT:
        raise BadInput(f"{path} carries settings of another version or program: they cannot be repeated")
    kinds = {"prompt": str, "negative_prompt": str, "task": str, "config": dict, "dtype": dict, "checkpoint": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(settings.get(name), kind)]
    if not _are_adapters(settings.get("adapters", [])):
        wrong.append("adapters")
    try:
        SamplingConfig.from_dict({} if wrong else settings["config"])
    except BadInput as error:
        raise BadInput(f"{path} carries damaged settings ({', '.join(wrong) or error}): give them as flags") from error
    return settings


def _are_adapters(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, dict) and isinstance(one.get("name"), str) and isinstance(one.get("strength"), (int, float))
        for one in value
    )


class Clock:
    """Seconds by stage, loading counted apart, and the events' arithmetic."""

    def __init__(self, stages: Stages) -> None:
        self.stages = stages
        self.timings = {"load": 0.0, "tokens": 0.0, "drafts": 0.0, "decoder": 0.0, "total": 0.0}
        self._began = time.perf_counter()
        self._loaded = stages.load_seconds

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began, loaded = time.perf_counter(), self.stages.load_seconds
        try:
            yield
        finally:
            for backend in self.stages.backends.values():
                backend.synchronize()
            self.timings[name] += time.perf_counter() - began - (self.stages.load_seconds - loaded)

    def stopped(self) -> dict[str, float]:
        self.timings["load"] = self.stages.load_seconds - self._loaded
        self.timings["total"] = time.perf_counter() - self._began
        return {name: round(seconds, 4) for name, seconds in self.timings.items()}


class Reporter:
    """Sends a stage's events to a callback, if there is one; the clock starts at the first step's beginning."""

    def __init__(self, callback: Callback | None, stage: str, total: int) -> None:
        self.callback = callback
        self.stage = stage
        self.total = total
        self.began = time.perf_counter()
        self.done = 0

    def step(
        self,
        pictures: tuple[int, ...],
        preview: Callable[[], list[Image.Image] | None],
        grids: Callable[[], list[tuple[torch.Tensor | None, torch.Tensor]]] = list,
        done: int | None = None,
    ) -> None:
        self.done = self.done + 1 if done is None else done
        if self.callback is None:
            return
        seconds = time.perf_counter() - self.began
        eta = seconds / self.done * (self.total - self.done)
        self.callback(Event(self.stage, self.done, self.total, seconds, eta, pictures, grids, preview))
