"""KV over TCP: one long-lived connection between a pair of workers."""

from __future__ import annotations

import errno
import socket
import time
from dataclasses import dataclass

from core.errors import TransferError
from kv_transfer.transports.socket_connection import SharedSocket, SocketConnection

# Out of descriptors or buffers: callers must wait until somebody else lets go of some.
_PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_OUT_OF_DESCRIPTORS_S = 0.05


@dataclass(frozen=True)
class TcpTransport:
    """Listens on `host:port` (port 0: any free one) and says `advertise` as its host, by default `host` itself.

    `connect_timeout_s` bounds a dial. A peer whose kernel is silent for about `dead_after_s` is given up (keepalive, and
    TCP_USER_TIMEOUT where the system has it); a peer that is stopped but whose kernel answers is the leases' business.
    `buffer_bytes` fixes the socket buffers; None leaves them to the kernel, which grows them as the link needs.
    """

    host: str = "127.0.0.1"
    port: int = 0
    advertise: str | None = None
    connect_timeout_s: float = 3.0
    dead_after_s: float = 10.0
    buffer_bytes: int | None = None

    def listen(self) -> TcpListener:
        """Raises TransferError if the address cannot be bound."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if self.buffer_bytes is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.buffer_bytes)
            sock.bind((self.host, self.port))
            sock.listen(128)
        except OSError as error:
            sock.close()
            raise TransferError(f"cannot listen on {self.host}:{self.port}: {error}") from error
        return TcpListener(sock, self)

    def connect(self, endpoint: str) -> SocketConnection:
        host, port = split_endpoint(endpoint)
        try:
            sock = socket.create_connection((host, port), timeout=self.connect_timeout_s)
        except OSError as error:
            raise TransferError(f"cannot connect to {endpoint}: {error}") from error
        return self.adopt(sock)

    def adopt(self, sock: socket.socket) -> SocketConnection:
        """A connected socket with this transport's options set. Raises TransferError, and closes it, if it is dead."""
        try:
            sock.settimeout(None)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.buffer_bytes is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.buffer_bytes)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.buffer_bytes)
            _notice_death(sock, self.dead_after_s)
        except OSError as error:
            sock.close()
            raise TransferError(f"cannot set up a connection: {error}") from error
        return SocketConnection(sock)


class TcpListener:
    def __init__(self, sock: socket.socket, transport: TcpTransport) -> None:
        self._shared = SharedSocket(sock)
        self._transport = transport
        host, port = sock.getsockname()[:2]
        host = transport.advertise or host
        self._endpoint = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    @property
    def endpoint(self) -> str:
        return self._endpoint

    def accept(self) -> SocketConnection:
        while True:
            with self._shared.using() as listening:
                try:
                    sock, _ = listening.accept()
                except ConnectionAbortedError:
                    continue  # the caller hung up before we answered
                except OSError as error:
                    if error.errno not in _PASSING:
                        raise TransferError(f"not listening any more: {error}") from error
                    time.sleep(_OUT_OF_DESCRIPTORS_S)
                    continue
            try:
                return self._transport.adopt(sock)
            except TransferError:
                continue  # likewise

    def close(self) -> None:
        self._shared.close()  # shutting a listening socket down wakes a blocked accept on Linux


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port`. Raises TransferError on anything else."""
    host, _, port = endpoint.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise TransferError(f"Got {endpoint = } but expected host:port")
    return host, int(port)


def _notice_death(sock: socket.socket, dead_after_s: float) -> None:
    """Keepalive for idle connections, TCP_USER_TIMEOUT for those with unacknowledged bytes; Linux names where they exist."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    every_s = max(1, round(dead_after_s / 5))
    for name, value in (("TCP_KEEPIDLE", every_s * 2), ("TCP_KEEPINTVL", every_s), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(dead_after_s * 1000))
