"""Who may talk to whom: a ZeroMQ context whose sockets speak CurveZMQ with the cluster's key pair and admit nobody else."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import zmq
from zmq.auth.thread import ThreadAuthenticator

from mail.keys import ClusterKeys

DOMAIN = "hetserve"
MOST_SOCKETS = 8192
"""Of one process: its threads share the context, and ZeroMQ's own limit of 1,023 is that of one large thread."""


class Door:
    """A ZeroMQ context whose servers admit members only. One per process; close it last."""

    def __init__(self, keys: ClusterKeys) -> None:
        self.keys = keys
        self.context = zmq.Context()
        self.context.set(zmq.MAX_SOCKETS, MOST_SOCKETS)
        self._authenticator = ThreadAuthenticator(self.context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(DOMAIN, credentials_provider=_Members(keys))

    def close(self) -> None:
        self._authenticator.stop()
        self.context.destroy(linger=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _Members:
    """ZAP credentials provider: the cluster's own public key and no other."""

    def __init__(self, keys: ClusterKeys) -> None:
        self._public = keys.public.encode()

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._public


def secure_server(socket: zmq.Socket[bytes], keys: ClusterKeys) -> None:
    socket.set(zmq.CURVE_SERVER, 1)
    socket.curve_publickey = keys.public.encode()
    socket.curve_secretkey = keys.secret.encode()
    socket.set_string(zmq.ZAP_DOMAIN, DOMAIN)
