"""The app under Uvicorn in this process, from start to a graceful end."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from contextlib import suppress
from types import FrameType

import uvicorn
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from glmimg.checkpoint import Checkpoint
from glmimg.errors import BadInput
from glmimg.serving.app import create_app
from glmimg.serving.service import Service
from glmimg.serving.settings import Problem, ServerSettings

__all__ = ["run"]

CONNECTIONS = 1000  # at a time; further ones are told to come back
HEAD_SECONDS = 20.0  # for the head of a request, from the connection's beginning or the answer before


class _Protocol(H11Protocol):
    """With h11, which every installation has: others keep other limits. Closes a connection that asks for nothing."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head(self.cycle)

    def on_response_complete(self) -> None:
        answered = self.cycle
        super().on_response_complete()  # which begins with the next one, if that was sent already
        self._await_head(answered)

    def _await_head(self, last: object) -> None:
        self.loop.call_later(HEAD_SECONDS, self._require_head, last)

    def _require_head(self, last: object) -> None:
        if self.cycle is last and not self.transport.is_closing():  # each request has its own
            self.transport.close()

    def handle_events(self) -> None:
        self.app = _full if len(self.connections) > CONNECTIONS else self.config.loaded_app
        super().handle_events()


async def _full(scope: Scope, receive: Receive, send: Send) -> None:
    problem = Problem(503, f"{CONNECTIONS} connections are open already: try again", "server_busy", None, 5)
    await JSONResponse(problem.body(), 503, {**problem.headers, "Connection": "close"})(scope, receive, send)


class _Server(uvicorn.Server):
    """Says where it listens, and lets running requests end, or tells them why not, before connections are closed."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: set[asyncio.Task[None]] = set()
        self._signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if self.should_exit:
            return
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            settings = self.service.settings
            port = self.servers[0].sockets[0].getsockname()[1]
            name = f"[{settings.host}]" if ":" in settings.host else settings.host
            print(f"glmimg serves {settings.name} at http://{name}:{port}", flush=True)

    async def on_tick(self, counter: int) -> bool:
        """Ends with the worker, for whoever starts services again."""
        return await super().on_tick(counter) or self.service.dispatcher.failure is not None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First: nothing new, and time for what there is. Second: no more time. While the model loads: the end."""
        self._signals += 1
        if self.started and self._loop is not None and self._signals <= 2:
            seconds = self.service.settings.drain if self._signals == 1 else 0.0
            self._loop.call_soon_threadsafe(self._begin_drain, seconds)
            return
        super().handle_exit(sig, frame)
        if not self.started and self._loop is not None:
            self._loop.call_soon_threadsafe(self.service.dispatcher.abandon)

    def _begin_drain(self, seconds: float) -> None:
        async def drain() -> None:
            await self.service.dispatcher.drain(seconds)
            await asyncio.sleep(0.1)  # the last answers are on their way
            self.should_exit = True

        self._draining.add(asyncio.get_running_loop().create_task(drain()))


def run(settings: ServerSettings) -> bool:
    """Serves until a signal comes; whether it had come up at all."""
    logging.basicConfig(level=logging.WARNING, format="glmimg: %(message)s", stream=sys.stderr)
    logging.getLogger("glmimg").setLevel(logging.INFO)
    app = create_app(settings)
    service: Service = app.state.service
    if not os.path.isdir(os.path.expanduser(settings.model)):
        Checkpoint.open(settings.model)  # what is none is told before a worker starts; folders are for that to read
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http=_Protocol,
        ws="none",
        root_path=settings.root_path,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=10,
        h11_max_incomplete_event_size=64 << 10,
    )
    # A start that fails is told in one line by whoever called; what uvicorn says of it tells nothing more.
    needless = ("Traceback", "Application startup failed")
    logging.getLogger("uvicorn.error").addFilter(lambda record: not record.getMessage().startswith(needless))
    server = _Server(config, service)
    with _bound(settings) as listening, suppress(SystemExit):  # uvicorn's, of a start that failed
        server.run(sockets=[listening])
    if service.dispatcher.failure is not None:
        raise service.dispatcher.failure
    return server.started


def _bound(settings: ServerSettings) -> socket.socket:
    """The server's address, taken before a model is loaded for nothing."""
    bound = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    if os.name == "posix":  # elsewhere this would share the port
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # A reader that takes nothing is cut off by the system, with what waits for it: the loop only waits on.
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * settings.write_timeout))
    try:
        bound.bind((settings.host, settings.port))
    except OSError as error:
        bound.close()
        where = f"{settings.host}, port {settings.port}"
        raise BadInput(f"cannot listen at {where} ({error.strerror}): give another --port or --host") from error
    return bound
