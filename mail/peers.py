"""The sending side: one ZeroMQ PUSH socket per mailbox that a thread sends to.

Sending never blocks: a peer that does not read has a bounded queue, then loses messages, and the sender is told. Not
thread-safe: each thread has its own.
"""

from __future__ import annotations

import zmq

from core.messages import Message
from core.wire import encode
from mail.door import Door
from mail.mailbox import QUEUED_MESSAGES


class Peers:
    """Sends messages to mailboxes, connecting on first use."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._sockets: dict[str, zmq.Socket[bytes]] = {}

    def send(self, endpoint: str, message: Message) -> bool:
        """Queue a message; False when the peer's queue is full or the endpoint is not one. Never blocks."""
        socket = self._sockets.get(endpoint)
        if socket is None:
            socket = self._connect(endpoint)
            if socket is None:
                return False
        try:
            socket.send(encode(message), zmq.NOBLOCK, copy=True)
        except zmq.Again:
            return False
        return True

    def forget(self, endpoint: str) -> None:
        """Close the connection and drop what it had queued."""
        socket = self._sockets.pop(endpoint, None)
        if socket is not None:
            socket.close(linger=0)

    def close(self, linger_s: float = 0.5) -> None:
        """Close all connections, giving queued messages up to `linger_s` to leave."""
        for socket in self._sockets.values():
            socket.close(linger=round(linger_s * 1000))
        self._sockets.clear()

    def _connect(self, endpoint: str) -> zmq.Socket[bytes] | None:
        socket = self._door.context.socket(zmq.PUSH)
        keys = self._door.keys
        socket.curve_serverkey = keys.public.encode()
        socket.curve_publickey = keys.public.encode()
        socket.curve_secretkey = keys.secret.encode()
        socket.set(zmq.SNDHWM, QUEUED_MESSAGES)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.IPV6, 1)
        socket.set(zmq.HEARTBEAT_IVL, 2000)
        socket.set(zmq.HEARTBEAT_TIMEOUT, 6000)
        try:
            socket.connect(endpoint)
        except zmq.ZMQError:
            socket.close()
            return None
        self._sockets[endpoint] = socket
        return socket
