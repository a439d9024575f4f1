"""Two nodes of Ray on this machine, a replica on each: are pictures right, and do requests go on when a node dies?

    pip install '.[cluster]' openai
    python benchmarks/ray_two_nodes.py

Everything listens to the loopback address. Prints what was seen; the exit status is 1 if something was not as it
should be.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import socket
import sys
import time
from collections import Counter
from typing import Any

import httpx

# Read when ray is imported: nothing is reported to anybody; 127.0.0.1 is not replaced by the machine's own address; and
# the one proxy gives work to both nodes, not to its own alone until that is full, and asks again when a replica dies.
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
os.environ["RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING"] = "0"
os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = "glmimg.serving.ray_proxy:middlewares"
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.context import _get_global_client

from glmimg.serving.cluster import build

PREFIX = "/pictures"
missed: list[str] = []


def see(what: str, fine: bool = True) -> None:
    print(("" if fine else "NOT AS IT SHOULD BE: ") + what, flush=True)
    if not fine:
        missed.append(what)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded", help="a folder, or the embedded model")
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    here = {"node_ip_address": "127.0.0.1", "num_cpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=here)
    try:
        second = cluster.add_node(**here)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        # One processor for each node and each replica: two replicas need both. As text, as `serve run` hands it over.
        given = {"model": arguments.model, "dtype": "fp32", "replicas": "2", "cpus": "1", "max_queue": "16"}
        began = time.monotonic()
        serve.run(build(given), name="glmimg", route_prefix=PREFIX)
        see(f"two replicas up after {time.monotonic() - began:.0f} s")
        nodes = Counter(one["node_id"] for one in replicas())
        see(f"replicas by node: {sorted(nodes.values())}", sorted(nodes.values()) == [1, 1])
        asyncio.run(scene(f"http://127.0.0.1:{port}{PREFIX}", arguments, cluster, second, here))
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()
    print("everything was as it should be" if not missed else f"{len(missed)} things were not as they should be")
    return int(bool(missed))


def replicas(wanted: int | None = None) -> list[dict[str, Any]]:
    """Those that run; waits until there are `wanted` ones."""
    while True:
        client: Any = _get_global_client()
        found = client.get_serve_details()["applications"]["glmimg"]["deployments"]["Glmimg"]["replicas"]
        running = [one for one in found if one["state"] == "RUNNING"]
        if wanted is None or len(running) == wanted:
            return running
        time.sleep(0.2)


async def scene(url: str, arguments: argparse.Namespace, cluster: Cluster, second: Any, here: dict[str, Any]) -> None:
    plain = {"prompt": "a red boat", "steps": arguments.steps}
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:

        async def ask(seed: int) -> tuple[int, str]:
            try:
                reply = await http.post("/v1/images/generations", json=plain | {"seed": seed})
            except httpx.HTTPError as error:
                return 0, type(error).__name__
            return reply.status_code, reply.json()["data"][0]["b64_json"] if reply.status_code == 200 else reply.text

        # 1. Both work, and a seed is the same picture on either.
        replies = await asyncio.gather(*(ask(seed % 2) for seed in range(12)))
        see(f"12 requests for 2 seeds: {statuses(replies)}", statuses(replies) == {200: 12})
        different = {seed: len({replies[k][1] for k in range(12) if k % 2 == seed}) for seed in (0, 1)}
        see(f"different pictures of each seed: {different}", different == {0: 1, 1: 1})
        made = {}
        for _ in range(40):  # whichever replica answers
            text = (await http.get("/metrics")).text
            made[figure(text, "glmimg_machine_seconds_total")] = int(figure(text, "glmimg_pictures_total"))
        see(f"pictures made by each replica: {list(made.values())}", len(made) == 2 and sum(made.values()) == 12)
        paths = ("/", "/page/app.js", "/docs", "/openapi.json", "/v1/models")
        found = {path: (await http.get(path)).status_code for path in paths}
        see(f"the page and its parts, below {PREFIX}: {found}", set(found.values()) == {200})

        # 2. OpenAI's client, and its events, through Ray's proxy.
        await asyncio.to_thread(with_openai, url, arguments)

        # 3. Somebody goes away in the middle of a stream: the replica is free again.
        slow = plain | {"steps": 1000, "stream": True, "progress": True}
        async with http.stream("POST", "/v1/images/generations", json=slow) as response:
            async for line in response.aiter_lines():
                if '"decoder"' in line:
                    break
        cancelled, end = 0.0, time.monotonic() + 30
        while not cancelled and time.monotonic() < end:
            cancelled = figure((await http.get("/metrics")).text, "glmimg_cancelled_total")
        see(f"requests given up after their client had gone: {cancelled:g}", cancelled == 1)

        # 4. A node dies under load: everybody is answered, and requests go on.
        asked = []
        for seed in range(8):
            asked.append(asyncio.create_task(ask(seed % 2)))
            await asyncio.sleep(0.2)
        (doomed,) = (one for one in replicas() if one["node_id"] == second.node_id)
        actor = ray.get_actor(doomed["actor_name"], namespace="serve")
        lost = await actor.get_num_ongoing_requests.remote()
        await asyncio.to_thread(cluster.remove_node, second, allow_graceful=False)
        outcomes = await asyncio.gather(*asked)
        known = {text for _, text in replies}
        fine = all(text in known if status == 200 else status == 503 and '"code":' in text for status, text in outcomes)
        see(f"8 requests while a node was killed that had {lost} of them: {statuses(outcomes)}", fine and lost > 0)
        for text in {f"  {status}: {text[:160]}" for status, text in outcomes if status != 200}:
            print(text)
        began = time.monotonic()
        later = [await ask(0) for _ in range(4)]
        took = f"{time.monotonic() - began:.1f} s"
        see(f"4 requests afterwards, on one node: {statuses(later)} in {took}", later == [replies[0]] * 4)

        # 5. The replica that is left dies: Ray starts it again. Another node comes: the second replica is back.
        (left,) = await asyncio.to_thread(replicas, 1)
        ray.kill(ray.get_actor(left["actor_name"], namespace="serve"))
        began, refused = time.monotonic(), []
        while (found := await ask(0))[0] != 200 and time.monotonic() - began < 120:
            refused.append(found)
            await asyncio.sleep(1)
        took = f"{time.monotonic() - began:.0f} s"
        see(f"a picture {took} after that replica was killed; before: {statuses(refused)}", found == replies[0])
        cluster.add_node(**here)
        back = await asyncio.to_thread(replicas, 2)
        see(f"replicas by node after one more had come: {sorted(Counter(one['node_id'] for one in back).values())}")
        last = await asyncio.gather(*(ask(0) for _ in range(6)))
        see(f"6 requests: {statuses(last)}", last == [replies[0]] * 6)


def statuses(outcomes: list[tuple[int, str]]) -> dict[int, int]:
    return dict(Counter(status for status, _ in outcomes))


def figure(metrics: str, name: str) -> float:
    found = re.search(rf"^{name} (\S+)", metrics, re.MULTILINE)
    return float(found[1]) if found else 0.0


def with_openai(url: str, arguments: argparse.Namespace) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none needed", max_retries=0)
    extra = {"seed": 3, "steps": arguments.steps}
    reply = client.images.generate(prompt="a red boat", n=2, extra_body=extra)
    stream = client.images.generate(prompt="a red boat", stream=True, partial_images=2, extra_body=extra)
    kinds = [event.type.removeprefix("image_generation.") for event in stream]
    fine = len(reply.data or []) == 2 and kinds == ["partial_image", "partial_image", "completed"]
    see(f"openai's client: {len(reply.data or [])} pictures, then {', '.join(kinds)}", fine)


if __name__ == "__main__":
    sys.exit(main())
