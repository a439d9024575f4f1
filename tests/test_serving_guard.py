"""Who may call, and what is told of what breaks: the app without a worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from glmimg.serving import guard
from glmimg.serving.auth import Client, KeyFile, add_key
from glmimg.serving.settings import ServerSettings

pytest.importorskip("uvicorn")
from glmimg.serving.app import create_app

PLAIN = {"prompt": "a cat", "size": "64x64", "steps": 2, "seed": 5}


def test_keys_are_needed_where_there_are_keys(tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys.json", "ada")
    app = create_app(ServerSettings(keys=str(tmp_path / "keys.json"), prompt_rules=f"{__name__}:rules"))

    async def scene() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://pictures.example") as http:
            spec = app.openapi()["paths"]
            routes = [(method, path) for path, methods in spec.items() for method in methods]
            open_ones = ("/v1/files/", "/health", "/ready")
            for method, path in [*routes, ("get", "/v1/nothing")]:
                refused = await http.request(method, path)
                if path.startswith(open_ones):
                    assert refused.status_code != 401
                else:
                    assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
            wrong = await http.post("/v1/images/generations", json=PLAIN, headers={"Authorization": f"Bearer {key}x"})
            assert wrong.status_code == 401
            assert (await http.get("/")).status_code == 200 and (await http.get("/health")).status_code == 200
            http.headers["Authorization"] = f"Bearer {key}"
            assert (await http.get("/v1/usage")).json()["client"] == "ada"
            early = await http.post("/v1/images/generations", json=PLAIN)
            assert early.status_code == 503 and early.json()["error"]["code"] == "model_loading"
            for name in ("prompt", "negative"):
                bad = await http.post("/v1/images/generations", json=PLAIN | {name: "something forbidden"})
                assert bad.status_code == 400 and bad.json()["error"]["code"] == "moderation_blocked"
                assert bad.json()["error"]["param"] == name
        under_prefix = httpx.ASGITransport(app, root_path="/img")
        async with httpx.AsyncClient(transport=under_prefix, base_url="http://pictures.example/img") as http:
            for path in ("/v1/models", "/metrics", "/v1/usage"):
                assert (await http.get(path)).status_code == 401
            assert (await http.post("/v1/images/generations", json=PLAIN)).status_code == 401
            http.headers["Authorization"] = f"Bearer {key}"
            assert (await http.get("/v1/usage")).json()["client"] == "ada"

    asyncio.run(scene())


def test_home_is_meant_by_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    secret = add_key("~/keys.json", "ana")
    settings = ServerSettings(keys="~/keys.json", usage_file="~/usage.json", adapters="~/adapters")
    assert (settings.usage_file, settings.adapters) == (str(tmp_path / "usage.json"), str(tmp_path / "adapters"))
    assert settings.keys is not None and KeyFile(settings.keys).find(secret)


def test_what_is_sent_is_limited_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of a key, and bytes of all requests, count from the beginning of the body."""
    monkeypatch.setattr(guard, "BODIES", 2)
    key = add_key(tmp_path / "keys.json", "ada", max_requests=3)
    app = create_app(ServerSettings(keys=str(tmp_path / "keys.json"), max_body=1000))
    go_on = asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield b" " * 900
        await go_on.wait()
        yield b"{}"

    async def scene() -> None:
        transport, headers = httpx.ASGITransport(app), {"Authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as http:
            slow = [asyncio.create_task(http.post("/v1/images/generations", content=slowly())) for _ in range(2)]
            while app.state.service.limits._requests.get("ada", 0) < 2:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            busy = await http.post("/v1/images/generations", content=b" " * 900)
            assert busy.status_code == 503 and busy.headers["retry-after"] == "5"
            third = asyncio.create_task(http.post("/v1/images/generations", content=slowly()))
            await asyncio.sleep(0.05)
            assert third.done() and third.result().status_code == 503, "its first bytes are too many as well"
            app.state.service.limits.enter(Client("ada", max_requests=3))
            many = await http.post("/v1/images/generations", json=PLAIN)
            assert many.status_code == 429 and many.headers["retry-after"]
            go_on.set()
            assert [reply.status_code for reply in await asyncio.gather(*slow)] == [400, 400]
            app.state.service.limits.leave(Client("ada"))
            assert (await http.post("/v1/images/generations", json=PLAIN)).status_code == 503
        assert not app.state.service.limits._requests, "every request is counted out again"

    asyncio.run(scene())


def test_without_keys_other_machines_are_refused_and_what_breaks_is_told() -> None:
    """However the app is run: Ray's proxy, for one, may listen anywhere."""

    async def ask(address: str, host: str = "http://127.0.0.1", **settings: Any) -> httpx.Response:
        app = create_app(ServerSettings(**settings))

        @app.get("/broken")
        async def broken() -> None:
            raise RuntimeError("a secret")

        transport = httpx.ASGITransport(app, client=(address, 5000))
        async with httpx.AsyncClient(transport=transport, base_url=host) as http:
            return await http.get("/broken")

    refused = asyncio.run(ask("192.0.2.7"))
    assert refused.status_code == 403 and "--keys" in refused.json()["error"]["message"]
    for response in (
        asyncio.run(ask("127.0.0.1")),
        asyncio.run(ask("::1")),
        asyncio.run(ask("192.0.2.7", allow_hosts=("x",))),
        asyncio.run(ask("192.0.2.7", host="http://mybox.local", allow_hosts=("MyBox.local",))),
    ):
        assert response.status_code == 500 and response.json()["error"]["code"] == "internal_error"
        assert "secret" not in response.text and response.headers["x-content-type-options"] == "nosniff"


def rules(prompt: str) -> str | None:
    return "not here" if "forbidden" in prompt else None
