"""The bars that the command line draws on stderr, one for each stage."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from glmimg.pipelines.result import Event

__all__ = ["Bars", "ByteBar", "Count", "LoadBar"]

WIDTH = 24
INTERVAL = 0.1  # seconds between two drawings
PATIENCE = 2.0  # seconds without a bar: short work needs none


class Bars:
    """A callback for pipelines. On a terminal it draws bars; elsewhere it writes a line when a stage is done."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.live = _live(self.stream)
        self._drawn = 0.0

    def __call__(self, event: Event) -> None:
        done = event.step == event.total
        if not done and (not self.live or time.monotonic() - self._drawn < INTERVAL):
            return
        self._drawn = time.monotonic()
        line = f"{event.stage:<8}{_bar(event.step, event.total)} {event.step}/{event.total}  "
        line += _duration(event.seconds) if done else f"{_duration(event.eta)} left"
        draw(self.stream, line, self.live, done)


class ByteBar:
    """A callback (bytes done, bytes in all) that draws one bar for work that takes over two seconds.

    Elsewhere than on a terminal it writes a line at the end, again only if the work took that long.
    """

    def __init__(self, label: str, stream: TextIO | None = None) -> None:
        self.label = label
        self.stream = stream or sys.stderr
        self.live = _live(self.stream)
        self._started = time.monotonic()
        self._drawn = self._started + PATIENCE

    def __call__(self, done: int, total: int) -> None:
        now, finished = time.monotonic(), done == total
        if now - self._started < PATIENCE or not (finished or (self.live and now - self._drawn >= INTERVAL)):
            return
        self._drawn = now
        seconds = now - self._started
        scale, unit = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
        line = f"{self.label:<8}{_bar(done, max(1, total))} {done / scale:.2f}/{total / scale:.2f} {unit}  "
        line += _duration(seconds) if finished else f"{_duration(seconds * (total - done) / max(1, done))} left"
        draw(self.stream, line, self.live, finished)


class LoadBar:
    """A ByteBar for each piece of loading, for `glmimg.progress.watching`."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream
        self._bar: ByteBar | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._bar is None or not done:
            self._bar = ByteBar(what, self.stream)
        if total:
            self._bar(done, total)


def draw(stream: TextIO | None, text: str, live: bool, done: bool) -> None:
    """A line of progress, over the last one on a terminal. No work ends because nobody can read it."""
    if stream is not None:  # as where standard error is closed
        with suppress(OSError, ValueError):
            if live and not done and (columns := _columns(stream)):  # of two rows only the second is drawn over
                text = text[: columns - 1]
            print(("\r\x1b[K" if live else "") + text, end="\n" if done else "", file=stream, flush=True)


def _columns(stream: TextIO) -> int:
    """Of its terminal; 0 where nobody knows."""
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return 0


def _live(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def _bar(step: int, total: int) -> str:
    filled = round(WIDTH * step / total)
    return "[" + "#" * filled + "." * (WIDTH - filled) + "]"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


class Count:
    """A callback (done, total) for things that are counted; draws nothing for work under two seconds.

    What is counted again from the beginning is another piece of work.
    """

    def __init__(self, label: str, stream: TextIO | None = None) -> None:
        self.label = label
        self.stream = stream or sys.stderr
        self._started = self._drawn = time.monotonic()
        self._first = self._last = 0  # things done when the clock started, and when last told

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done <= self._last or not self._first:  # how long the first took is not known
            self._started, self._first = now, done
        self._last = done
        seconds, live = now - self._started, _live(self.stream)
        if seconds <= PATIENCE or not (done == total or (live and now - self._drawn > INTERVAL)):
            return
        self._drawn = now
        left = _duration(seconds * (total - done) / max(1, done - self._first))
        text = f"{self.label:<8}{_bar(done, total)} {done}/{total}  "
        text += _duration(seconds) if done == total else f"{left} left"
        draw(self.stream, text, live, done == total)
