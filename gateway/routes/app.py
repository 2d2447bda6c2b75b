"""The whole HTTP door as one ASGI application: which path leads where, and what errors look like.

`create_app` is handed all it uses; it opens no socket and starts no thread, so tests can call it in process. Every error,
whoever raises it, leaves in OpenAI's shape: a wrong field, an unknown path, a wrong method, a bug.
"""

from __future__ import annotations

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
from gateway.http.schema import Route, describe
from gateway.protocol.bodies import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from gateway.protocol.shapes import (
    ChatAnswer,
    ChatChunk,
    CompletionAnswer,
    CompletionChunk,
    DetokenizeAnswer,
    Health,
    InstanceList,
    Invariants,
    Live,
    ModelCard,
    ModelList,
    RequestList,
    ServerLoad,
    TokenizeAnswer,
    Version,
)
from gateway.routes.generating import GeneratingRoutes
from gateway.routes.status import StatusRoutes
from gateway.serving.inbox import ClientGone
from gateway.serving.metrics import CONTENT_TYPE, Metrics

log = structlog.get_logger()

CLIENT_CLOSED_REQUEST = 499


def create_app(
    generating: GeneratingRoutes, status: StatusRoutes, metrics: Metrics, api_key: str | None, salt_key: bytes
) -> ASGIApp:
    """The whole HTTP door as one ASGI application. `salt_key` is a secret that tenants' cache salts are made with."""
    app = FastAPI(title="HetServe", version=status.version, docs_url=None, redoc_url=None, redirect_slashes=False)
    routes = _routes(generating, status)
    for route in routes:
        app.add_api_route(route.path, route.handler, methods=[route.method], response_model=None, response_class=JSON)
    describe(app, routes, with_key=api_key is not None)
    _shape_errors(app, metrics)
    return Guard(app, api_key, metrics, salt_key, frozenset(route.path for route in routes if route.open))


def _routes(generating: GeneratingRoutes, status: StatusRoutes) -> list[Route]:
    """Every path there is, but for `/openapi.json`, which says what is here."""
    return [
        Route(
            "POST",
            "/v1/completions",
            generating.completions,
            CompletionAnswer,
            "Complete a text",
            CompletionRequest,
            chunk=CompletionChunk,
        ),
        Route("POST", "/v1/chat/completions", generating.chat, ChatAnswer, "Answer a chat", ChatRequest, chunk=ChatChunk),
        Route("POST", "/tokenize", generating.tokenize, TokenizeAnswer, "Text or messages to tokens", TokenizeRequest),
        Route("POST", "/detokenize", generating.detokenize, DetokenizeAnswer, "Tokens to text", DetokenizeRequest),
        Route("GET", "/v1/models", status.models, ModelList, "What is served, under all its names"),
        Route("GET", "/v1/models/{model_id:path}", status.model, ModelCard, "One name of what is served"),
        Route("GET", "/health", status.health, Health, "Whether a request could be served now", sick=True, open=True),
        Route("GET", "/ready", status.health, Health, "The same, as kubelets ask", sick=True, open=True),
        Route("GET", "/ping", status.health, Health, "The same, as SageMaker asks", sick=True, open=True),
        Route("GET", "/live", status.live, Live, "Whether this process answers, whoever can serve", open=True),
        Route("GET", "/load", status.load, ServerLoad, "Generations under way, as vLLM says it"),
        Route("GET", "/version", status.show_version, Version, "Which version this is", open=True),
        Route("GET", "/metrics", status.show_metrics, CONTENT_TYPE, "Metrics for Prometheus"),
        Route("GET", "/debug/instances", status.instances, InstanceList, "Who serves, and how busy they are"),
        Route("GET", "/debug/requests", status.requests, RequestList, "Generations under way and recent ones"),
        Route("GET", "/debug/invariants", status.invariants, Invariants, "Counts that add up"),
    ]


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
