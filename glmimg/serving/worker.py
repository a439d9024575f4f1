"""The process that owns the model. It ends when its pipe does, so that none is ever left behind."""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
import time
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
    from glmimg.serving.messages import refusal

    told = 0.0
    while True:
        if time.monotonic() - told >= STATS_EVERY:
            told = time.monotonic()
            send({"type": "stats", "rss": _resident(), "batch": engine.drawn_together})
        try:
            if not connection.poll(STATS_EVERY):
                continue
            kind, *rest = connection.recv()
        except (EOFError, OSError):
            break
        if kind == "stop":
            break
        if kind == "cancel":
            engine.cancel(rest[0])
            continue
        job: Job = rest[0]
        try:
            if kind == "run":
                engine.run(job)
            else:
                work = engine.check(job)
                tokens = sum(h * w for h, w in work.request_grids) * work.request.pictures
                about = {"patches": work.request.patches, "width": work.request.config.width}
                about["reference_tokens"] = sum(w * h for row in work.request.references for w, h in row) // 1024
                about |= {"tokens": tokens, "prompt_tokens": work.prompt_tokens, "height": work.request.config.height}
                send({"type": "checked", "id": job.id, "steps": work.request.config.num_inference_steps, **about})
        except Exception as error:
            if not isinstance(error, GlmimgError):
                logger.exception("a request could not be checked")
            send(refusal(job, error))
            if kind == "run":
                send({"type": "ended", "id": job.id})
    engine.stop()


def _open(
    settings: ServerSettings, send: Any, first_picture: queue.Queue[dict[str, Any]]
) -> tuple[Any, dict[str, Any]]:
    from glmimg.checkpoint import Checkpoint
    from glmimg.diffusion import SAMPLERS
    from glmimg.pipelines.request import default_config
    from glmimg.pipelines.stages import Stages
    from glmimg.serving.engine import Engine

    backend: str | dict[str, str] = settings.backend
    if "=" in settings.backend:
        backend = dict(part.strip().split("=", 1) for part in settings.backend.split(","))
    stages = Stages(Checkpoint.open(settings.model), backend, settings.dtype, settings.offload, settings.compile)
    engine = Engine(stages, settings.name, settings.max_batch, send)
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
        "dtype": {stage: str(dtype).removeprefix("torch.") for stage, dtype in stages.dtypes.items()},
        "budget": None if engine.budget is None else int(engine.budget),
        "pid": os.getpid(),
    }
    return engine, about


def _resident() -> int | None:
    """Bytes of memory that this process holds, where the system tells."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
