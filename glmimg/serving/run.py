"""The app under Uvicorn in this process, from start to a graceful end."""

from __future__ import annotations

import asyncio
import logging
import sys
from types import FrameType

import uvicorn

from glmimg.serving.app import create_app
from glmimg.serving.service import Service
from glmimg.serving.settings import ServerSettings

__all__ = ["run"]

CONNECTIONS = 1000  # at a time; further ones are told to come back


class _Server(uvicorn.Server):
    """Says where it listens, and lets running requests end, or tells them why not, before connections are closed."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)  # type: ignore[arg-type]
        if self.started:
            settings = self.service.settings
            port = self.servers[0].sockets[0].getsockname()[1]
            name = f"[{settings.host}]" if ":" in settings.host else settings.host
            print(f"glmimg serves {settings.name} at http://{name}:{port}", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """At the first signal: nothing new, and time for what there is. At the second: now."""
        if self.started and self._draining is None:
            self._loop.call_soon_threadsafe(self._begin_drain)
            return
        super().handle_exit(sig, frame)

    def _begin_drain(self) -> None:
        async def drain() -> None:
            await self.service.dispatcher.drain(self.service.settings.drain)
            await asyncio.sleep(0.1)  # the last answers are on their way
            self.should_exit = True

        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(drain())


def run(settings: ServerSettings) -> bool:
    """Serves until a signal comes; whether it had come up at all."""
    logging.basicConfig(level=logging.WARNING, format="glmimg: %(message)s", stream=sys.stderr)
    logging.getLogger("glmimg").setLevel(logging.INFO)
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        settings.host,
        settings.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=10,
        h11_max_incomplete_event_size=64 << 10,
    )
    # A start that fails is told in one line by whoever called; the traceback behind it says nothing more.
    logging.getLogger("uvicorn.error").addFilter(lambda record: not record.getMessage().startswith("Traceback"))
    server = _Server(config, app.state.service)
    server.run()
    if app.state.service.dispatcher.failure is not None:
        raise app.state.service.dispatcher.failure
    return server.started
