"""The app: routes, page, health, metrics; around them the guard that every request passes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from glmimg import __version__
from glmimg.errors import MissingExtra

try:
    import prometheus_client  # noqa: F401
    import python_multipart  # noqa: F401
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
except ImportError as error:
    raise MissingExtra.of(str(error.name), "server", "the server") from error
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartParser
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles

from glmimg.serving import schemas
from glmimg.serving.guard import Guard
from glmimg.serving.routes import router, validation_problem
from glmimg.serving.service import Service
from glmimg.serving.settings import Problem, ServerSettings

__all__ = ["create_app"]

PAGE = Path(__file__).parent / "page"
SAVE_EVERY = 10.0  # seconds between two writings of the usage
_ERROR: dict[str, Any] = {"model": schemas.ErrorReply}
_TEXT: dict[str, Any] = {"content": {"text/plain": {"schema": {"type": "string"}}}}

logger = logging.getLogger(__name__)


def create_app(settings: ServerSettings | None = None) -> FastAPI:
    """The ASGI app of one model. Its worker starts with it; the app is up when a first picture has been drawn."""
    settings = settings or ServerSettings()
    service = Service(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        saving = asyncio.create_task(_save(service))
        try:
            await service.dispatcher.start()
            yield
        finally:
            saving.cancel()
            await service.dispatcher.stop()
            service.ledger.save()

    app = FastAPI(
        title="glmimg",
        version=__version__,
        description="Pictures from prompts with GLM-Image. OpenAI's image API, and the layout behind each picture.",
        lifespan=lifespan,
        docs_url=None,  # these pages load scripts from elsewhere; ours is /docs
        redoc_url=None,
    )
    app.state.service = service
    app.include_router(router)
    app.add_middleware(Guard, service=service)
    # What was uploaded stays in memory, whose size is limited: a full disk is no concern of ours.
    MultiPartParser.spool_max_size = max(MultiPartParser.spool_max_size, settings.max_body)

    @app.get("/health", tags=["server"], response_model=schemas.Health, responses={503: {"model": schemas.Health}})
    async def health() -> JSONResponse:
        """Whether this process can still do its work: 200, or 503 when the worker cannot be started any more."""
        state = service.dispatcher.state
        failed = state in ("failed", "stopped")
        body = {"status": "failed" if failed else "ok", "state": state, "version": __version__}
        return JSONResponse(body, 503 if failed else 200)

    @app.get("/ready", tags=["server"], response_model=schemas.Readiness, responses={503: {"model": schemas.Readiness}})
    async def ready() -> JSONResponse:
        """Whether pictures can be made right now: a first one was drawn when the worker started."""
        state, waiting = service.dispatcher.state, len(service.dispatcher.queue)
        body = {"ready": state == "ready", "state": state, "waiting": waiting}
        headers = {} if state == "ready" else {"Retry-After": "5"}
        return JSONResponse(body, 200 if state == "ready" else 503, headers)

    @app.get("/metrics", tags=["server"], response_class=Response, responses={200: _TEXT, 401: _ERROR, 403: _ERROR})
    async def metrics() -> Response:
        """For Prometheus."""
        figures, dispatcher = service.metrics, service.dispatcher
        figures.waiting.set(len(dispatcher.queue))
        figures.running.set(len(dispatcher.running))
        figures.batch.set(dispatcher.stats.get("batch") or 0)
        figures.memory.set(dispatcher.stats.get("rss") or 0)
        figures.ready.set(dispatcher.state == "ready")
        return Response(figures.text(), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(PAGE / "docs.html")

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> FileResponse:
        return FileResponse(PAGE / "icon.svg", media_type="image/svg+xml")

    app.mount("/page", StaticFiles(directory=PAGE), name="page")

    def openapi() -> dict[str, Any]:
        """FastAPI's own, but for the answer to invalid requests: ours is 400, in OpenAI's shape."""
        if app.openapi_schema is None:
            spec = FastAPI.openapi(app)
            for methods in spec["paths"].values():
                for operation in methods.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                spec["components"]["schemas"].pop(name, None)
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]

    @app.exception_handler(Problem)
    async def problem(request: Request, error: Problem) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        found = validation_problem(error.errors())
        return JSONResponse(found.body(), found.status)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        words = {404: "there is nothing under this address", 405: "this address takes another method"}
        found = Problem(error.status_code, words.get(error.status_code, str(error.detail)))
        return JSONResponse(found.body(), found.status, error.headers)

    return app


async def _save(service: Service) -> None:
    while True:
        await asyncio.sleep(SAVE_EVERY)
        await asyncio.to_thread(service.ledger.save)
