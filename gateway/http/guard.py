"""The outermost layer of the HTTP door, plain ASGI: a request id on every answer, and the key on every route that needs it.

Probes and `/version` are open when a key is set. Ids are made here; a client's string never becomes one. HEAD is GET without the
body.
"""

from __future__ import annotations

import hmac
import secrets
from hashlib import blake2b

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.errors import Unauthorized
from gateway.http.errors import encode_error, headers_of
from gateway.serving.metrics import Metrics


class Guard:
    """Wraps the application. `api_key` None lets everybody in; `open_paths` are let through without it.

    A request that came in with a key has its tenant's `salt` in its state: a BLAKE2b of that key under `salt_key` (at most
    64 bytes), empty when no key is needed. Prefix caches keep salts apart, and nobody can compute the key from one.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, metrics: Metrics, salt_key: bytes, open_paths: frozenset[str]) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._metrics = metrics
        self._open_paths = open_paths
        self._salt = b"" if api_key is None else tenant_salt(api_key.encode(), salt_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1003})
            return
        request_id = secrets.token_hex(12)
        scope.setdefault("state", {}).update(request_id=request_id, salt=self._salt)
        id_header = (b"x-request-id", request_id.encode())

        head = scope["method"] == "HEAD"

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), id_header]
            elif head:
                message = {**message, "body": b""}
            await send(message)

        if self._key is not None and scope["path"] not in self._open_paths and not has_key(scope, self._key):
            self._metrics.refused(Unauthorized.code)
            await _refuse(send_with_id, Unauthorized("Missing or wrong API key: send `Authorization: Bearer <key>`"))
            return
        await self._app({**scope, "method": "GET"} if head else scope, receive, send_with_id)


def tenant_salt(api_key: bytes, salt_key: bytes) -> bytes:
    """16 bytes that stand for whoever holds `api_key`, the same on every gateway with the same `salt_key`."""
    return blake2b(api_key, key=salt_key, digest_size=16, person=b"hetserve-tenant").digest()


def has_key(scope: Scope, key: bytes) -> bool:
    """Whether the request carries the bearer key, compared in constant time."""
    for name, value in scope["headers"]:
        if name == b"authorization":
            kind, _, given = bytes(value).partition(b" ")
            return kind.lower() == b"bearer" and hmac.compare_digest(given.strip(), key)
    return False


async def _refuse(send: Send, error: Unauthorized) -> None:
    body = encode_error(error)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in headers_of(error).items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
