"""The ASGI application: OpenAI's endpoints over an engine.

Middleware is plain ASGI: Starlette's BaseHTTPMiddleware would hide from the handlers that a client has gone.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response

import jora
from jora.serve.http import adapters_api, chat, completions, errors, tokenize_api
from jora.serve.http.errors import ApiError, invalid
from jora.serve.http.limits import BodyLimit
from jora.serve.http.responses import ErrorBody, Status, Version
from jora.serve.http.schemas import EmbeddingRequest
from jora.serve.http.server import Server

# What every endpoint may answer, for the OpenAPI description.
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request cannot be used."},
    401: {"model": ErrorBody, "description": "No API key, or one that is not known."},
    403: {"model": ErrorBody, "description": "The API key is not for this adapter."},
    404: {"model": ErrorBody, "description": "There is no such model."},
    408: {"model": ErrorBody, "description": "The body did not come in time."},
    413: {"model": ErrorBody, "description": "The body is too large."},
    429: {"model": ErrorBody, "description": "Too many requests: try again after Retry-After seconds."},
    500: {"model": ErrorBody, "description": "An error of the server."},
    503: {"model": ErrorBody, "description": "The server is starting or shutting down."},
    504: {"model": ErrorBody, "description": "The request did not end within its time limit."},
}


def create_app(server: Server) -> FastAPI:
    """The application. `server.ready` and `server.draining` may change while it runs."""
    app = FastAPI(title="Jora", version=jora.__version__, responses=_ERRORS, redirect_slashes=False)
    errors.install(app)
    for endpoint in (adapters_api, completions, chat, tokenize_api):
        app.include_router(endpoint.router(server))
    _add_state(app, server)
    _describe_errors(app)
    app.add_middleware(BodyLimit, limit=server.body_bytes)
    return app


def _add_state(app: FastAPI, server: Server) -> None:
    @app.post("/v1/embeddings", status_code=400, response_model=ErrorBody)
    async def embeddings(body: EmbeddingRequest) -> Response:
        raise invalid("this server generates text and has no embeddings", code="unsupported_endpoint")

    @app.get("/health", response_model=Status)
    async def health() -> Status:
        """Whether the process works: 503 tells an orchestrator to restart it."""
        if server.backend.failure is not None:
            raise ApiError(503, "the engine has stopped after an error; see the log", code="engine_failed")
        return Status(status="ok")

    @app.get("/ready", response_model=Status)
    async def ready() -> Status:
        """Whether requests should be sent here: not before the engine is warm, nor while it drains."""
        if server.backend.failure is not None or server.draining or not server.ready:
            raise ApiError(503, "draining" if server.draining else "not ready", code="unavailable")
        return Status(status="ready")

    @app.get("/version", response_model=Version)
    async def version() -> Version:
        return Version(version=jora.__version__)

    @app.get("/metrics", responses={200: {"content": {"text/plain": {}}}}, response_class=Response)
    async def metrics(http: Request) -> Response:
        text, content_type = server.metrics.render(http.headers.get("accept"), await server.backend.stats())
        return Response(text, headers={"Content-Type": content_type})


def _describe_errors(app: FastAPI) -> None:
    """Take FastAPI's 422 out of the description: validation errors are 400 here."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            for path in describe()["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
