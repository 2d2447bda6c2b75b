"""The whole HTTP door as one ASGI application: which path leads where, and what errors look like.

`create_app` is handed all it uses; it opens no socket and starts no thread, so tests can call it in process. Every error,
whoever raises it, leaves in OpenAI's shape: a wrong field, an unknown path, a wrong method, a bug.
"""

from __future__ import annotations

from typing import Any

import structlog
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from core.errors import HetServeError
from gateway.http.errors import body_of, error_body, headers_of, should_retry
from gateway.http.guard import Guard
from gateway.http.json_response import JSON
from gateway.http.schema import describe
from gateway.protocol.bodies import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from gateway.routes.generating import GeneratingRoutes
from gateway.routes.status import StatusRoutes
from gateway.serving.inbox import ClientGone
from gateway.serving.metrics import Metrics

log = structlog.get_logger()

CLIENT_CLOSED_REQUEST = 499


def create_app(
    generating: GeneratingRoutes, status: StatusRoutes, metrics: Metrics, api_key: str | None, salt_key: bytes
) -> ASGIApp:
    """The whole HTTP door as one ASGI application. `salt_key` is a secret that tenants' cache salts are made with."""
    app = FastAPI(title="HetServe", version=status.version, docs_url=None, redoc_url=None, redirect_slashes=False)
    posts: list[tuple[str, Any, Any]] = [
        ("/v1/completions", generating.completions, CompletionRequest),
        ("/v1/chat/completions", generating.chat, ChatRequest),
        ("/tokenize", generating.tokenize, TokenizeRequest),
        ("/detokenize", generating.detokenize, DetokenizeRequest),
    ]
    gets: list[tuple[str, Any]] = [
        ("/v1/models", status.models),
        ("/v1/models/{model_id:path}", status.model),
        ("/health", status.health),
        ("/version", status.show_version),
        ("/metrics", status.show_metrics),
        ("/debug/instances", status.instances),
        ("/debug/requests", status.requests),
        ("/debug/invariants", status.invariants),
    ]
    for path, handler, _ in posts:
        app.add_api_route(path, handler, methods=["POST"], response_model=None, response_class=JSON)
    for path, handler in gets:
        app.add_api_route(path, handler, methods=["GET"], response_model=None, response_class=JSON)
    describe(app, {path: kind for path, _, kind in posts})
    _shape_errors(app, metrics)
    return Guard(app, api_key, metrics, salt_key)


def _shape_errors(app: FastAPI, metrics: Metrics) -> None:
    async def typed(request: Request, error: Exception) -> Response:
        assert isinstance(error, HetServeError)
        metrics.refused(error.code)
        return JSON(body_of(error), error.status, headers_of(error))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        said = {404: f"Unknown path: {request.url.path}", 405: f"{request.url.path} does not take {request.method}"}
        message = said.get(error.status_code, str(error.detail))
        metrics.refused(code)
        headers = {**(error.headers or {}), **should_retry(False)}
        return JSON(error_body(error.status_code, message, code), error.status_code, headers)

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def bug(request: Request, error: Exception) -> Response:
        log.error("request failed", path=request.url.path, exc_info=error)
        metrics.refused(HetServeError.code)
        return JSON(error_body(500, "internal error", HetServeError.code), 500)

    app.add_exception_handler(HetServeError, typed)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ClientGone, gone)
    app.add_exception_handler(Exception, bug)
