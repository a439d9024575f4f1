"""What the server counts: for Prometheus, and for each key."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from glmimg.atomic_write import locked, write_text
from glmimg.config import parse_json
from glmimg.errors import BadInput, GlmimgError

__all__ = ["Ledger", "Metrics", "Totals"]

SECONDS = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600)

logger = logging.getLogger(__name__)


class Metrics:
    """One registry for each app, so that several can live in a process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("glmimg_requests", "Answered requests", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            "glmimg_request_seconds", "From request to end of answer", ["route"], buckets=SECONDS, registry=registry
        )
        self.waited = Histogram("glmimg_queue_seconds", "Time in the queue", buckets=SECONDS, registry=registry)
        self.pictures = Counter("glmimg_pictures", "Finished pictures", registry=registry)
        self.tokens = Counter("glmimg_tokens", "Tokens drawn", registry=registry)
        self.steps = Counter("glmimg_decoder_steps", "Steps of the decoder", registry=registry)
        self.busy = Counter("glmimg_machine_seconds", "Seconds of the machine spent on pictures", registry=registry)
        self.cancelled = Counter("glmimg_cancelled", "Requests whose client went away", registry=registry)
        self.restarts = Counter("glmimg_worker_restarts", "Times the worker had to be started again", registry=registry)
        self.waiting = Gauge("glmimg_waiting_requests", "Requests in the queue", registry=registry)
        self.running = Gauge("glmimg_running_requests", "Requests at the worker", registry=registry)
        self.batch = Gauge("glmimg_token_batch", "Pictures whose tokens are drawn together", registry=registry)
        self.memory = Gauge("glmimg_worker_memory_bytes", "Memory that the worker holds", registry=registry)
        self.ready = Gauge("glmimg_ready", "1 when pictures can be made", registry=registry)

    def text(self) -> bytes:
        return generate_latest(self.registry)


@dataclass
class Totals:
    """What was made for one key; energy in Wh and cost only where the server was told the prices."""

    requests: int = 0
    pictures: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    energy_wh: float = 0.0
    cost: float = 0.0

    def add(self, other: Totals) -> None:
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))

    def to_dict(self) -> dict[str, float]:
        return {one.name: round(getattr(self, one.name), 6) for one in fields(self)}


@dataclass
class Ledger:
    """Totals by key; with a file they outlive the server. BadInput if that cannot be written at first; later it is told
    in the log."""

    path: Path | None = None
    totals: dict[str, Totals] = field(default_factory=dict)
    _new: dict[str, Totals] = field(default_factory=dict, repr=False)  # what is not in the file yet
    _writing: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _adding: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        if self.path is None:
            return
        try:
            self.totals = self._added(self.path, {})  # a file that cannot be written is told now, not in a log
        except BadInput as error:
            raise BadInput(f"{self.path} cannot keep the usage: {error}") from error
        except (OSError, ValueError) as error:
            advice = "name another file, or move this one away"
            raise BadInput(f"{self.path} is no file of usage ({error}): {advice}") from error

    @staticmethod
    def _stored(path: Path) -> dict[str, Totals]:
        rows = parse_json(path.read_text(encoding="utf-8"))
        try:
            stored = {name: Totals(**row) for name, row in rows.items()}
            if not all(math.isfinite(sum(vars(one).values())) for one in stored.values()):
                raise ValueError("a number is infinite, or none")
        except (AttributeError, TypeError, OverflowError) as error:
            raise ValueError(error) from error
        return stored

    @classmethod
    def _added(cls, path: Path, new: Mapping[str, Totals]) -> dict[str, Totals]:
        """What the file holds then."""
        with locked(path.with_name(f".{path.name}.lock")):  # another server may write there too
            stored = cls._stored(path) if path.exists() else {}
            for name, amount in new.items():
                stored.setdefault(name, Totals()).add(amount)
            rows = {name: one.to_dict() for name, one in stored.items()}
            write_text(path, json.dumps(rows, indent=2))
        return stored

    def add(self, client: str, amount: Totals) -> None:
        with self._adding:
            self.totals.setdefault(client, Totals()).add(amount)
            self._new.setdefault(client, Totals()).add(amount)

    def save(self) -> None:
        """Writes what has changed; may be called in any thread."""
        with self._writing:
            if self.path is None or not self._new:
                return
            with self._adding:
                new, self._new = self._new, {}
            try:
                self._added(self.path, new)
            except (GlmimgError, OSError, ValueError) as error:
                with self._adding:
                    for name, amount in self._new.items():
                        new.setdefault(name, Totals()).add(amount)
                    self._new = new
                logger.error("the usage was not written, and is kept for the next time: %s", error)
