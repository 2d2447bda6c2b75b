"""Token ids on the wire and in hashes: little-endian int32, so that a prompt is one bounded byte string, not a list."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from core.errors import ProtocolError

TokenArray = npt.NDArray[np.int32]


def pack_tokens(tokens: Sequence[int] | TokenArray) -> bytes:
    return np.asarray(tokens, dtype="<i4").tobytes()


def unpack_tokens(data: bytes) -> list[int]:
    """Raises ProtocolError on a torn id or a negative one."""
    if len(data) % 4:
        raise ProtocolError(f"Got {len(data)} bytes of token ids but expected a multiple of 4")
    tokens: list[int] = np.frombuffer(data, dtype="<i4").tolist()
    if tokens and min(tokens) < 0:
        raise ProtocolError("Got a negative token id")
    return tokens


def within(tokens: Sequence[int], vocabulary: int) -> bool:
    """Whether all of at least one token are in `[0, vocabulary)`."""
    try:
        ids = np.asarray(tokens, dtype=np.int64)
    except OverflowError:
        return False
    return bool(ids.min() >= 0 and ids.max() < vocabulary)
