"""A worker process without a model, that does what its jobs say: each fault is exact and quick."""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Connection
from pathlib import Path

from glmimg.serving.jobs import Job
from glmimg.serving.settings import ServerSettings


def main(connection: Connection, settings: ServerSettings) -> None:
    """Stands in for worker.main. `model` is what it does at its start, a job's prompt what it does with the job.

    It answers only when nothing more has come for a moment, so that everything that was sent is under way together.
    """
    began = Path(settings.usage_file or os.devnull)
    if settings.model == "loads for ever":
        time.sleep(600)
    if settings.model == "starts once" and began.exists():
        os._exit(3)
    if settings.model == "hangs the second time" and began.exists():
        began.unlink()
        time.sleep(600)
    if settings.usage_file:
        began.touch()
    connection.send({"type": "ready", "pid": os.getpid()})
    jobs: list[Job] = []
    while True:
        if not connection.poll(0.1):
            taken = {job.id: {"seconds": 1.5, "drawn": 7, "steps": 0} for job in jobs}
            connection.send({"type": "stats", "rss": 1, "batch": len(jobs), "taken": taken})
            for job in jobs:
                if job.prompt != "never":
                    connection.send({"type": "picture", "id": job.id, "picture": 0, "data": job.prompt.encode()})
                    connection.send({"type": "ended", "id": job.id})
            jobs = [job for job in jobs if job.prompt == "never"]
            continue
        kind, *rest = connection.recv()
        if kind == "stop":
            return
        if kind == "check":
            layouts = rest[0].options.get("token_candidates", 1)
            checked = {"id": rest[0].id, "patches": 1, "candidates": layouts, "steps": 1, "rss": None}
            connection.send({"type": "checked"} | checked)
        elif kind == "run":
            jobs.append(rest[0])
            if rest[0].prompt == "die":
                os._exit(9)
            if rest[0].prompt == "hang":
                time.sleep(600)
        else:
            jobs = [job for job in jobs if job.id != rest[0]]
            connection.send({"type": "ended", "id": rest[0]})
