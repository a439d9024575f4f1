"""Load on a server that is running: are all replies right, how long do they take, does the memory stay level?

    glmimg serve --dtype fp32 &
    python benchmarks/serve_load.py --clients 16 --seconds 180

Every client asks again and again; every picture is compared with the one that the same seed gave before, one at a time.
(In bf16, rounding that depends on the batch can change a token.) Also measured: tokens a second with 8 requests in
flight against one at a time. The exit status is 1 if a reply was wrong, failed or lost, if those 8 were not drawn four
times as fast, or if the worker's memory grew after it had warmed up.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import sys
import time
from typing import Any

import httpx

SEEDS = 6  # different requests; each is made alone first
GAIN = 4.0  # aim: tokens a second of 8 in flight over those of one
GROWTH = 1.05  # aim: memory at most, last quarter over second quarter


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", help="an API key, if the server has keys")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--size", default="auto")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--json", action="store_true", help="print one object for programs")
    arguments = parser.parse_args()
    headers = {"Authorization": f"Bearer {arguments.key}"} if arguments.key else {}
    # No connection is used again that the server may be about to close for having been idle: it would look like a loss.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2)
    async with httpx.AsyncClient(base_url=arguments.url, headers=headers, timeout=900, limits=limits) as http:
        report = await measure(http, arguments)
    if arguments.json:
        print(json.dumps(report))
    else:
        print("\n".join(f"{name:<32}{value}" for name, value in report.items()))
    missed = [name for name in ("wrong", "failed", "lost") if report[name]]
    missed += [] if report["gain of the token batch"] >= GAIN else [f"gain of the token batch below {GAIN:g}"]
    missed += [] if report["worker memory, growth"] <= GROWTH else [f"worker memory, growth above {GROWTH:g}"]
    print("\n".join(f"missed: {aim}" for aim in missed) or "every aim was met", file=sys.stderr)
    return int(bool(missed))


def body(seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    prompt = f"a small {('red', 'green', 'blue')[seed % 3]} boat{' on a lake' * (seed % 2)}"
    fields = {"prompt": prompt, "seed": seed, "size": arguments.size, "steps": arguments.steps}
    return {name: value for name, value in fields.items() if value is not None}


async def measure(http: httpx.AsyncClient, arguments: argparse.Namespace) -> dict[str, Any]:
    alone: dict[int, str] = {}
    single: list[float] = []
    for seed in range(SEEDS):
        began = time.perf_counter()
        reply = await http.post("/v1/images/generations", json=body(seed, arguments))
        reply.raise_for_status()
        single.append(time.perf_counter() - began)
        alone[seed] = reply.json()["data"][0]["b64_json"]

    seconds: list[float] = []
    counts = {"right": 0, "wrong": 0, "refused": 0, "failed": 0, "lost": 0}
    memory: list[float] = []
    end = time.monotonic() + arguments.seconds

    async def client(number: int) -> None:
        numbers = random.Random(number)
        while time.monotonic() < end:
            seed, began = numbers.randrange(SEEDS), time.perf_counter()
            try:
                reply = await http.post("/v1/images/generations", json=body(seed, arguments))
            except httpx.HTTPError:
                counts["lost"] += 1
                continue
            if reply.status_code in (429, 503):
                counts["refused"] += 1
                await asyncio.sleep(min(5.0, float(reply.headers.get("Retry-After", 1))))
                continue
            if reply.status_code != 200:
                counts["failed"] += 1
                print(reply.text, file=sys.stderr)
                continue
            seconds.append(time.perf_counter() - began)
            counts["right" if reply.json()["data"][0]["b64_json"] == alone[seed] else "wrong"] += 1

    async def watch() -> None:
        while time.monotonic() < end:
            found = re.search(r"^glmimg_worker_memory_bytes (\S+)", (await http.get("/metrics")).text, re.MULTILINE)
            if found is None:
                raise SystemExit("the server does not tell its worker's memory")
            memory.append(float(found[1]))
            await asyncio.sleep(2)

    began = time.perf_counter()
    await asyncio.gather(watch(), *(client(k) for k in range(arguments.clients)))
    elapsed = time.perf_counter() - began
    one, eight = await layouts(http, arguments, 1), await layouts(http, arguments, 8)
    quarter = max(1, len(memory) // 4)
    early, late = max(memory[quarter : 2 * quarter] or memory), max(memory[-quarter:])
    return {
        **counts,
        "pictures a second": round((counts["right"] + counts["wrong"]) / elapsed, 3),
        "one at a time, median s": round(statistics.median(single), 3),
        f"{arguments.clients} clients, median s": round(statistics.median(seconds), 3) if seconds else None,
        f"{arguments.clients} clients, p95 s": round(_p95(seconds), 3) if seconds else None,
        "worker memory, 2nd quarter MB": round(early / 1e6),
        "worker memory, last quarter MB": round(late / 1e6),
        "worker memory, growth": round(late / early, 3),
        "tokens/s, one in flight": round(one, 1),
        "tokens/s, 8 in flight": round(eight, 1),
        "gain of the token batch": round(eight / one, 2),
    }


async def layouts(http: httpx.AsyncClient, arguments: argparse.Namespace, in_flight: int) -> float:
    """Tokens a second of requests for layouts alone."""
    fields = {name: value for name, value in body(1, arguments).items() if name != "steps"}
    tokens, began = 0, time.perf_counter()

    async def ask(seed: int) -> int:
        reply = await http.post("/v1/images/layouts", json=fields | {"seed": seed})
        reply.raise_for_status()
        return int(reply.json()["usage"]["output_tokens"])

    rounds = 3 if in_flight > 1 else 6
    for k in range(rounds):
        tokens += sum(await asyncio.gather(*(ask(100 * k + seed) for seed in range(in_flight))))
    return tokens / (time.perf_counter() - began)


def _p95(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.95 * len(values)))]


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
