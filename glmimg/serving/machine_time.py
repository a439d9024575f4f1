"""Whose time it is: seconds of the machine, shared out between what works at once, so that none is counted twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

__all__ = ["MachineTime"]


class Charged(Protocol):
    seconds: float


class MachineTime:
    """A clock that runs half as fast for each of two stages while both work."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._at_work = 0
        self._read, self._then = 0.0, time.perf_counter()

    @contextmanager
    def charge(self, works: Sequence[Charged]) -> Iterator[None]:
        """Inside the block a stage works for these, in equal parts; who has two pictures there stands there twice."""
        began = self._tick(1)
        try:
            yield
        finally:
            part = (self._tick(-1) - began) / len(works)
            with self._lock:
                for work in works:
                    work.seconds += part

    def _tick(self, change: int) -> float:
        with self._lock:
            now = time.perf_counter()
            self._read += (now - self._then) / max(1, self._at_work)
            self._then = now
            self._at_work += change
            return self._read
