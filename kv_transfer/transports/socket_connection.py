"""A connected stream socket as a `Connection`; shared by TCP and in-process transports.

Blocking calls in threads with the GIL released, about 1 MiB a call: the fastest plain path in Python. A descriptor is
closed only when no thread is inside a call on it, so that a reused number can never be read or written by mistake.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from core.errors import TransferError
from kv_transfer.transport import Buffer

CHUNK_BYTES = (1 << 20) + (1 << 16)  # small pieces with the frames beside them leave in one call
MOST_PARTS = 64


class SharedSocket:
    """A blocking socket that any thread may close while others are inside calls on it. Owns the socket it is given."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._lock = threading.Lock()
        self._users = 0
        self._closed = False

    @contextmanager
    def using(self) -> Iterator[socket.socket]:
        """Hold the descriptor open. Raises TransferError once it is closed."""
        with self._lock:
            if self._closed:
                raise TransferError("the connection is closed")
            self._users += 1
        try:
            yield self._socket
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._closed and self._users == 0:
                self._socket.close()

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._users == 0:
                self._socket.close()
                return
            # Somebody is inside a call: wake them; the last one out closes the descriptor.
            with suppress(OSError):  # the peer may have been faster
                self._socket.shutdown(socket.SHUT_RDWR)


class SocketConnection:
    """Owns the socket it is given."""

    def __init__(self, sock: socket.socket) -> None:
        self._shared = SharedSocket(sock)
        self._send_lock = threading.Lock()

    def send(self, parts: Sequence[Buffer], *, wait: bool = True) -> None:
        views = [view for part in parts if (view := memoryview(part).cast("B")).nbytes]
        with self._shared.using() as sock, self._send_lock:
            try:
                _send_all(sock, views, 0 if wait else socket.MSG_DONTWAIT)
            except OSError as error:
                self.close()
                reason = "the peer does not read" if isinstance(error, BlockingIOError) else str(error)
                raise TransferError(f"cannot send: {reason}") from error

    def recv_into(self, view: memoryview) -> None:
        with self._shared.using() as sock:
            got = 0
            while got < view.nbytes:
                try:
                    count = sock.recv_into(view[got : got + CHUNK_BYTES], 0, socket.MSG_WAITALL)
                except OSError as error:
                    raise TransferError(f"cannot receive: {error}") from error
                if count == 0:
                    where = f" within a message, {got} of {view.nbytes} bytes in" if got else ""
                    raise TransferError(f"the connection ended{where}")
                got += count

    def close(self) -> None:
        self._shared.close()


def _send_all(sock: socket.socket, views: list[memoryview], flags: int) -> None:
    while views:
        batch, room = [], CHUNK_BYTES  # headers, bodies and a payload leave in one call
        for view in views[:MOST_PARTS]:
            batch.append(view[:room])
            room -= batch[-1].nbytes
            if room == 0:
                break
        sent = sock.sendmsg(batch, (), flags | socket.MSG_NOSIGNAL)
        while views and sent >= views[0].nbytes:
            sent -= views.pop(0).nbytes
        if sent:
            views[0] = views[0][sent:]
