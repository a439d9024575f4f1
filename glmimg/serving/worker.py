"""The process that owns the model. It ends when its pipe does, so that none is ever left behind."""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from glmimg.errors import GlmimgError
from glmimg.serving.jobs import Job
from glmimg.serving.settings import ServerSettings

__all__ = ["main"]

STATS_EVERY = 1.0  # seconds
WARM_UP = "warm-up"

logger = logging.getLogger(__name__)


def main(connection: Connection, settings: ServerSettings) -> None:
    """Loads, draws a picture to see that everything works, says so, and takes jobs until it is told to stop."""
    for name in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the front says when it is time
        signal.signal(name, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="glmimg worker: %(message)s")
    lock = threading.Lock()
    first_picture: queue.Queue[dict[str, Any]] = queue.Queue()

    def send(message: dict[str, Any]) -> None:
        if message.get("id") == WARM_UP:
            first_picture.put(message)
            return
        with lock:
            try:
                connection.send(message)
            except (BrokenPipeError, ConnectionError):
                os._exit(1)  # the front is gone: nobody is there to hear of anything

    try:
        engine, about = _open(settings, send, first_picture)
    except Exception as error:
        if not isinstance(error, GlmimgError):
            logger.exception("the model could not be started")
        send({"type": "broken", "message": f"{error}" if isinstance(error, GlmimgError) else repr(error)})
        return
    send({"type": "ready", **about})
    from glmimg.backends import pick_backend

    desk, processor = _Desk(engine, send), pick_backend("cpu")
    told = 0.0
    while True:
        if time.monotonic() - told >= STATS_EVERY:
            told = time.monotonic()
            rss = processor.memory().allocated
            send({"type": "stats", "rss": rss, "batch": engine.drawn_together, "taken": engine.taken()})
        try:
            if not connection.poll(STATS_EVERY):
                continue
            kind, *rest = connection.recv()
        except (EOFError, OSError):
            break
        if kind == "stop":
            break
        if kind == "cancel":
            desk.cancel(rest[0])
        else:
            desk.take(kind, rest[0])
    desk.close()
    engine.stop()


class _Desk:
    """Looks through jobs in a thread of its own: pictures that are read for one keep no cancellation waiting."""

    def __init__(self, engine: Any, send: Callable[[dict[str, Any]], None]) -> None:
        self.engine, self.send = engine, send
        self._coming: set[str] = set()  # to be run, and not with the engine yet
        self._checked: Any = None  # the last one: mostly it is run next, and its pictures are read once
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "desk")

    def take(self, kind: str, job: Job) -> None:
        if kind == "run":
            self._coming.add(job.id)
        self._thread.submit(self._run if kind == "run" else self._check, job)

    def cancel(self, job_id: str) -> None:
        with self._lock:
            if job_id in self._coming:
                self._coming.discard(job_id)  # its end is sent when its turn comes
                return
        self.engine.cancel(job_id)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _check(self, job: Job) -> None:
        try:
            work = self.engine.check(job)
        except Exception as error:
            self._refuse(job, error)
            return
        self._checked = work
        config, sizes = work.request.config, [size for row in work.request.references for size in row]
        self.send(
            {
                "type": "checked",
                "id": job.id,
                "tokens": work.new_tokens * work.request.pictures,
                "prompt_tokens": work.prompt_tokens,
                "reference_tokens": sum(w * h for w, h in sizes) // 1024,
                "steps": config.num_inference_steps,
                "patches": work.request.patches,
                "candidates": work.request.candidates,
                "width": config.width,
                "height": config.height,
            }
        )

    def _run(self, job: Job) -> None:
        checked, self._checked = self._checked, None
        try:
            if job.id in self._coming:
                work = checked if checked is not None and checked.job.id == job.id else self.engine.check(job)
                with self._lock:
                    if job.id in self._coming:
                        self._coming.discard(job.id)
                        self.engine.run(job, work)
                        return
        except Exception as error:
            self._coming.discard(job.id)
            self._refuse(job, error)
        self.send({"type": "ended", "id": job.id})

    def _refuse(self, job: Job, error: Exception) -> None:
        from glmimg.serving.messages import refusal

        if not isinstance(error, GlmimgError):
            logger.exception("a request could not be checked", exc_info=error)
        self.send(refusal(job, error))


def _open(
    settings: ServerSettings, send: Any, first_picture: queue.Queue[dict[str, Any]]
) -> tuple[Any, dict[str, Any]]:
    from glmimg.backends import parse_backend
    from glmimg.checkpoint import EMBEDDED, Checkpoint
    from glmimg.diffusion import SAMPLERS
    from glmimg.pipelines.request import default_config
    from glmimg.pipelines.stages import Stages
    from glmimg.serving.engine import Engine

    backend = parse_backend(settings.backend)
    stages = Stages(Checkpoint.open(settings.model), backend, settings.dtype, settings.offload, settings.compile)
    # The name that pictures carry: whoever repeats one with `glmimg generate --from` opens it.
    engine = Engine(stages, EMBEDDED if settings.model == EMBEDDED else settings.name, settings.max_batch, send)
    defaults, limits = default_config(stages), stages.checkpoint.settings
    decoder = stages.backends["decoder"]
    before = 0
    for _ in range(2):  # the first one loads, the second one shows what a picture takes
        decoder.reset_peak()
        before = decoder.memory().allocated
        engine.run(Job("a red circle", options={"num_inference_steps": 1}, id=WARM_UP))
        while (message := first_picture.get())["type"] != "ended":
            if message["type"] == "refused":
                raise GlmimgError(f"no picture could be drawn to try the model: {message['message']}")
    engine.measured(decoder.memory().peak - before, defaults.width * defaults.height // 256)
    about = {
        "defaults": defaults.to_dict(),
        "min_size": limits.min_size,
        "max_size": limits.max_size,
        "samplers": sorted(SAMPLERS),
        "codebook": stages.codebook,
        "codebook_size": limits.codebook_size,
        "checkpoint": stages.checkpoint.hash,
        "backend": {stage: str(place.device) for stage, place in stages.backends.items()},
        "dtype": stages.precisions,
        "budget": None if engine.budget is None else int(engine.budget),
        "pid": os.getpid(),
    }
    return engine, about
