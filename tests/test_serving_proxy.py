"""The server behind nginx as the documents set it up, with TLS, at the top and below a path; the page in a browser.

Needs nginx and openssl (Debian: `apt-get install nginx-light openssl`): where they are missing, a few lines that take
the path off stand in alone. The page needs what test_serving_page.py needs.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from glmimg.errors import BadInput
from glmimg.serving.settings import ServerSettings

pytest.importorskip("uvicorn")

SIZE = "64x64"
PLAIN = {"prompt": "a cat", "size": SIZE, "steps": 2, "seed": 5}
PREFIX = "/pictures"
DOCS = Path(__file__).parent.parent / "docs/serving.md"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module", params=["nginx", "nginx below a path", "a stand-in below a path"])
def front(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, serve: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A server behind a proxy: `url` of the proxy, `verify` for its certificate, `prefix`, and the `service` itself."""
    by_nginx, prefix = request.param.startswith("nginx"), PREFIX if "below" in request.param else ""
    if by_nginx and (NGINX is None or shutil.which("openssl") is None):
        pytest.skip("no nginx or no openssl on this machine: apt-get install nginx-light openssl")
    where = {"model": str(tiny_checkpoint), "model_name": "tiny", "backend": "cpu", "dtype": "fp32"}
    server = serve(ServerSettings(**where, root_path=prefix))
    try:
        proxy = nginx(server.url, prefix, tmp_path_factory.mktemp("nginx")) if by_nginx else stand_in(server.url)
        with proxy as (url, verify):
            yield SimpleNamespace(url=url + prefix, verify=verify, prefix=prefix, service=server.service)
    finally:
        server.stop()


@contextmanager
def nginx(server: str, prefix: str, folder: Path) -> Iterator[tuple[str, Any]]:
    """The block of the documents in a configuration of its own, with a certificate made for it."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    certificate = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    certificate += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    certificate += ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run(["openssl", "req", *certificate], check=True, capture_output=True)
    (block,) = re.findall(r"^```text\n(location .*?)^```", DOCS.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    if prefix:
        block = block.replace("location / {", f"location {prefix}/ {{").replace(":8000;", ":8000/;")
    block = block.replace("http://127.0.0.1:8000", server)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    own = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    user = "user root;" if os.geteuid() == 0 else ""  # whose folder this is
    (folder / "nginx.conf").write_text(
        f"{user} daemon off; worker_processes 1; pid {folder}/pid; events {{}}\nhttp {{ access_log off;\n{own}"
        f"server {{ listen 127.0.0.1:{port} ssl;\n"
        f"ssl_certificate {folder}/cert.pem; ssl_certificate_key {folder}/key.pem;\n{block}}} }}\n"
    )
    assert NGINX is not None
    process = subprocess.Popen([NGINX, "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")])
    try:
        end = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < end, (folder / "error.log").read_text()
                time.sleep(0.05)
        yield f"https://localhost:{port}", ssl.create_default_context(cafile=str(folder / "cert.pem"))
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def stand_in(server: str) -> Iterator[tuple[str, Any]]:
    """Takes PREFIX off and passes on; there is nothing outside it."""
    loop, inner = asyncio.new_event_loop(), httpx.URL(server)

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        method, target, rest = head.split(" ", 2)
        if not target.startswith(f"{PREFIX}/"):
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            writer.close()
            return
        rest = re.sub(r"(?i)\r\nconnection:[^\r]*", "", rest).replace("\r\n", "\r\nConnection: close\r\n", 1)
        there, back = await asyncio.open_connection(inner.host, inner.port)
        back.write(f"{method} {target.removeprefix(PREFIX)} {rest}".encode("latin-1"))
        sending = asyncio.create_task(pump(reader, back))
        await asyncio.gather(sending, pump(there, writer), return_exceptions=True)

    listening = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield f"http://localhost:{listening.sockets[0].getsockname()[1]}", True
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


@pytest.fixture
def http(front: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=front.url, verify=front.verify, timeout=120) as client:
        yield client


def test_openais_client_uploads_and_urls(front: Any, http: httpx.Client) -> None:
    client = openai.OpenAI(base_url=f"{front.url}/v1", api_key="none needed", max_retries=0, http_client=http)
    small: dict[str, Any] = {"size": SIZE, "extra_body": {"seed": 5, "steps": 2}}
    reply = client.images.generate(prompt="a cat", **small)
    assert reply.data and reply.data[0].b64_json
    upload = io.BytesIO()
    Image.frombytes("RGB", (700, 700), os.urandom(3 * 700 * 700)).save(upload, "PNG")
    assert len(upload.getvalue()) > 1 << 20, "more than nginx takes unless it is told to"
    assert client.images.edit(image=upload.getvalue(), prompt="the same in red", **small).data
    linked = http.post("/v1/images/generations", json=PLAIN | {"response_format": "url"}).json()["data"][0]["url"]
    assert linked.startswith(f"{front.url}/v1/files/")
    assert http.get(linked).content == base64.b64decode(reply.data[0].b64_json)
    servers = http.get("/openapi.json").json().get("servers", [])
    assert [one["url"] for one in servers] == ([front.prefix] if front.prefix else [])


def test_events_arrive_at_once_and_who_leaves_is_forgotten(front: Any, http: httpx.Client) -> None:
    """While the picture is still being made, not with it; a reader that goes frees the machine."""
    slow = PLAIN | {"steps": 1000, "stream": True, "progress": True}
    seen: list[dict[str, Any]] = []
    with http.stream("POST", "/v1/images/generations", json=slow) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                seen.append(json.loads(line[6:]))
            if seen and seen[-1].get("stage") == "decoder":
                break
        assert front.service.dispatcher.running and seen[-1]["step"] < 900, "what arrives is news"
    end = time.monotonic() + 30
    while front.service.dispatcher.running:
        assert time.monotonic() < end, "the proxy kept the request"
        time.sleep(0.05)


def test_everything_is_there_for_its_own_origin(front: Any, http: httpx.Client) -> None:
    origin = front.url.removesuffix(front.prefix)
    for path in ("/v1/models", "/health", "/", "/docs", "/page/app.js", "/favicon.ico"):
        assert http.get(path).status_code == 200 and http.head(path).status_code == 200, path
        own, other = (http.get(path, headers={"Origin": page}) for page in (origin, "https://other.example"))
        assert (own.status_code, other.status_code) == (200, 403), path
    if front.prefix:
        assert http.get(f"{origin}/v1/models").status_code == 404


def test_the_page(front: Any) -> None:
    """Makes a picture, copies the call, and looks the API up."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[dev]'")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(bypass_csp=True, ignore_https_errors=True)
        page.set_default_timeout(120_000)
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        wrong: list[str] = []
        page.on("response", lambda response: wrong.append(response.url) if response.status >= 400 else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(f"{front.url}/")
        page.wait_for_function("document.getElementById('sampler').options.length > 0")
        page.fill("#prompt", "a cat")
        page.press("#prompt", "Control+Enter")
        page.wait_for_function("document.getElementById('status').textContent.startsWith('Done')")
        page.click("#copy")
        page.wait_for_function("document.getElementById('status').textContent === 'Copied.'")
        copied = page.evaluate("navigator.clipboard.readText()")
        assert copied.startswith(f"curl {front.url}/v1/images/generations ")
        page.get_by_role("link", name="API").click()
        page.wait_for_selector("article table")
        page.get_by_role("link", name="Page").click()
        page.wait_for_function("document.querySelectorAll('#history img').length === 1")
        assert page.url == f"{front.url}/"
        browser.close()
    assert wrong == []


def test_what_is_no_path_is_refused() -> None:
    for path in ("pictures", "/pictures/", "/", "//", "/a b", "/a\n", "/ä", "https://x"):
        with pytest.raises(BadInput, match="root path"):
            ServerSettings(root_path=path)
    assert ServerSettings(root_path="/a/b-c.d").root_path == "/a/b-c.d"
