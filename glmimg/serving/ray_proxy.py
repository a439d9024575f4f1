"""Around Ray's own proxies: what a replica was making when it died is asked of another one.

Ray itself ends such a request with a bare 500, or breaks its stream off. Set on all machines, before `ray start`:
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=glmimg.serving.ray_proxy:middlewares
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glmimg.serving.settings import Problem

__all__ = ["SecondTry", "middlewares"]

logger = logging.getLogger(__name__)
TRIES = 3
PAUSE = 1.0  # seconds between two: Ray needs a moment to see who is gone
KEPT = 32 << 20  # bytes of a body that are kept for another try
DIED = Problem(503, "the replica that made the picture is gone: try again", "worker_died", None, 5)
BUSY = Problem(503, "no replica can take the request: try again", "server_busy", None, 5)


def middlewares() -> list[Middleware]:
    return [Middleware(SecondTry)]


class SecondTry:
    """ASGI middleware. A picture that is made twice is the same, or nobody has seen the first: asking again is safe."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = _KeptBody(receive)
        for left in reversed(range(TRIES)):
            answer = _Answer(send)
            try:
                await self.app({**scope, "headers": list(scope["headers"])}, body.again(), answer)
            except Exception as error:  # what Ray's proxy raises of a dead replica is of many kinds
                if answer.begun and not answer.is_events:
                    raise  # the connection is closed in the middle, which says as much
                logger.warning("a request failed inside Ray (%s: %s)", type(error).__name__, error)
            if answer.complete or body.gone:
                return
            if answer.begun:
                if answer.is_events:
                    event = f"event: error\ndata: {json.dumps(DIED.body())}\n\n".encode()
                    await send({"type": "http.response.body", "body": event, "more_body": False})
                return
            if answer.refused or not left or not body.whole:
                break
            await asyncio.sleep(PAUSE)
        problem = BUSY if answer.refused else DIED
        await JSONResponse(problem.body(), problem.status, problem.headers)(scope, receive, send)


class _Answer:
    """The send of one try: passes on what an app of ours says, and holds back what Ray says in plain text."""

    def __init__(self, send: Send) -> None:
        self.send = send
        self.begun = self.complete = self.is_events = False
        self.failed = self.refused = False  # by Ray

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = Headers(raw=message["headers"]).get("content-type", "")
            by_ray = kind.startswith("text/plain") and message["status"] in (429, 500, 503)
            self.failed, self.refused = by_ray, by_ray and message["status"] != 500
            self.begun, self.is_events = not by_ray, kind.startswith("text/event-stream")
        if self.failed:
            return
        self.complete = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self.send(message)


class _KeptBody:
    """The receive of all tries of one request."""

    def __init__(self, receive: Receive) -> None:
        self.receive, self.gone = receive, False
        self.messages: list[Message] = []
        self.bytes = 0

    @property
    def whole(self) -> bool:
        """Whether another try would get all of what has come so far."""
        return self.bytes <= KEPT

    def again(self) -> Receive:
        earlier = iter(list(self.messages))

        async def receive() -> Message:
            for kept in earlier:
                return kept
            message: Any = await self.receive()
            if message["type"] == "http.disconnect":
                self.gone = True
                return message
            self.bytes += len(message.get("body", b""))
            if self.whole:
                self.messages.append(message)
            else:
                self.messages.clear()
            return message

        return receive
