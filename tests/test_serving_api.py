"""The server as clients see it: the openai package as it is, httpx, multipart forms, events, refusals."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from glmimg.cli import main
from glmimg.image_io import read_metadata
from glmimg.lora import Low, save_adapter
from glmimg.pipelines.text_to_image import TextToImagePipeline
from glmimg.serving.settings import ServerSettings

pytest.importorskip("uvicorn")

SIZE = "64x64"
PLAIN = {"prompt": "a cat", "size": SIZE, "steps": 2, "seed": 5}


@pytest.fixture(scope="module")
def adapters(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, write_adapter: Any) -> Path:
    """The folder of the adapters that may be named, with one that fits, one that does not, and one half-written."""
    folder = tmp_path_factory.mktemp("adapters")
    write_adapter(folder / "ink", tiny_checkpoint, 1)
    wrong = {"transformer_blocks.0.attn1.to_q": Low(torch.ones(2, 7), torch.ones(9, 2), None, 1.0)}
    save_adapter(folder / "wrong" / "decoder", "decoder", wrong, rank=2, alpha=2)
    (folder / ".half").mkdir()
    return folder


@pytest.fixture(scope="module")
def server(
    tiny_checkpoint: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory, serve: Any
) -> Iterator[Any]:
    settings = ServerSettings(
        model=str(tiny_checkpoint),
        model_name="tiny",
        backend="cpu",
        dtype="fp32",
        adapters=str(adapters),
        max_queue=12,
        max_body=1 << 20,
        max_pixels=512 * 512,
        watts=100.0,
        price=0.5,
        usage_file=str(tmp_path_factory.mktemp("usage") / "usage.json"),
    )
    server = serve(settings)
    yield server
    server.stop()


@pytest.fixture
def http(server: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


@pytest.fixture
def client(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none needed", max_retries=0, timeout=120)


def picture(data: str | None) -> Image.Image:
    assert data is not None
    return Image.open(io.BytesIO(base64.b64decode(data)))


def pixels(image: Image.Image) -> Any:
    return np.asarray(image.convert("RGB")).astype(int)


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    name = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            yield {"event": name, **json.loads(line[6:])}


def photo(size: tuple[int, int] = (70, 64), kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(data, kind)
    return data.getvalue()


# OpenAI's client, unmodified.


def test_generate_gives_the_pipelines_own_pictures(
    client: openai.OpenAI, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    reply = client.images.generate(model="tiny", prompt="a cat", n=2, size=SIZE, extra_body={"seed": 5, "steps": 2})
    pipeline = TextToImagePipeline.from_pretrained(tiny_checkpoint, backend="cpu", dtype="fp32")
    alone = pipeline("a cat", height=64, width=64, num_inference_steps=2, num_images_per_prompt=2, seed=5)
    assert reply.data is not None and len(reply.data) == 2
    for k, item in enumerate(reply.data):
        assert np.abs(pixels(picture(item.b64_json)) - pixels(alone.images[k])).max() <= 2
        assert item.model_extra is not None and item.model_extra["seed"] == 5 + k
    usage = reply.usage
    assert usage is not None and usage.output_tokens == 2 * sum(
        grid.ids_HW.numel() + (0 if grid.preview_HW is None else grid.preview_HW.numel()) for grid in alone.tokens[:1]
    )
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens and usage.input_tokens > 0
    path = tmp_path / "kept.png"
    path.write_bytes(base64.b64decode(reply.data[1].b64_json or ""))
    carried = read_metadata(path)
    assert carried["config"]["seed"] == 6 and carried["checkpoint"]["name"] == "tiny"
    assert str(tiny_checkpoint) not in json.dumps(carried)


def test_streaming_as_openai_sends_it(client: openai.OpenAI) -> None:
    stream = client.images.generate(
        prompt="a cat", size=SIZE, stream=True, partial_images=2, extra_body={"seed": 5, "steps": 4}
    )
    seen = list(stream)
    assert [event.type for event in seen] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in seen[:2]] == [0, 1]  # type: ignore[union-attr]
    assert picture(seen[-1].b64_json).size == (64, 64)
    once = client.images.generate(prompt="a cat", size=SIZE, extra_body={"seed": 5, "steps": 4})
    assert once.data and once.data[0].b64_json == seen[-1].b64_json


def test_edit_and_models(client: openai.OpenAI, tiny_checkpoint: Path, tmp_path: Path) -> None:
    reply = client.images.edit(
        image=[("a.png", photo()), ("b.webp", photo((64, 96), "WEBP"))],
        prompt="the same in red",
        extra_body={"seed": 1, "steps": 1},
        output_format="jpeg",
    )
    assert reply.data and picture(reply.data[0].b64_json).format == "JPEG"
    assert reply.usage and reply.usage.input_tokens_details.image_tokens > 0
    one = client.images.edit(image=photo(), prompt="the same in red", size=SIZE, extra_body={"steps": 1})
    assert one.data and picture(one.data[0].b64_json).size == (64, 64)
    (tmp_path / "photo.png").write_bytes(photo())
    (tmp_path / "edited.png").write_bytes(base64.b64decode(one.data[0].b64_json or ""))
    again = [
        "edit",
        str(tmp_path / "photo.png"),
        "--from",
        str(tmp_path / "edited.png"),
        "--model",
        str(tiny_checkpoint),
    ]
    assert main([*again, "--backend", "cpu", "--dtype", "fp32", "-o", str(tmp_path / "again.png"), "-q"]) == 0
    change = pixels(Image.open(tmp_path / "again.png")) - pixels(picture(one.data[0].b64_json))
    assert np.abs(change).max() <= 2
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.images.generate(prompt="a cat", model="dall-e-3")


def test_errors_are_openais(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="nearest") as caught:
        client.images.generate(prompt="a cat", size="70x64")  # type: ignore[call-overload]
    assert caught.value.param == "size" and caught.value.code == "invalid_value"
    with pytest.raises(openai.BadRequestError, match="did you mean 'seed'"):
        client.images.generate(prompt="a cat", extra_body={"sed": 3})
    with pytest.raises(openai.BadRequestError, match="opaque"):
        client.images.generate(prompt="a cat", background="transparent")


def test_the_documents_program_runs(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs/serving.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    exec(compile(code.replace("http://127.0.0.1:8000", server.url), "docs/serving.md", "exec"), {})
    assert (tmp_path / "boat-8.png").is_file()


# Ours.


def test_layouts_decode_and_regions(http: httpx.Client) -> None:
    made = http.post("/v1/images/generations", json=PLAIN | {"return_tokens": True}).json()["data"][0]
    layout = http.post("/v1/images/layouts", json={"prompt": "a cat", "size": SIZE, "seed": 5}).json()
    assert layout["data"][0]["tokens"] == made["tokens"] and "b64_json" not in layout["data"][0]
    same = http.post("/v1/images/decode", json={"prompt": "a cat", "tokens": made["tokens"], "seed": 5, "steps": 2})
    assert np.array_equal(pixels(picture(same.json()["data"][0]["b64_json"])), pixels(picture(made["b64_json"])))
    assert same.json()["usage"]["output_tokens"] == 0
    region = {"prompt": "a cat", "tokens": made["tokens"], "region": [0, 0, 32, 32], "seed": 77, "return_tokens": True}
    reply = http.post("/v1/images/regions", json=region | {"steps": 1, "temperature": 5, "top_p": 1}).json()
    again = reply["data"][0]
    assert 0 < reply["usage"]["output_tokens"] < layout["usage"]["output_tokens"], "what is kept costs nothing"
    from glmimg.token_grid import TokenGrid

    changed_HW = TokenGrid.from_dict(again["tokens"]).diff(TokenGrid.from_dict(made["tokens"]))
    assert not changed_HW[1:].any() and not changed_HW[:, 1:].any()
    damaged = made["tokens"] | {"codebook_size": 7}
    refused = http.post("/v1/images/decode", json={"prompt": "a cat", "tokens": damaged})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "tokens"


def test_a_layout_of_an_edited_picture_is_kept(http: httpx.Client) -> None:
    def edit(**fields: Any) -> dict[str, Any]:
        form = {"prompt": "the same in red", "size": SIZE, "seed": 3, "steps": 1, "return_tokens": True, **fields}
        data = {name: value if isinstance(value, str) else json.dumps(value) for name, value in form.items()}
        reply = http.post("/v1/images/edits", data=data, files={"image": photo()})
        assert reply.status_code == 200, reply.text
        item: dict[str, Any] = reply.json()["data"][0]
        return item

    first = edit()
    again, other = edit(tokens=first["tokens"]), edit(tokens=first["tokens"], seed=4)
    assert np.array_equal(pixels(picture(again["b64_json"])), pixels(picture(first["b64_json"])))
    assert other["tokens"] == first["tokens"] and other["b64_json"] != first["b64_json"]
    kept = edit(tokens=first["tokens"], keep=1)  # all of it but what changes most stays the photo's
    assert np.abs(pixels(picture(kept["b64_json"])) - pixels(picture(first["b64_json"]))).max() > 0
    part = edit(tokens=first["tokens"], region=[32, 0, 64, 32], temperature=5, top_p=1)
    from glmimg.token_grid import TokenGrid

    changed_HW = TokenGrid.from_dict(part["tokens"]).diff(TokenGrid.from_dict(first["tokens"]))
    assert not changed_HW[1:].any() and not changed_HW[:, :1].any()


def test_nested_fields_of_edits_as_openai_sends_them(client: openai.OpenAI, http: httpx.Client) -> None:
    nested: dict[str, Any] = {"adapters": [{"name": "ink", "strength": 0.5}, {"name": "ink", "strength": 0.25}]}
    nested |= {"region": [32, 0, 64, 32], "seed": 3, "steps": 1, "return_tokens": True}

    def edit(**fields: Any) -> Any:
        form: dict[str, Any] = {"image": photo(), "prompt": "in red", "size": SIZE}
        (item,) = client.images.edit(**form, extra_body=fields).data or ()
        return item.model_extra

    nested["tokens"] = edit(return_tokens=True)["tokens"]
    texts = {name: json.dumps(value) if isinstance(value, list | dict) else value for name, value in nested.items()}
    assert edit(**nested) == edit(**texts)
    for parts in ({"adapters[][name]": ["a", "b"], "adapters[][strength]": "1"}, {"region": "[]", "region[]": "1"}):
        reply = http.post("/v1/images/edits", data={"prompt": "in red", **parts}, files={"image": photo()})
        assert reply.status_code == 400 and reply.json()["error"]["param"] in nested


def test_progress_events(http: httpx.Client) -> None:
    body = PLAIN | {"stream": True, "progress": True, "partial_images": 3, "n": 2, "steps": 4, "return_tokens": True}
    with http.stream("POST", "/v1/images/generations", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        seen = list(events(response))
    assert all(event["event"] == event["type"] for event in seen)
    stages = {event["stage"] for event in seen if event["event"] == "image_generation.progress"}
    assert "decoder" in stages
    progress = [event for event in seen if event["event"] == "image_generation.progress"]
    assert all(event["seconds"] >= 0 and event["eta"] >= 0 for event in progress)
    done = [event for event in seen if event["event"] == "image_generation.completed"]
    assert [event["index"] for event in done] == [0, 1] and done[0]["tokens"]["format"] == "glmimg.token_grid/1"
    assert [event["seed"] for event in done] == [5, 6]
    for index in (0, 1):
        partials = [e["partial_image_index"] for e in seen if "partial_image_index" in e and e["index"] == index]
        assert partials == [0, 1, 2]


def test_urls_expire_nothing_else_is_served(http: httpx.Client, server: Any) -> None:
    reply = http.post("/v1/images/generations", json=PLAIN | {"response_format": "url", "output_format": "webp"})
    url = reply.json()["data"][0]["url"]
    got = httpx.get(url)
    assert got.headers["cross-origin-resource-policy"] == "cross-origin", "as OpenAI's, in a page of anybody's"
    assert got.headers["content-type"] == "image/webp" and Image.open(io.BytesIO(got.content)).format == "WEBP"
    server.service.files.seconds = -1
    url = http.post("/v1/images/generations", json=PLAIN | {"response_format": "url"}).json()["data"][0]["url"]
    assert httpx.get(url).status_code == 404
    server.service.files.seconds = 60
    for path in ("/page/../app.py", "/page/%2e%2e/app.py", "/v1/files/..%2fapp.py", "/v1/nothing"):
        assert http.get(path).status_code == 404


def test_what_a_request_may_not_do(http: httpx.Client) -> None:
    def refused(status: int, part: str, response: httpx.Response) -> None:
        error = response.json()["error"]
        assert (response.status_code, set(error)) == (status, {"message", "type", "param", "code"})
        assert part in error["message"], error

    generate, edit = (partial(http.post, f"/v1/images/{kind}") for kind in ("generations", "edits"))
    refused(400, "no JSON", generate(content=b"{", headers={"Content-Type": "application/json"}))
    refused(400, "missing", generate(json={}))
    for kind in ("application/x-www-form-urlencoded", "text/plain"):  # as curl sends it where nobody says what it is
        refused(
            400, "Content-Type: application/json", generate(content=b'{"prompt": "x"}', headers={"Content-Type": kind})
        )
    refused(400, "no JSON object", generate(json=[PLAIN]))
    refused(400, r"\ud800", generate(content=rb'{"\ud800": 1}', headers={"Content-Type": "application/json"}))
    grid = {
        "format": "glmimg.token_grid/1",
        "codebook_size": 64,
        "checkpoint": "?",
        "target": {"grid": [2, 2], "ids": ""},
    }
    lone = json.dumps({"prompt": "a cat", "tokens": grid, "return_tokens": True}).replace("?", r"\ud800").encode()
    refused(
        400, "checkpoint", http.post("/v1/images/decode", content=lone, headers={"Content-Type": "application/json"})
    )
    refused(400, "<sop>", generate(json=PLAIN | {"prompt": "a <sop>cat"}))
    refused(400, "less than or equal to 10", generate(json=PLAIN | {"n": 11}))
    refused(400, "stream", generate(json=PLAIN | {"progress": True}))
    refused(400, "adapter 'x'", generate(json=PLAIN | {"adapters": [{"name": "x"}]}))
    for named in ({"adapters": [{"name": "x" * 900_000}]}, {"model": "x" * 900_000}):  # to be likened to others
        long = generate(json=PLAIN | named)
        refused(400, "at most", long)
        assert len(long.content) < 2000
    refused(404, "nothing under", http.get("/v1/nothing"))
    refused(405, "another method", http.get("/v1/images/generations"))
    refused(413, "1,048,576 bytes", generate(content=b"x" * (1 << 21)))
    chunks = (b"x" * (1 << 18) for _ in range(8))
    refused(413, "1,048,576 bytes", generate(content=chunks))
    form = {"prompt": "the same"}
    refused(400, "multipart", edit(json=form))
    refused(400, "no image", edit(data=form, files={"x": (None, "y")}))
    one = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nx\r\n--b--\r\n'
    refused(400, "prompt", edit(content=one, headers={"Content-Type": "Multipart/Form-Data; boundary=b"}))
    cut = one[:-2].replace(b"--b--", b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nthe same\r\n')
    refused(400, "cut short", edit(content=cut, headers={"Content-Type": "multipart/form-data; boundary=b"}))
    refused(400, "prompt is given twice", edit(data={"prompt": ["one", "two"]}, files={"image": photo()}))
    refused(400, "cannot be read: Missing boundary", edit(content=one, headers={"Content-Type": "multipart/form-data"}))
    refused(400, "no path or url", edit(data=form | {"image": "/etc/passwd"}, files={"x": (None, "")}))
    refused(400, "PNG, JPEG or WebP", edit(data=form, files={"image": b"hello"}))
    refused(400, "damaged", edit(data=form, files={"image": photo((200, 200))[:150]}))
    refused(400, "600x600", edit(data=form, files={"image": photo((600, 600))}))
    for text in ("[" * 100_000, "[" * 100_000 + "]" * 100_000):
        refused(400, "tokens is no JSON", edit(data=form | {"tokens": text}, files={"image": photo()}))
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    refused(400, "far too large", edit(data=form, files={"image": bomb.getvalue()}))
    refused(400, "regions", edit(data=form, files={"image": photo(), "mask": photo()}))
    refused(403, "origins", http.get("/v1/models", headers={"Origin": "https://elsewhere.example"}))
    refused(403, "names", http.get("/v1/models", headers={"Host": "rebound.example"}))
    nested = PLAIN | {"adapters": [{"nam": "x"}]}
    refused(400, "choose from name, strength; did you mean 'name'", generate(json=nested))
    assert "region" not in generate(json=PLAIN | {"nothing": 1}).json()["error"]["message"]


def test_headers_page_and_openapi(http: httpx.Client) -> None:
    for path in ("/", "/docs", "/health", "/v1/models", "/v1/nothing"):
        headers, asked = http.get(path).headers, http.head(path)
        assert (asked.content, asked.headers.get("content-length")) == (b"", headers["content-length"])
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "access-control-allow-origin" not in headers
    page = http.get("/").text
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    spec = http.get("/openapi.json").json()
    paths = spec["paths"]
    statuses = {status for methods in paths.values() for one in methods.values() for status in one["responses"]}
    assert "422" not in statuses and "429" in statuses, "as it answers"
    for path in ("/health", "/ready", "/v1/usage", "/v1/adapters"):
        content = paths[path]["get"]["responses"]["200"]["content"]["application/json"]
        assert content["schema"]["$ref"].startswith("#/components/schemas/"), path
    assert {"200", "503"} <= paths["/ready"]["get"]["responses"].keys() & paths["/health"]["get"]["responses"].keys()
    assert list(paths["/metrics"]["get"]["responses"]["200"]["content"]) == ["text/plain"]
    assert not re.findall(r'"#/components/schemas/(?:HTTPV|V)alidationError"', json.dumps(spec))
    assert {"/v1/images/generations", "/v1/images/edits", "/v1/images/regions", "/health", "/metrics"} <= set(paths)


def test_health_metrics_and_usage(http: httpx.Client) -> None:
    assert http.get("/health").json()["status"] == "ok" and http.get("/ready").json()["ready"] is True
    before = http.get("/v1/usage").json()
    reply = http.post("/v1/images/generations", json=PLAIN).json()
    after = http.get("/v1/usage").json()
    assert after["pictures"] == before["pictures"] + 1 and after["steps"] == before["steps"] + 2
    assert after["requests"] == before["requests"] + 1
    assert reply["usage"]["energy_wh"] == pytest.approx(reply["usage"]["seconds"] * 100 / 3600, abs=1e-5)
    assert after["tokens"] - before["tokens"] == reply["usage"]["output_tokens"]
    metrics = http.get("/metrics").text
    assert 'glmimg_requests_total{route="/v1/images/generations",status="200"}' in metrics
    assert "glmimg_ready 1.0" in metrics and "glmimg_pictures_total" in metrics


def test_adapters_are_each_requests_own(
    http: httpx.Client, server: Any, tiny_checkpoint: Path, adapters: Path, write_adapter: Any, tmp_path: Path
) -> None:
    """Asked for at once, with and without; the folder's names are all that can be asked for."""
    assert [one["id"] for one in http.get("/v1/adapters").json()["data"]] == ["ink", "wrong"]
    inked = PLAIN | {"adapters": [{"name": "ink", "strength": 0.5}], "return_tokens": True}

    async def all_of_them() -> list[Any]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            bodies = [PLAIN, inked, PLAIN, inked, PLAIN | {"adapters": [{"name": "wrong"}]}]
            return await asyncio.gather(*(client.post("/v1/images/generations", json=body) for body in bodies))

    *replies, wrong = asyncio.run(all_of_them())
    plain, with_ink, plain_again, with_ink_again = (reply.json()["data"][0] for reply in replies)
    assert plain["b64_json"] == plain_again["b64_json"] and with_ink["b64_json"] == with_ink_again["b64_json"]
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "seed": 5}
    for item, stacked in ((plain, []), (with_ink, [(adapters / "ink", 0.5)])):
        pipeline = TextToImagePipeline.from_pretrained(tiny_checkpoint, "cpu", "fp32", adapters=stacked)
        alone = pipeline("a cat", **options)
        assert np.abs(pixels(picture(item["b64_json"])) - pixels(alone.images[0])).max() <= 2
        assert item.get("tokens", alone.tokens[0].to_dict()) == alone.tokens[0].to_dict()
    assert np.abs(pixels(picture(plain["b64_json"])) - pixels(picture(with_ink["b64_json"]))).max() > 2
    path = tmp_path / "inked.png"
    path.write_bytes(base64.b64decode(with_ink["b64_json"]))
    assert read_metadata(path)["adapters"] == [{"name": "ink", "strength": 0.5}]
    assert str(adapters) not in json.dumps(read_metadata(path))
    assert wrong.status_code == 400 and str(adapters) not in wrong.text and "wrong" in wrong.text
    write_adapter(adapters / "ink", tiny_checkpoint, 2)  # trained again
    other = http.post("/v1/images/generations", json=inked).json()["data"][0]
    assert np.abs(pixels(picture(other["b64_json"])) - pixels(picture(with_ink["b64_json"]))).max() > 2
    for name in ("..", ".half", "../adapters/ink", str(adapters / "ink"), "ink/", "owner/name"):
        refused = http.post("/v1/images/generations", json=PLAIN | {"adapters": [{"name": name}]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unknown_adapter")


def test_the_clock_may_jump(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that waits or expires goes by the time of day."""
    kept = http.post("/v1/images/generations", json=PLAIN | {"response_format": "url"}).json()["data"][0]["url"]
    now = time.time
    for years in (-10, 10):
        monkeypatch.setattr(time, "time", lambda by=years * 365 * 86400: now() + by)
        assert http.post("/v1/images/generations", json=PLAIN).status_code == 200
        assert httpx.get(kept).status_code == 200
