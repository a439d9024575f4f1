"""The routes under /v1: OpenAI's three, and ours for layouts. Bodies are in schemas.py."""

from __future__ import annotations

import re
from typing import Any

from fastapi import APIRouter, Request, Security
from fastapi.security import HTTPBearer
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import Response

from glmimg.config import parse_json
from glmimg.serving import schemas
from glmimg.serving.answers import answer
from glmimg.serving.auth import LOCAL
from glmimg.serving.metrics import Totals
from glmimg.serving.service import Service
from glmimg.serving.settings import Problem

__all__ = ["router", "validation_problem"]

MAX_REFERENCES = 16
# A part of a nested field as OpenAI's clients name it: region[], adapters[][name], tokens[target][ids].
_NESTED = re.compile(r"(adapters|tokens|region)((?:\[[a-z_]*\]){0,3})")
_STATUSES = (400, 401, 403, 404, 408, 413, 429, 500, 503, 504)
_EVENTS = {
    "text/event-stream": {
        "itemSchema": {
            "type": "object",
            "properties": {
                "event": {"type": "string"},
                "data": {"type": "string", "contentMediaType": "application/json"},
            },
            "required": ["data"],
        }
    }
}

router = APIRouter(
    prefix="/v1",
    dependencies=[Security(HTTPBearer(auto_error=False, description="An API key, where the server has keys."))],
    responses={status: {"model": schemas.ErrorReply} for status in _STATUSES},
)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _ok(model: type[Any]) -> dict[int | str, dict[str, Any]]:
    return {200: {"model": model, "content": _EVENTS}}


@router.post("/images/generations", response_model=None, responses=_ok(schemas.ImagesReply), tags=["pictures"])
async def generations(body: schemas.GenerateRequest, request: Request) -> Response:
    """Pictures of a prompt."""
    service = _service(request)
    return await answer(service, request, service.job(body), body, "image_generation")


@router.post(
    "/images/edits",
    response_model=None,
    responses=_ok(schemas.ImagesReply),
    tags=["pictures"],
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["prompt", "image"],
                        "properties": {
                            "image": {"type": "array", "items": {"type": "string", "format": "binary"}},
                            **schemas.EditRequest.model_json_schema(ref_template="#/components/schemas/{model}")[
                                "properties"
                            ],
                        },
                    }
                }
            },
        }
    },
)
async def edits(request: Request) -> Response:
    """Pictures after one or more reference pictures (`image` or `image[]`), as multipart/form-data.

    Nested fields (`adapters`, `tokens`, `region`) are JSON text, or in parts: `region[]`, `tokens[format]`.
    """
    service = _service(request)
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise Problem(400, "send multipart/form-data with the pictures as files: no url is fetched", "invalid_body")
    images: list[bytes] = []
    fields: dict[str, list[Part]] = {}
    most = service.settings.max_body
    parser = _Form(request.headers, request.stream(), max_files=MAX_REFERENCES, max_fields=64, max_part_size=most)
    try:
        form = await parser.parse()
    except (LookupError, ValueError, MultiPartException) as error:  # of names and texts in odd encodings as well
        raise Problem(400, f"the form cannot be read: {error}", "invalid_body") from error
    try:
        if not parser.whole:
            raise Problem(400, "the form is cut short: its last boundary is missing", "invalid_body")
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name in ("image", "image[]"):
                    images.append(await value.read())
                else:
                    advice = (
                        "mark a region of given tokens instead: /v1/images/regions" if name == "mask" else "take it out"
                    )
                    raise Problem(400, f"file {name!r} is not used here: {advice}", "unsupported_parameter", name)
            elif name in ("image", "image[]"):
                raise Problem(400, "an image is a file, not text: no path or url is read", "invalid_value", "image")
            else:
                field, keys = (nested[1], nested[2]) if (nested := _NESTED.fullmatch(name)) else (name, "")
                fields.setdefault(field, []).append((tuple(re.findall(r"\[(\w*)\]", keys)), value))
    finally:
        await form.close()
    if not images:
        raise Problem(
            400, "no image: send at least one reference picture as a file", "missing_required_parameter", "image"
        )
    try:
        body = schemas.EditRequest.model_validate({name: _unpacked(name, parts) for name, parts in fields.items()})
    except ValidationError as error:
        raise validation_problem(error.errors()) from error
    for data in images:
        service.require_picture(data)
    job = service.job(body, images=tuple(images), region=body.region and tuple(body.region))
    return await answer(service, request, job, body, "image_edit")


class _Form(MultiPartParser):
    """Starlette's, which leaves out a part that does not end: `whole` tells whether all have come."""

    whole = False

    def on_end(self) -> None:
        self.whole = True


Part = tuple[tuple[str, ...], str]  # its keys, its text


def _unpacked(name: str, parts: list[Part]) -> Any:
    text = _joined(name, parts)
    if not isinstance(text, str) or not _NESTED.fullmatch(name):
        return text
    try:
        return parse_json(text)
    except ValueError as error:
        raise Problem(400, f"{name} is no JSON ({error})", "invalid_value", name) from error


def _joined(name: str, parts: list[Part]) -> Any:
    """The value that parts make together. A list's objects are told apart by all having the same keys."""
    inner: dict[str | None, list[Part]] = {}
    for keys, text in parts:
        inner.setdefault(keys[0] if keys else None, []).append((keys[1:], text))
    if None in inner:
        if len(parts) > 1:
            raise Problem(400, f"{name} is given twice", "invalid_value", name)
        return parts[0][1]
    if "" not in inner:
        return {key: _joined(f"{name}[{key}]", below) for key, below in inner.items()}
    columns: dict[tuple[str, ...], list[str]] = {}
    for keys, text in inner[""]:
        columns.setdefault(keys, []).append(text)
    if len(inner) > 1 or len(set(map(len, columns.values()))) > 1:
        raise Problem(400, f"{name}: give all of them the same keys, or send JSON text", "invalid_value", name)
    return [_joined(name, list(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]


@router.post("/images/layouts", response_model=None, responses=_ok(schemas.LayoutReply), tags=["layouts"])
async def layouts(body: schemas.LayoutRequest, request: Request) -> Response:
    """Semantic layouts of a prompt, without pictures: what `decode` and `regions` take as `tokens`."""
    service = _service(request)
    return await answer(service, request, service.job(body, layout_only=True), body, "image_layout")


@router.post("/images/decode", response_model=None, responses=_ok(schemas.ImagesReply), tags=["layouts"])
async def decode(body: schemas.DecodeRequest, request: Request) -> Response:
    """Pictures of a given layout: the same composition, another seed."""
    service = _service(request)
    return await answer(service, request, service.job(body), body, "image_generation")


@router.post("/images/regions", response_model=None, responses=_ok(schemas.ImagesReply), tags=["layouts"])
async def regions(body: schemas.RegionRequest, request: Request) -> Response:
    """Pictures of a given layout of which the tokens inside a region are drawn anew."""
    service = _service(request)
    return await answer(service, request, service.job(body, region=tuple(body.region)), body, "image_generation")


@router.get("/files/{name}", response_model=None, tags=["pictures"])
async def files(name: str, request: Request) -> Response:
    """A picture that was asked for as a url, until that expires."""
    found = _service(request).files.get(name)
    if found is None:
        raise Problem(404, "no such picture, or its url has expired", "not_found")
    # The url is the whole secret: whoever has it may show the picture on a page of any origin.
    headers = {"Cache-Control": "private, max-age=3600", "Cross-Origin-Resource-Policy": "cross-origin"}
    return Response(found[1], media_type=found[0], headers=headers)


@router.get("/models", tags=["server"])
async def models(request: Request) -> schemas.ModelList:
    """The model of this server."""
    return schemas.ModelList(data=[_model(_service(request))])


@router.get("/models/{model_id:path}", tags=["server"])
async def model(model_id: str, request: Request) -> schemas.Model:
    """The model of this server, if that is its id."""
    service = _service(request)
    if model_id != service.settings.name:
        raise Problem(404, f"model {model_id!r}: this server has {service.settings.name!r}", "model_not_found", "model")
    return _model(service)


def _model(service: Service) -> schemas.Model:
    hidden = ("type", "pid")
    about = {name: value for name, value in service.dispatcher.about.items() if name not in hidden}
    settings = service.settings
    about |= {"max_pictures": 10, "max_queue": settings.max_queue, "max_body": settings.max_body}
    about |= {"max_pixels": settings.max_pixels, "keys": service.keys is not None}
    return schemas.Model(id=settings.name, created=service.started, glmimg=about)


@router.get("/adapters", tags=["server"])
async def adapters(request: Request) -> schemas.AdapterList:
    """Adapters that a request may name."""
    names = _service(request).adapter_names()
    return schemas.AdapterList(data=[schemas.Adapter(id=name) for name in names])


@router.get("/usage", tags=["server"])
async def usage(request: Request) -> schemas.UsageReply:
    """What was made for this key so far."""
    service, client = _service(request), request.scope["state"].get("client", LOCAL)
    totals = service.ledger.totals.get(client.name, Totals())
    return schemas.UsageReply.model_validate({"client": client.name, **totals.to_dict()})


def validation_problem(errors: Any) -> Problem:
    """The first of pydantic's findings as OpenAI words them."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    param = ".".join(place) or None
    if first["type"] == "unknown_parameter":
        param = ".".join([*place, str(first["ctx"]["name"])])
        return Problem(400, first["msg"], "unknown_parameter", param)
    if first["type"] == "missing":
        what = f"{param} is missing" if param else "the request has no body"
        return Problem(400, what, "missing_required_parameter", param)
    if first["type"] in ("dict_type", "model_attributes_type") and param is None:  # text, where its kind is not told
        advice = "send one, with Content-Type: application/json"
        return Problem(400, f"the body is no JSON object: {advice}", "invalid_body")
    if first["type"] == "json_invalid":
        return Problem(400, f"the body is no JSON: {first.get('ctx', {}).get('error', '')}", "invalid_json")
    return Problem(400, f"{param or 'body'}: {first['msg']}", "invalid_value", param)
