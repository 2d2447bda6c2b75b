"""One-way messages between processes: everybody owns a mailbox, and whoever knows its address may put messages in.

A `Mailbox` binds one ZeroMQ PULL socket; `Peers` holds one PUSH socket per address it sends to. Sending never blocks: a
peer that does not read has a bounded queue, then loses messages, and the sender is told. Messages between one sender and
one mailbox keep their order.

Every socket speaks CurveZMQ with the cluster's key pair: a peer without it can neither read, send, nor be mistaken for a
member. Neither class is thread-safe: each thread has its own, and `Mailbox.wake` alone may be called from anywhere.
"""

from __future__ import annotations

import os
import threading
from hashlib import blake2b
from types import TracebackType
from typing import Self

import msgspec
import zmq
from zmq.auth.thread import ThreadAuthenticator

from core.errors import LaunchError, ProtocolError
from core.messages import Message
from core.wire import MAX_MESSAGE_BYTES, decode, encode

QUEUED_MESSAGES = 10_000
DOMAIN = "hetserve"


class ClusterKeys(msgspec.Struct, frozen=True):
    """The secret that makes a process a member: a CURVE key pair as Z85 text, made by `generate` once per cluster."""

    public: str
    secret: str

    @classmethod
    def generate(cls) -> ClusterKeys:
        public, secret = zmq.curve_keypair()
        return cls(public.decode(), secret.decode())

    @property
    def transfer_secret(self) -> bytes:
        """32 bytes that key the handshake of the KV transport; they tell nothing of `secret`."""
        return blake2b(self.secret.encode(), digest_size=32, person=b"hetserve-kv-hmac").digest()


class Door:
    """A ZeroMQ context whose servers admit members only. One per process; close it last."""

    def __init__(self, keys: ClusterKeys) -> None:
        self.keys = keys
        self.context = zmq.Context()
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


class Mailbox:
    """Receives messages at `endpoint`. `rejected` counts those that were malformed and dropped."""

    def __init__(self, door: Door, host: str = "127.0.0.1") -> None:
        self._socket = door.context.socket(zmq.PULL)
        _secure_server(self._socket, door.keys)
        self._socket.set(zmq.RCVHWM, QUEUED_MESSAGES)
        self._socket.set(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.set(zmq.LINGER, 0)
        if ":" in host:
            self._socket.set(zmq.IPV6, 1)
        shown = f"[{host}]" if ":" in host else host
        try:
            port = self._socket.bind_to_random_port(f"tcp://{shown}")
        except zmq.ZMQError as error:
            self._socket.close()
            raise LaunchError(f"cannot listen on {host}: {error}") from error
        self.endpoint = f"tcp://{shown}:{port}"
        self.rejected = 0
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._wake_lock = threading.Lock()
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wake_fd, zmq.POLLIN)

    def wait(self, timeout_s: float) -> None:
        """Sleep until there may be a message, `wake` is called, or the time is up."""
        ready = dict(self._poller.poll(max(0, round(timeout_s * 1000))))
        if self._wake_fd in ready:
            os.eventfd_read(self._wake_fd)

    def receive(self) -> Message | None:
        """The next message that is already here, or None. Malformed ones are counted and skipped."""
        while True:
            try:
                frame = self._socket.recv(zmq.NOBLOCK, copy=True)
            except zmq.Again:
                return None
            try:
                return decode(frame)
            except ProtocolError:
                self.rejected += 1

    def wake(self) -> None:
        """End the current or next `wait`. Safe from any thread at any time; after `close` it does nothing."""
        with self._wake_lock:
            if not self._socket.closed:
                os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        with self._wake_lock:
            if not self._socket.closed:
                self._socket.close()
                os.close(self._wake_fd)


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


def _secure_server(socket: zmq.Socket[bytes], keys: ClusterKeys) -> None:
    socket.set(zmq.CURVE_SERVER, 1)
    socket.curve_publickey = keys.public.encode()
    socket.curve_secretkey = keys.secret.encode()
    socket.set_string(zmq.ZAP_DOMAIN, DOMAIN)
