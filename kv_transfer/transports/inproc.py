"""KV between two engines of one process, over socket pairs: the same byte streams as TCP, without a network.

Both sides must share the one `InprocTransport`.
"""

from __future__ import annotations

import queue
import socket
import threading

from core.errors import TransferError
from kv_transfer.transports.socket_connection import SocketConnection


class InprocTransport:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: dict[str, InprocListener] = {}
        self._made = 0

    def listen(self) -> InprocListener:
        with self._lock:
            self._made += 1
            listener = InprocListener(f"inproc:{self._made}", self)
            self._listeners[listener.endpoint] = listener
        return listener

    def connect(self, endpoint: str) -> SocketConnection:
        with self._lock:
            listener = self._listeners.get(endpoint)
            if listener is None:
                raise TransferError(f"nobody listens on {endpoint}")
            near, far = socket.socketpair()
            listener._arrivals.put(SocketConnection(far))
        return SocketConnection(near)

    def _forget(self, endpoint: str) -> bool:
        with self._lock:
            return self._listeners.pop(endpoint, None) is not None


class InprocListener:
    def __init__(self, endpoint: str, transport: InprocTransport) -> None:
        self._endpoint = endpoint
        self._transport = transport
        self._arrivals: queue.SimpleQueue[SocketConnection | None] = queue.SimpleQueue()

    @property
    def endpoint(self) -> str:
        return self._endpoint

    def accept(self) -> SocketConnection:
        connection = self._arrivals.get()
        if connection is None:
            self._arrivals.put(None)
            raise TransferError("not listening any more")
        return connection

    def close(self) -> None:
        if not self._transport._forget(self._endpoint):
            return
        while not self._arrivals.empty():
            waiting = self._arrivals.get()
            if waiting is not None:
                waiting.close()
        self._arrivals.put(None)
