"""A request's body, never read beyond its bounds in size and time."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from core.errors import PayloadTooLarge, ReadTimeout
from gateway.serving.inbox import ClientGone


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
