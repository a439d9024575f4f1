"""What is ours of the cluster, without Ray; benchmarks/ray_two_nodes.py tries it with Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from glmimg.errors import BadInput
from glmimg.serving.cluster import _arguments
from glmimg.serving.settings import ServerSettings

pytest.importorskip("starlette")
from starlette.responses import JSONResponse, PlainTextResponse, Response

from glmimg.serving import ray_proxy

App = Callable[[Any, Any, Any], Awaitable[None]]


def test_arguments_of_the_cluster() -> None:
    for name in ("host", "port", "root_path", "files", "modle"):
        with pytest.raises(BadInput, match="choose from"):
            _arguments({name: "1"})
    for name, value in (("max_batch", "many"), ("compile", "maybe"), ("replicas", "0"), ("timeout", "long")):
        with pytest.raises(BadInput, match=name):
            _arguments({name: value})
    text = {"max_batch": "4", "timeout": "9.5", "compile": "true", "allow_hosts": "a,b", "keys": "k", "gpus": "0.5"}
    expected = ServerSettings(max_batch=4, timeout=9.5, compile=True, allow_hosts=("a", "b"), keys="k", files=False)
    assert _arguments(text) == ({"replicas": 1, "gpus": 0.5, "cpus": 1.0}, expected)


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """A replica that is well."""
    text = b""
    while True:
        message = await receive()
        text += message["body"]
        if not message.get("more_body"):
            break
    await JSONResponse({"got": text.decode()})(scope, receive, send)


async def dies_early(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    raise RuntimeError("the actor died")


async def says_nothing(scope: Any, receive: Any, send: Any) -> None:
    await receive()


async def dies_in_a_stream(scope: Any, receive: Any, send: Any) -> None:
    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"event: a\ndata: {}\n\n", "more_body": True})


def says(response: Response) -> App:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await response(scope, receive, send)

    return app


def ask(monkeypatch: pytest.MonkeyPatch, *tries: App, size: int = 5) -> tuple[httpx.Response, int]:
    """The reply to a body in two parts where Ray hands one try after the other to these; and how many it had."""
    monkeypatch.setattr(ray_proxy, "PAUSE", 0.0)
    had: list[App] = []

    async def ray(scope: Any, receive: Any, send: Any) -> None:
        had.append(tries[len(had)])
        await had[-1](scope, receive, send)

    async def scene() -> httpx.Response:
        async def body() -> Any:
            yield b"x" * (size // 2)
            yield b"y" * (size - size // 2)

        (around,) = ray_proxy.middlewares()
        transport = httpx.ASGITransport(around.cls(ray), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://ray") as http:
            return await http.post("/", content=body())

    return asyncio.run(scene()), len(had)


@pytest.mark.parametrize("death", [dies_early, says_nothing, says(PlainTextResponse("Internal Server Error", 500))])
def test_what_a_replica_died_of_is_asked_of_another(monkeypatch: pytest.MonkeyPatch, death: App) -> None:
    reply, tries = ask(monkeypatch, death, death, echo)
    assert (reply.status_code, reply.json(), tries) == (200, {"got": "xxyyy"}, 3), "with its whole body"
    reply, tries = ask(monkeypatch, death, death, death)
    assert (reply.status_code, reply.json()["error"]["code"], tries) == (503, "worker_died", 3)
    assert reply.headers["retry-after"] == "5"


def test_what_is_no_death_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = JSONResponse({"error": {"code": "generation_failed"}}, 500)
    assert ask(monkeypatch, says(failed))[0].json()["error"]["code"] == "generation_failed"
    assert ask(monkeypatch, says(PlainTextResponse("no route", 404)))[0].text == "no route"
    assert ask(monkeypatch, says(PlainTextResponse("figures")))[0].text == "figures"
    full, tries = ask(monkeypatch, says(PlainTextResponse("unavailable", 503)))
    assert (full.status_code, full.json()["error"]["code"], tries) == (503, "server_busy", 1)
    monkeypatch.setattr(ray_proxy, "KEPT", 4)
    large, tries = ask(monkeypatch, dies_after_all)
    assert (large.status_code, tries) == (503, 1), "of its body there is only the end"


async def dies_after_all(scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass


def test_a_stream_that_breaks_off_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    reply, tries = ask(monkeypatch, dies_in_a_stream)
    assert reply.status_code == 200 and tries == 1
    assert reply.text.startswith("event: a\n") and '"code": "worker_died"' in reply.text.split("event: error\n")[1]
