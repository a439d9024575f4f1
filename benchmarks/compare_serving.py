"""glmimg serve against the obvious alternative, on the same checkpoint: diffusers' pipeline behind FastAPI with a lock.

    python benchmarks/compare_serving.py --clients 8 --requests 32

Both servers are started here, one after the other, and get the same requests: steps, size, prompt, guidance and dtype
are equal, and so is the number of tokens that a picture needs.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import httpx

GUIDANCE = 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded", help="a folder, or the embedded model")
    parser.add_argument("--clients", type=int, default=8, help="requests in flight")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--size", default="256x256")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--device", default="cpu", help="where both run")
    parser.add_argument("--json", action="store_true", help="print one object for programs")
    parser.add_argument("--diffusers-on", type=int, help=argparse.SUPPRESS)  # be the alternative, on that port
    arguments = parser.parse_args()
    if arguments.diffusers_on:
        serve_diffusers(arguments)
        return
    report = {}
    for name in ("glmimg", "diffusers"):
        port = _free_port()
        command = [sys.executable, __file__, "--diffusers-on", str(port), "--model", arguments.model]
        command += ["--dtype", arguments.dtype, "--device", arguments.device]
        if name == "glmimg":
            command = [sys.executable, "-m", "glmimg.cli", "serve", "--port", str(port), "--model", arguments.model]
            command += ["--dtype", arguments.dtype, "--backend", arguments.device]
            command += ["--max-queue", "1000", "--timeout", "3600"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            try:
                report[name] = asyncio.run(measure(f"http://127.0.0.1:{port}", arguments, process))
            finally:
                process.terminate()
    if arguments.json:
        print(json.dumps(report))
        return
    for figure in report["glmimg"]:
        print(f"{figure:<24}" + "".join(f"{name} {values[figure]:<14}" for name, values in report.items()))


async def measure(url: str, arguments: argparse.Namespace, process: Any) -> dict[str, float]:
    async with httpx.AsyncClient(base_url=url, timeout=3600) as http:
        while True:
            try:
                if (await http.get("/ready")).status_code == 200:
                    break
            except httpx.TransportError:
                if process.poll() is not None:
                    raise SystemExit("the server ended: see above") from None
            await asyncio.sleep(0.5)
        seconds: list[float] = []
        todo = iter(range(arguments.requests))

        async def ask(seed: int) -> None:
            fields: dict[str, Any] = {
                "prompt": "a red boat",
                "seed": seed,
                "steps": arguments.steps,
                "size": arguments.size,
                "guidance": GUIDANCE,
                "token_candidates": 1,  # as the alternative
                "sampler": "euler",
            }
            began = time.perf_counter()
            (await http.post("/v1/images/generations", json=fields)).raise_for_status()
            seconds.append(time.perf_counter() - began)

        async def client() -> None:
            for seed in todo:
                await ask(seed)

        await ask(10**6)
        seconds.clear()
        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(arguments.clients)))
        elapsed = time.perf_counter() - began
    ordered = sorted(seconds)
    return {
        "pictures a minute": round(60 * arguments.requests / elapsed, 2),
        "median s": round(ordered[len(ordered) // 2], 3),
        "p95 s": round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 3),
    }


def serve_diffusers(arguments: argparse.Namespace) -> None:
    """What one writes in ten minutes: a pipeline, a lock, a route."""
    import torch
    import uvicorn
    from diffusers.pipelines.glm_image.pipeline_glm_image import GlmImagePipeline
    from fastapi import FastAPI

    from glmimg.checkpoint import Checkpoint
    from glmimg.token_grid import preview_grid

    checkpoint = Checkpoint.open(arguments.model)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    pipeline = GlmImagePipeline.from_pretrained(checkpoint.root, torch_dtype=dtype).to(arguments.device)
    pipeline.set_progress_bar_config(disable=True)
    # Left alone it announces a preview grid of the published size, and would draw more tokens than ours.
    if not hasattr(pipeline.processor, "_get_target_shape"):
        raise SystemExit("this version of transformers computes the preview grid elsewhere: use 5.23")
    side = checkpoint.settings.preview_side
    pipeline.processor._get_target_shape = lambda height, width: (
        height // 32, width // 32, *preview_grid(height, width, side)
    )  # fmt: skip
    app, lock = FastAPI(), threading.Lock()

    @app.get("/ready")
    def ready() -> dict[str, bool]:
        return {"ready": True}

    @app.post("/v1/images/generations")
    def generate(body: dict[str, Any]) -> dict[str, Any]:
        width, height = map(int, body["size"].split("x"))
        with lock, torch.no_grad():
            image = pipeline(
                body["prompt"],
                width=width,
                height=height,
                num_inference_steps=body["steps"],
                guidance_scale=body["guidance"],
                generator=torch.Generator().manual_seed(body["seed"]),
            ).images[0]
        data = io.BytesIO()
        image.save(data, "PNG")
        return {"data": [{"b64_json": base64.b64encode(data.getvalue()).decode()}]}

    uvicorn.run(app, port=arguments.diffusers_on, log_level="warning")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
