"""Who may call, and what is told of what breaks: the app without a worker."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from glmimg.serving.auth import add_key
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
            for path in ("/v1/models", "/metrics", "/v1/usage", "/v1/nothing"):
                refused = await http.get(path)
                assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
            wrong = await http.post("/v1/images/generations", json=PLAIN, headers={"Authorization": f"Bearer {key}x"})
            assert wrong.status_code == 401
            assert (await http.get("/")).status_code == 200 and (await http.get("/health")).status_code == 200
            http.headers["Authorization"] = f"Bearer {key}"
            assert (await http.get("/v1/usage")).json()["client"] == "ada"
            early = await http.post("/v1/images/generations", json=PLAIN)
            assert early.status_code == 503 and early.json()["error"]["code"] == "model_loading"
            bad = await http.post("/v1/images/generations", json=PLAIN | {"prompt": "something forbidden"})
            assert bad.status_code == 400 and bad.json()["error"]["code"] == "moderation_blocked"

    asyncio.run(scene())


def test_without_keys_other_machines_are_refused_and_what_breaks_is_told() -> None:
    """However the app is run: Ray's proxy, for one, may listen anywhere."""

    async def ask(address: str, **settings: Any) -> httpx.Response:
        app = create_app(ServerSettings(**settings))

        @app.get("/broken")
        async def broken() -> None:
            raise RuntimeError("a secret")

        transport = httpx.ASGITransport(app, client=(address, 5000))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            return await http.get("/broken")

    refused = asyncio.run(ask("192.0.2.7"))
    assert refused.status_code == 403 and "--keys" in refused.json()["error"]["message"]
    for response in (
        asyncio.run(ask("127.0.0.1")),
        asyncio.run(ask("::1")),
        asyncio.run(ask("192.0.2.7", allow_hosts=("x",))),
    ):
        assert response.status_code == 500 and response.json()["error"]["code"] == "internal_error"
        assert "secret" not in response.text and response.headers["x-content-type-options"] == "nosniff"


def rules(prompt: str) -> str | None:
    return "not here" if "forbidden" in prompt else None
