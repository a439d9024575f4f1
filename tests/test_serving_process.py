"""`glmimg serve` as a process: signals, a full disk, and that nothing of it is left behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("uvicorn")
if sys.platform != "linux":
    pytest.skip("reads /proc", allow_module_level=True)

PLAIN = {"prompt": "a cat", "size": "64x64", "steps": 2, "seed": 5}


@contextmanager
def started(folder: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "glmimg.cli", "serve", "--port", "0", "--backend", "cpu", *flags]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def gone(pids: list[int]) -> bool:
    end = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, pids))


def test_under_load_everybody_is_answered_when_it_is_stopped(tiny_checkpoint: Path, tmp_path: Path) -> None:
    import resource

    flags = ["--model", str(tiny_checkpoint), "--dtype", "fp32", "--drain", "2", "--usage-file", "usage.json"]
    with started(tmp_path, *flags) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        workers = children(process.pid)
        assert workers and url.startswith("http://127.0.0.1:")

        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        for pid in (process.pid, *workers):  # nothing can be written any more
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        upload = tmp_path / "large.png"
        write_noise(upload)
        assert upload.stat().st_size > 1 << 20
        form = {"prompt": "the same", "steps": "1", "size": "64x64"}
        with upload.open("rb") as file:
            edited = httpx.post(f"{url}/v1/images/edits", data=form, files={"image": file}, timeout=120)
        assert edited.status_code == 200, edited.text
        for pid in (process.pid, *workers):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)

        async def scene() -> list[Any]:
            async with httpx.AsyncClient(base_url=url, timeout=120) as http:
                quick = [http.post("/v1/images/layouts", json={"prompt": "a cat", "seed": k}) for k in range(4)]
                slow = [http.post("/v1/images/generations", json=PLAIN | {"steps": 1000, "n": 8}) for _ in range(5)]
                stream = http.post("/v1/images/generations", json=PLAIN | {"steps": 1000, "n": 8, "stream": True})
                asked = [asyncio.create_task(one) for one in (*quick, *slow, stream)]
                while "glmimg_waiting_requests 0.0" in (await http.get("/metrics")).text:
                    await asyncio.sleep(0.05)
                process.send_signal(signal.SIGTERM)
                while (await http.get("/ready")).status_code == 200:
                    await asyncio.sleep(0.02)
                late = await http.post("/v1/images/generations", json=PLAIN)
                return [late, *await asyncio.gather(*asked)]

        late, *replies, streamed = asyncio.run(scene())
        assert late.status_code == 503 and late.json()["error"]["code"] == "server_stopping"
        statuses = [reply.status_code for reply in replies]
        assert set(statuses[:4]) <= {200, 503} and statuses[4:] == [503] * 5, statuses
        assert all(reply.json()["error"]["code"] == "server_stopping" for reply in replies if reply.status_code != 200)
        assert streamed.status_code == 200 and streamed.text.count("event: error") == 1
        assert process.wait(30) == 0 and gone(workers)
    made = json.loads((tmp_path / "usage.json").read_text())["local"]
    assert made["requests"] >= 1 + statuses.count(200) and made["pictures"] >= 1


def test_it_can_be_stopped_while_the_model_loads(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model_index.json")  # whoever reads it waits for ever
    with started(tmp_path, "--model", str(tmp_path)) as process:
        while not (workers := children(process.pid)):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 130 and gone(workers)


def write_noise(path: Path) -> None:
    from PIL import Image

    Image.frombytes("RGB", (700, 700), os.urandom(700 * 700 * 3)).save(path)
