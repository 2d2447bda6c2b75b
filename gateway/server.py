"""The HTTP application and the server that runs it.

`create_app` is handed all it uses; it opens no socket and starts no thread, so tests can call it in process. Every error,
whoever raises it, leaves in OpenAI's shape: a wrong field, an unknown path, a wrong method, a bug.
`HttpServer` binds its socket first, so that a taken port is known before anything else is started.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from functools import partial
from typing import Any, cast

import structlog
import uvicorn
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from core.errors import HetServeError, LaunchError, PortInUse
from gateway.admin import Admin
from gateway.api import JSON, Api
from gateway.connection import Connection, ConnectionLimits
from gateway.errors import body_of, error_body, headers_of
from gateway.guard import Guard
from gateway.inbox import ClientGone
from gateway.metrics import Metrics
from gateway.openai import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from gateway.openapi import describe

log = structlog.get_logger()

KEEP_ALIVE_S = 30
BACKLOG = 2048
CLIENT_CLOSED_REQUEST = 499


def create_app(api: Api, admin: Admin, metrics: Metrics, api_key: str | None, salt_key: bytes) -> ASGIApp:
    """The whole HTTP door as one ASGI application. `salt_key` is a secret that tenants' cache salts are made with."""
    app = FastAPI(title="HetServe", version=admin.version, docs_url=None, redoc_url=None, redirect_slashes=False)
    posts: list[tuple[str, Any, Any]] = [
        ("/v1/completions", api.completions, CompletionRequest),
        ("/v1/chat/completions", api.chat, ChatRequest),
        ("/tokenize", api.tokenize, TokenizeRequest),
        ("/detokenize", api.detokenize, DetokenizeRequest),
    ]
    gets: list[tuple[str, Any]] = [
        ("/v1/models", admin.models),
        ("/v1/models/{model_id:path}", admin.model),
        ("/health", admin.health),
        ("/version", admin.show_version),
        ("/metrics", admin.show_metrics),
        ("/debug/instances", admin.instances),
        ("/debug/requests", admin.requests),
        ("/debug/invariants", admin.invariants),
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
        return JSON(error_body(error.status_code, message, code), error.status_code, dict(error.headers or {}))

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


class HttpServer:
    """uvicorn on a socket of our own. Construct anywhere; `run` in the event loop that shall serve.

    Raises:
        PortInUse: somebody listens there already.
        LaunchError: the address cannot be used.
    """

    def __init__(self, app: ASGIApp, host: str, port: int, limits: ConnectionLimits) -> None:
        self._socket = _listen(host, port)
        self.port: int = self._socket.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.port}"
        config = uvicorn.Config(
            app,
            http=cast(Any, partial(Connection, limits=limits)),
            ws="none",
            loop="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,
            backlog=BACKLOG,
        )
        self._server = uvicorn.Server(config)

    async def run(self) -> None:
        """Serve until `stop`."""
        await self._server.serve(sockets=[self._socket])

    async def ready(self, running: asyncio.Task[None]) -> None:
        """Wait until `run`, as the task `running`, accepts connections; raises what it raised if it never does."""
        while not self._server.started:
            if running.done():
                running.result()
                raise LaunchError("the HTTP server ended before it started")
            await asyncio.sleep(0.005)

    def stop(self) -> None:
        """End `run` within about a second. Safe from any thread."""
        self._server.should_exit = True

    def close(self) -> None:
        """Give the port back when `run` was never called."""
        self._socket.close()

    @property
    def connections(self) -> int:
        return len(self._server.server_state.connections)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
    except OSError as error:
        raise LaunchError(f"cannot listen on {host}: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(f"port {port} on {host} is already in use") from error
        raise LaunchError(f"cannot listen on {host}:{port}: {error}") from error
    listener.setblocking(False)
    return listener
