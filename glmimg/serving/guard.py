"""What every request passes before any route: who may call, how much it may send, how long it may take to send it.

On a server without keys, anybody who can reach the port may use it, and a browser on that machine can: so pages of
other origins are refused, and names other than this machine's own, which they could point here (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import logging
import time
from ipaddress import ip_address
from typing import Any

from starlette._utils import get_route_path  # the router's own view of a path under a prefix
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glmimg.serving.auth import Client
from glmimg.serving.service import Service
from glmimg.serving.settings import Problem, problem_of

__all__ = ["Guard"]

BODY_SECONDS = 120.0  # for the whole of a request's body
BODIES = 16  # times the largest body: what all requests together may hold
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
SECURITY = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'self'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), payment=()",
}

logger = logging.getLogger("glmimg.access")


class Guard:
    """ASGI middleware; plain, so that a disconnect reaches the route."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service
        self.names = {*LOCAL_NAMES, *map(str.lower, service.settings.allow_hosts)}
        self.held = 0  # bytes of the bodies of all requests under way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, answered, method = time.monotonic(), 0, scope["method"]
        if method == "HEAD":  # as GET; what is sent of the body, the server leaves out
            scope = {**scope, "method": "GET"}
        body = _Body(receive, self)
        entered: Client | None = None

        async def out(message: Message) -> None:
            nonlocal answered
            if body.failed and not answered:
                return  # what the route makes of it is of no interest
            if message["type"] == "http.response.start":
                answered = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            client = self._admit(scope)
            if client is not None and scope["method"] == "POST":  # before its body, which may be large, is read
                self.service.limits.enter(client)
                entered = client
            body.require(Headers(scope=scope).get("content-length"))
            await self.app(scope, body, out)
            if body.failed and not answered:
                raise body.failed
        except Exception as error:
            problem = problem_of(error)
            if not answered:  # else its connection is closed in the middle, which says as much
                body.failed = None
                headers = {**problem.headers, **({"Connection": "close"} if problem.status in (408, 413, 503) else {})}
                await JSONResponse(problem.body(), problem.status, headers)(scope, receive, out)
        finally:
            self.held -= body.got
            if entered is not None:
                self.service.limits.leave(entered)
            route = getattr(scope.get("route"), "path", "") or ("/page" if answered < 400 else "none")
            self.service.metrics.requests.labels(route, str(answered or 499)).inc()
            self.service.metrics.seconds.labels(route).observe(time.monotonic() - began)
            who = getattr(scope.get("state", {}).get("client"), "name", "-")
            logger.info("%s %s %s %s %.3f s", who, method, route, answered or 499, time.monotonic() - began)

    def _admit(self, scope: Scope) -> Client | None:
        """Who asks, where that matters; or the Problem that keeps the request out."""
        headers, path = Headers(scope=scope), get_route_path(scope)
        host = headers.get("host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self.service.keys is None and not self.service.settings.allow_hosts and not _is_here(scope.get("client")):
            raise Problem(403, "without API keys only this machine is answered: see --keys", "host_not_allowed")
        if self.service.keys is None and name.lower() not in self.names:
            raise Problem(403, f"host {name!r} is not one of this server's names: see --allow-host", "host_not_allowed")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            raise Problem(403, "pages of other origins may not use this server", "origin_not_allowed")
        if headers.get("sec-fetch-site") == "cross-site" and scope["method"] not in ("GET", "HEAD"):
            raise Problem(403, "pages of other origins may not use this server", "origin_not_allowed")
        if path != "/metrics" and (not path.startswith("/v1/") or path.startswith("/v1/files/")):
            return None
        client = self.service.client(headers.get("authorization"))
        scope.setdefault("state", {})["client"] = client
        return client


def _is_here(client: Any) -> bool:
    """Whether that address, if any is known, is this machine's own: whoever runs the app may listen anywhere."""
    try:
        return client is None or ip_address(client[0].partition("%")[0]).is_loopback
    except ValueError:
        return True  # a socket in the file system, or a test


class _Body:
    """The receive of a request whose body may be only so large, alone and with all others, and take only so long."""

    def __init__(self, receive: Receive, guard: Guard) -> None:
        self.receive, self.guard = receive, guard
        self.most = guard.service.settings.max_body
        self.got, self.complete = 0, False
        self.until = time.monotonic() + BODY_SECONDS
        self.failed: Problem | None = None

    def require(self, length: str | None) -> None:
        if length is not None and length.isdigit() and int(length) > self.most:
            raise self._too_large()

    def _too_large(self) -> Problem:
        message = f"a request may have {self.most:,} bytes: send smaller pictures"
        return Problem(413, message, "request_too_large")

    async def __call__(self) -> Message:
        if self.complete:
            return await self.receive()
        try:
            message: Any = await asyncio.wait_for(self.receive(), max(0.0, self.until - time.monotonic()))
        except asyncio.TimeoutError:
            self.failed = Problem(408, "the request did not arrive in time", "request_timeout")
            raise self.failed from None
        if message["type"] == "http.request":
            length = len(message.get("body", b""))
            self.got += length
            self.guard.held += length
            self.complete = not message.get("more_body", False)
            if self.got > self.most:
                self.failed = self._too_large()
                raise self.failed
            if self.guard.held > BODIES * self.most:
                self.failed = Problem(503, "too much is being sent at once: try again", "server_busy", None, 5)
                raise self.failed
        return message
