"""Messages as bytes: msgpack, bounded before anything is allocated, then checked against the structs.

Two libraries share the work because each does half: `msgpack` can refuse a message whose arrays, maps or strings are too
large while it parses; `msgspec` then checks types, required fields and value ranges, and builds the structs.
Nothing is ever unpickled.
"""

from __future__ import annotations

from typing import Any

import msgpack
import msgspec

from core.errors import ProtocolError
from core.messages import Message

PROTOCOL_VERSION = 2
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
MAX_CONTAINER = 4096


def encode(message: Message) -> bytes:
    """`[PROTOCOL_VERSION, message]` as msgpack."""
    packed: bytes = msgspec.msgpack.encode((PROTOCOL_VERSION, message))
    return packed


def decode(data: bytes | memoryview) -> Message:
    """Raises ProtocolError on anything that `encode` of this version does not produce."""
    try:
        raw = unpack_bounded(data, max_bytes=MAX_MESSAGE_BYTES)
        if not isinstance(raw, list) or len(raw) != 2:
            raise ProtocolError("Got a message that is not [version, body]")
        if raw[0] != PROTOCOL_VERSION:
            raise ProtocolError(f"Got protocol version {raw[0]!r} but this process speaks {PROTOCOL_VERSION}")
        message: Message = msgspec.convert(raw[1], Message, strict=True)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"Got a malformed message: {error}") from error
    return message


def unpack_bounded(data: bytes | memoryview, max_bytes: int, max_container: int = MAX_CONTAINER) -> Any:
    """Unpack msgpack with every size bounded. Raises ProtocolError on malformed or oversize input."""
    if len(data) > max_bytes:
        raise ProtocolError(f"Got {len(data)} bytes but expected at most {max_bytes}")
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=False,
            max_array_len=max_container,
            max_map_len=max_container,
            max_ext_len=0,
        )
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        raise ProtocolError(f"Got malformed msgpack: {error}") from error
