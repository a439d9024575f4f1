"""Whatever the OpenAPI specification allows, and much that it does not, sent to servers with keys and without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from glmimg.serving.auth import add_key
from glmimg.serving.settings import ServerSettings

pytest.importorskip("uvicorn")
schemathesis = pytest.importorskip("schemathesis")
not_a_server_error = pytest.importorskip("schemathesis.checks").not_a_server_error
openapi = pytest.importorskip("schemathesis.specs.openapi.checks")

CHECKS = [
    not_a_server_error,
    openapi.status_code_conformance,
    openapi.content_type_conformance,
    openapi.response_schema_conformance,
]
SMALL = {"steps": 1, "n": 1, "size": "64x64"}  # as little work as a request can be
OPEN = ("/v1/files/", "/health", "/ready")


@pytest.fixture(scope="module", params=["without keys", "with keys"])
def server(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, serve: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """`url`, and `callers`: headers, and the status for them where it is not the request's own."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    keys: dict[str, Any] = {"keys": str(file)} if request.param == "with keys" else {}
    callers: list[tuple[dict[str, str], int | None]] = [({}, None)]
    if keys:
        bearer = {"Authorization": f"Bearer {add_key(file, 'ada')}"}
        callers = [(bearer, None), ({}, 401), ({"Authorization": f"{bearer['Authorization']}x"}, 401)]
    where = {"model": str(tiny_checkpoint), "model_name": "tiny", "backend": "cpu", "dtype": "fp32"}
    limits: dict[str, Any] = {"max_body": 1 << 20, "max_pixels": 512 * 512}
    server = serve(ServerSettings(**where, **limits, **keys))
    yield SimpleNamespace(url=server.url, callers=callers)
    server.stop()


def test_no_request_breaks_the_server(server: Any) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 8
    for operation in operations:

        @settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def breaks_nothing(case: Any) -> None:
            if isinstance(case.body, dict):
                case.body |= {
                    name: value for name, value in SMALL.items() if isinstance(case.body.get(name), int | str)
                }
            for headers, status in server.callers:
                response = case.call_and_validate(headers=headers, timeout=120, checks=CHECKS)
                if status is not None and not case.path.startswith(OPEN):
                    assert response.status_code == status, "whatever it says, it needs a key"
                if response.status_code >= 400 and response.headers["content-type"] == "application/json":
                    assert case.path in OPEN or response.json()["error"]["message"]

        breaks_nothing()
