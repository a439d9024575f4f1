"""What goes back: one JSON object when all is done, or events while it is being made."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from glmimg.serving import schemas
from glmimg.serving.auth import Client
from glmimg.serving.dispatcher import Ticket
from glmimg.serving.jobs import Job
from glmimg.serving.service import Service
from glmimg.serving.settings import problem_of

__all__ = ["answer"]

HEARTBEAT = 15.0  # seconds without an event after which a comment keeps proxies from hanging up
CLIENT_GONE = 499


async def answer(service: Service, request: Request, job: Job, body: schemas.TokenFields, kind: str) -> Response:
    """Runs the job and answers; `kind` names the events: image_generation, image_edit or image_layout."""
    client: Client = request.scope["state"]["client"]
    if body.stream:
        return await EventStream.of(service, client, job, body, kind)
    async with service.ticket(job, client) as ticket:
        working = asyncio.create_task(_all(service, ticket, body, str(request.base_url)))
        gone = asyncio.create_task(_disconnected(request.receive))
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not working.done():
            working.cancel()
            service.metrics.cancelled.inc()
            return Response(status_code=CLIENT_GONE)
        return JSONResponse((await working).model_dump(mode="json", exclude_none=True))


async def _all(
    service: Service, ticket: Ticket, body: schemas.TokenFields, url: str
) -> schemas.ImagesReply | schemas.LayoutReply:
    images: dict[int, schemas.Image] = {}
    async for message in ticket:
        if message["type"] != "picture":
            continue
        await service.judge(message["data"])
        image = _image(message, body)
        if image.b64_json and getattr(body, "response_format", None) == "url":
            assert message["data"] is not None
            name = service.files.put(message["data"], f"image/{ticket.job.output_format}")
            image.b64_json, image.url = None, f"{url}v1/files/{name}"
        images[message["picture"]] = image
    data, usage = [images[k] for k in sorted(images)], service.usage(ticket.booked, ticket.about)
    created, size = int(time.time()), data[0].size
    if not isinstance(body, schemas.ImageRequest):
        return schemas.LayoutReply(created=created, data=data, size=size, usage=usage)
    return schemas.ImagesReply(
        created=created,
        data=data,
        output_format=ticket.job.output_format,
        quality=body.quality or "auto",
        size=size,
        usage=usage,
    )


def _image(message: dict[str, Any], body: schemas.TokenFields) -> schemas.Image:
    data = message["data"]
    wanted = data is None or getattr(body, "return_tokens", False)
    return schemas.Image(
        b64_json=None if data is None else base64.b64encode(data).decode(),
        seed=message["seed"],
        size=f"{message['width']}x{message['height']}",
        tokens=message["tokens"] if wanted else None,
    )


class EventStream(Response):
    """Server-sent events of one ticket. A reader that goes away, or stops reading, cancels it."""

    media_type = "text/event-stream"

    def __init__(self, service: Service, ticket: Any, events: AsyncIterator[bytes]) -> None:
        self.service, self.ticket, self.events = service, ticket, events
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    @classmethod
    async def of(cls, service: Service, client: Client, job: Job, body: schemas.TokenFields, kind: str) -> EventStream:
        """In the queue already: what can be refused is refused before the answer begins."""
        entered = service.ticket(job, client)
        ticket = await entered.__aenter__()
        return cls(service, entered, _events(service, ticket, body, kind))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        working = asyncio.create_task(self._write(send))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                await working
            else:
                self.service.metrics.cancelled.inc()
        except asyncio.TimeoutError:  # it read nothing for too long; returning without an end closes the connection
            self.service.metrics.cancelled.inc()
        finally:
            working.cancel()
            gone.cancel()
            await asyncio.gather(working, gone, return_exceptions=True)
            await self.ticket.__aexit__(None, None, None)

    async def _write(self, send: Send) -> None:
        async def out(message: dict[str, Any]) -> None:
            await asyncio.wait_for(send(message), self.service.settings.write_timeout)

        await out({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        following = asyncio.ensure_future(anext(self.events))
        try:
            while True:
                done, _ = await asyncio.wait({following}, timeout=HEARTBEAT)
                if not done:
                    await out({"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})
                    continue
                try:
                    chunk = following.result()
                except StopAsyncIteration:
                    break
                await out({"type": "http.response.body", "body": chunk, "more_body": True})
                following = asyncio.ensure_future(anext(self.events))
        finally:
            following.cancel()
        await out({"type": "http.response.body", "body": b"", "more_body": False})


async def _events(service: Service, ticket: Ticket, body: schemas.TokenFields, kind: str) -> AsyncIterator[bytes]:
    try:
        async for message in ticket:
            event = message.pop("type")
            message.pop("id", None)
            if event == "position":
                yield _event(f"{kind}.queued", message)
                continue
            number = message.pop("picture")
            if event == "progress":
                yield _event(f"{kind}.progress", {"index": number, **message})
                continue
            await service.judge(message["data"])
            fields: dict[str, Any] = {
                "index": number,
                "created_at": int(time.time()),
                "size": f"{message['width']}x{message['height']}",
            }
            if message["data"] is not None:
                fields |= {
                    "b64_json": base64.b64encode(message["data"]).decode(),
                    "quality": getattr(body, "quality", None) or "auto",
                    "background": "opaque",
                    "output_format": ticket.job.output_format,
                }
            if event == "partial":
                yield _event(f"{kind}.partial_image", {**fields, "partial_image_index": message["number"]})
                continue
            usage: schemas.Usage = message["usage"]
            fields |= {"seed": message["seed"], "usage": usage.model_dump(mode="json", exclude_none=True)}
            if message["data"] is None or getattr(body, "return_tokens", False):
                fields["tokens"] = message["tokens"]
            yield _event(f"{kind}.completed", fields)
    except Exception as error:
        yield _event("error", problem_of(error).body())


def _event(name: str, fields: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name, **fields})}\n\n".encode()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
