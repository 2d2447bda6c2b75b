"""Where one process takes messages: a bound ZeroMQ PULL socket.

Messages between one sender and one mailbox keep their order. Not thread-safe: one thread reads, and `Mailbox.wake` alone may
be called from anywhere.
"""

from __future__ import annotations

import os
import threading

import zmq

from core.errors import LaunchError, ProtocolError
from core.messages import Message
from core.wire import MAX_MESSAGE_BYTES, decode
from mail.door import Door, secure_server

QUEUED_MESSAGES = 10_000


class Mailbox:
    """Receives messages at `endpoint`. `rejected` counts those that were malformed and dropped."""

    def __init__(self, door: Door, host: str = "127.0.0.1") -> None:
        self._socket = door.context.socket(zmq.PULL)
        secure_server(self._socket, door.keys)
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
