"""The outermost layer of the HTTP door, plain ASGI: a request id on every answer, the key on every route that needs it,
and a body that is never read beyond its bounds in size and time.

Only `/health` and `/version` are open when a key is set. Ids are made here; a client's string never becomes one.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from hashlib import blake2b

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.errors import PayloadTooLarge, ReadTimeout, Unauthorized
from gateway.errors import encode_error, headers_of
from gateway.inbox import ClientGone
from gateway.metrics import Metrics

OPEN_PATHS = frozenset({"/health", "/version"})


class Guard:
    """Wraps the application. `api_key` None lets everybody in.

    A request that came in with a key has its tenant's `salt` in its state: a BLAKE2b of that key under `salt_key` (at most
    64 bytes), empty when no key is needed. Prefix caches keep salts apart, and nobody can compute the key from one.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, metrics: Metrics, salt_key: bytes) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._metrics = metrics
        self._salt = b"" if api_key is None else tenant_salt(api_key.encode(), salt_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1003})
            return
        request_id = secrets.token_hex(12)
        scope.setdefault("state", {}).update(request_id=request_id, salt=self._salt)
        id_header = (b"x-request-id", request_id.encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), id_header]
            await send(message)

        if self._key is not None and scope["path"] not in OPEN_PATHS and not has_key(scope, self._key):
            self._metrics.refused(Unauthorized.code)
            await _refuse(send_with_id, Unauthorized("Missing or wrong API key: send `Authorization: Bearer <key>`"))
            return
        await self._app(scope, receive, send_with_id)


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


async def read_body(request: Request, limit_bytes: int, timeout_s: float) -> bytes:
    """The request's body, of at most `limit_bytes`.

    Raises:
        PayloadTooLarge: as soon as it is known, without reading the rest.
        ReadTimeout: it was not all there after `timeout_s`.
        ClientGone: the client hung up in the middle.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await _read_body(request, limit_bytes)
    except TimeoutError as error:
        raise ReadTimeout(f"the body did not arrive within {timeout_s:g} s") from error


async def _read_body(request: Request, limit_bytes: int) -> bytes:
    declared = request.headers.get("content-length")
    if declared is not None and declared.isdigit() and int(declared) > limit_bytes:
        raise PayloadTooLarge(f"the body has {declared} bytes, at most {limit_bytes} are allowed")
    parts: list[bytes] = []
    size = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        size += len(part)
        if size > limit_bytes:
            raise PayloadTooLarge(f"the body has more than {limit_bytes} bytes")
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


async def _refuse(send: Send, error: Unauthorized) -> None:
    body = encode_error(error)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in headers_of(error).items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
