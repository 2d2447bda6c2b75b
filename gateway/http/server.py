"""The server that runs the HTTP application. It binds its socket first, so that a taken port is known before anything else is
started."""

from __future__ import annotations

import asyncio
import errno
import socket
from functools import partial
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp

from core.errors import LaunchError, PortInUse
from gateway.http.connection import Connection, ConnectionLimits

KEEP_ALIVE_S = 30
BACKLOG = 2048


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

    @property
    def answering(self) -> int:
        """Connections on which an answer is still on its way."""
        return sum(cast(Connection, connection).answering for connection in self._server.server_state.connections)


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
