"""A scripted HTTP/1.1 server on a real socket: each connection's request is handed to the test's script."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Exchange:
    """One request, and the means to answer it byte by byte."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    sock: socket.socket
    hung_up: threading.Event = field(default_factory=threading.Event)

    def json(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(self.body)
        return data

    def answer(self, status: int = 200, body: Any = None, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = {"content-type": "application/json", "content-length": str(len(content)), "connection": "close"}
        lines.update({name.replace("_", "-"): value for name, value in headers.items()})
        self.head(status, lines)
        self.sock.sendall(content)

    def head(self, status: int, headers: dict[str, str]) -> None:
        text = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.sock.sendall(f"HTTP/1.1 {status} X\r\n{text}\r\n".encode())

    def begin_stream(self) -> None:
        self.head(200, {"content-type": "text/event-stream", "connection": "close", "x-request-id": "req-1"})

    def event(self, data: dict[str, Any] | str) -> None:
        text = data if isinstance(data, str) else json.dumps(data)
        self.sock.sendall(f"data: {text}\n\n".encode())

    def wait_hang_up(self, timeout_s: float = 10.0) -> bool:
        """Whether the client closed the connection within `timeout_s`."""
        self.sock.settimeout(timeout_s)
        try:
            return self.sock.recv(1) == b""
        except ConnectionError:
            return True
        except TimeoutError:
            return False

    def reset(self) -> None:
        """Close so that the peer sees a reset rather than an end."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")


class FakeServer:
    """Answers every request with `script(exchange)`, each on its own thread; `seen` counts them."""

    def __init__(self, script: Callable[[Exchange], None]) -> None:
        self._script = script
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads: list[threading.Thread] = []
        self.seen: list[Exchange] = []
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join(5)
        for thread in self._threads:
            thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with sock:
            exchange = _read(sock)
            if exchange is None:
                return
            self.seen.append(exchange)
            try:
                self._script(exchange)
            except ConnectionError:
                exchange.hung_up.set()


@contextmanager
def serving(script: Callable[[Exchange], None]) -> Iterator[FakeServer]:
    server = FakeServer(script)
    try:
        yield server
    finally:
        server.close()


def _read(sock: socket.socket) -> Exchange | None:
    data = b""
    while b"\r\n\r\n" not in data:
        more = sock.recv(65536)
        if not more:
            return None
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    while len(body) < int(headers.get("content-length", 0)):
        body += sock.recv(65536)
    method, path, _ = first.split(" ")
    return Exchange(method, path, headers, body, sock)


def completion_chunk(text: str, finish: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
    return {"id": "cmpl-1", "object": "text_completion", "created": 7, "model": "m", "choices": [choice], **more}


def usage_chunk(prompt_tokens: int, completion_tokens: int, **more: Any) -> dict[str, Any]:
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    return {"id": "cmpl-1", "created": 7, "model": "m", "choices": [], "usage": usage, **more}
