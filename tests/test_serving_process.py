"""`glmimg serve` as a process: signals, a full disk, and that nothing of it is left behind."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
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

from glmimg.serving.auth import add_key

pytest.importorskip("uvicorn")
if sys.platform != "linux":
    pytest.skip("reads /proc", allow_module_level=True)

PLAIN = {"prompt": "a cat", "size": "64x64", "steps": 2, "seed": 5}


@contextmanager
def started(folder: Path, *flags: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "glmimg.cli", "serve", "--port", "0", "--backend", "cpu", *flags]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | environment
        )
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


def test_the_embedded_model_with_keys_and_rules(tmp_path: Path) -> None:
    """As whoever installs it would use it: OpenAI's client, curl, two keys, rules; and no prompt in the log."""
    openai = pytest.importorskip("openai")
    ada, bob = (add_key(tmp_path / "keys.json", name) for name in ("ada", "bob"))
    rules = "def picture(image):\n    return 'too narrow' if image.width < image.height else None\n"
    (tmp_path / "rules.py").write_text(rules)
    flags = ["--keys", "keys.json", "--max-batch", "1", "--picture-rules", "rules:picture", "--dtype", "fp32"]
    with started(tmp_path, *flags) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=ada, max_retries=0, timeout=300)
        prompt, small = "a secret red boat", {"seed": 7, "steps": 1}
        reply = client.images.generate(prompt=prompt, size="64x64", extra_body=small)
        assert reply.data and reply.data[0].b64_json and reply.model_dump()["data"][0]["seed"] == 7
        with pytest.raises(openai.BadRequestError, match="too narrow"):
            client.images.generate(prompt=prompt, size="64x96", extra_body=small)
        usage = httpx.get(f"{url}/v1/usage", headers={"Authorization": f"Bearer {ada}"}).json()
        assert usage["pictures"] == 2, "one that the rules refuse was made all the same"
        if shutil.which("curl"):
            body = json.dumps({"prompt": prompt, "size": "64x64", **small})
            command = ["curl", "-sS", f"{url}/v1/images/generations", "-H", f"Authorization: Bearer {ada}"]
            command += ["-H", "Content-Type: application/json", "-d", body]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            assert json.loads(told)["data"][0]["b64_json"] == reply.data[0].b64_json

        async def burst() -> list[str]:
            ended: list[str] = []

            async def ask(http: httpx.AsyncClient, name: str, key: str) -> None:
                body = {"prompt": prompt, "size": "64x64", **small}
                headers = {"Authorization": f"Bearer {key}"}
                (await http.post(f"{url}/v1/images/generations", json=body, headers=headers)).raise_for_status()
                ended.append(name)

            async with httpx.AsyncClient(timeout=300) as http:
                first = [asyncio.create_task(ask(http, "ada", ada)) for _ in range(8)]
                while not ended:
                    await asyncio.sleep(0.01)
                await asyncio.gather(*first, ask(http, "bob", bob))
            return ended

        assert asyncio.run(burst()).index("bob") < 6, "a burst delays its own requests alone"
    log = (tmp_path / "log").read_text()
    assert "ada POST /v1/images/generations 200" in log and "secret" not in log


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


def test_it_can_be_stopped_while_the_model_loads(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "transformers.py").write_text("import time\ntime.sleep(600)\n", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with started(tmp_path, "--model", str(tiny_checkpoint), PYTHONPATH=path) as process:
        began = time.monotonic()
        while not (workers := children(process.pid)):
            assert process.poll() is None and time.monotonic() - began < 60
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 130 and gone(workers)


def write_noise(path: Path) -> None:
    from PIL import Image

    Image.frombytes("RGB", (700, 700), os.urandom(700 * 700 * 3)).save(path)
