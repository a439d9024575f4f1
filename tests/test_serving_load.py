"""Many clients of one server at once: mixed replies, a full queue, clients that go, a worker that dies, the end."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from glmimg.pipelines.text_to_image import TextToImagePipeline
from glmimg.serving.settings import ServerSettings

pytest.importorskip("uvicorn")

SIZE = "64x64"
PLAIN = {"prompt": "a cat", "size": SIZE, "steps": 2, "seed": 5}


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, serve: Any) -> Iterator[Any]:
    server = serve(ServerSettings(model=str(tiny_checkpoint), backend="cpu", dtype="fp32", max_queue=12))
    yield server
    server.stop()


def pixels(image: Image.Image) -> Any:
    return np.asarray(image.convert("RGB")).astype(int)


def test_no_reply_is_mixed_up(server: Any, tiny_checkpoint: Path) -> None:
    async def all_of_them() -> list[Any]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
            bodies = [PLAIN | {"seed": 100 + k, "prompt": f"a cat{' and a dog' * (k % 3)}"} for k in range(10)]
            return await asyncio.gather(*(http.post("/v1/images/generations", json=body) for body in bodies))

    replies = asyncio.run(all_of_them())
    pipeline = TextToImagePipeline.from_pretrained(tiny_checkpoint, backend="cpu", dtype="fp32")
    for k, reply in enumerate(replies):
        item = reply.json()["data"][0]
        prompt = f"a cat{' and a dog' * (k % 3)}"
        alone = pipeline(prompt, height=64, width=64, num_inference_steps=2, seed=100 + k).images[0]
        assert item["seed"] == 100 + k
        assert np.abs(pixels(Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))) - pixels(alone)).max() <= 2


def test_a_full_queue_and_clients_that_go_away(server: Any) -> None:
    slow = PLAIN | {"steps": 1000, "n": 8}
    dispatcher = server.service.dispatcher
    booked = httpx.get(f"{server.url}/v1/usage").json()

    async def scene() -> tuple[httpx.Response, httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
            tasks = [asyncio.create_task(http.post("/v1/images/generations", json=slow)) for _ in range(3)]
            while sum(t.job.n for t in dispatcher.queue.order()) < 8:
                await asyncio.sleep(0.02)
            full = await http.post("/v1/images/generations", json=slow)
            for task in tasks:
                task.cancel()
            storm = []
            for _ in range(30):
                storm.append(asyncio.create_task(http.post("/v1/images/generations", json=slow | {"n": 1})))
                await asyncio.sleep(0.01)
                storm[len(storm) // 2].cancel()
            for task in storm:
                task.cancel()
            began = time.monotonic()
            while dispatcher.running or len(dispatcher.queue):
                assert time.monotonic() - began < 60
                await asyncio.sleep(0.02)
            return full, await http.post("/v1/images/generations", json=PLAIN)

    full, after = asyncio.run(scene())
    assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1 and after.status_code == 200
    assert full.json()["error"]["code"] == "queue_full"
    # What nobody waited for was work as well: beside the one picture at the end there are tokens of others.
    usage, one = httpx.get(f"{server.url}/v1/usage").json(), after.json()["usage"]
    assert usage["pictures"] == booked["pictures"] + 1 and usage["requests"] > booked["requests"] + 1
    assert usage["tokens"] > booked["tokens"] + one["output_tokens"]
    assert usage["seconds"] > booked["seconds"] + one["seconds"]


def test_a_killed_worker_costs_nobody_the_picture(server: Any) -> None:
    dispatcher = server.service.dispatcher
    before = httpx.post(f"{server.url}/v1/images/generations", json=PLAIN | {"steps": 60}, timeout=120).json()

    async def scene() -> httpx.Response:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
            task = asyncio.create_task(http.post("/v1/images/generations", json=PLAIN | {"steps": 60}))
            while not dispatcher.running:
                await asyncio.sleep(0.005)
            os.kill(dispatcher.about["pid"], signal.SIGKILL)
            return await task

    reply = asyncio.run(scene())
    assert reply.status_code == 200 and dispatcher.restarts == 1
    assert reply.json()["data"][0]["b64_json"] == before["data"][0]["b64_json"]
    assert "glmimg_worker_restarts_total 1.0" in httpx.get(f"{server.url}/metrics").text


def test_stopping_takes_nothing_new_and_tells_the_rest(server: Any) -> None:
    """The last test here: afterwards this server takes no more requests."""
    dispatcher = server.service.dispatcher

    async def scene() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
            post = partial(http.post, "/v1/images/generations")
            quick = asyncio.create_task(http.post("/v1/images/layouts", json={"prompt": "a cat", "size": SIZE}))
            slow = asyncio.create_task(post(json=PLAIN | {"steps": 1000, "n": 8}))
            while len(dispatcher.running) < 2:
                await asyncio.sleep(0.005)
            draining = asyncio.run_coroutine_threadsafe(dispatcher.drain(5.0), dispatcher._loop)
            while dispatcher.state != "draining":
                await asyncio.sleep(0.01)
            replies = [await http.get("/ready"), await post(json=PLAIN), await quick, await slow]
            await asyncio.wrap_future(draining)
            return replies

    ready, late, quick, slow = asyncio.run(scene())
    assert ready.status_code == 503 and ready.json()["state"] == "draining"
    assert (late.status_code, quick.status_code, slow.status_code) == (503, 200, 503)
    assert late.headers["retry-after"] and "stopped before the picture was done" in slow.json()["error"]["message"]
