"""How gloo's two ranks find each other: over the connection that has just shaken hands, so that no store listens for them."""

from __future__ import annotations

import hashlib
import hmac
import struct
from datetime import timedelta
from typing import Literal

import msgspec
from torch.distributed.distributed_c10d import Store

from core.errors import CorruptTransfer, ProtocolError, TransferError
from core.wire import unpack_bounded
from kv_transfer.transport import Connection

MAX_RECORD_BYTES = 1024

_LENGTH = struct.Struct("<H")
_SIZE = struct.Struct("<Q")
MAC_BYTES = 32

Rank = Literal[0, 1]


class Rendezvous(Store):
    """The store through which gloo's ranks find each other, for one pair: a record from each to the other, over `connection`.

    gloo reads a record without checking it, so what the peer sent is laid into a copy of this side's own: all that can be wrong
    then is the address.

    Args:
        key: known to the two ends alone; every record carries a MAC by it.
    """

    def __init__(self, connection: Connection, key: bytes, rank: Rank) -> None:
        super().__init__()
        self._connection = connection
        self._key = key
        self._rank = rank
        self._records: dict[str, bytes] = {}
        self._own = b""

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]  # gloo hands bytes over
        """Raises TransferError if the connection is gone, or if gloo's record is not as this file knows it."""
        self._records[key] = self._own = value
        _, address = _split(value)
        body = msgspec.msgpack.encode((key, address))
        self._connection.send([_LENGTH.pack(len(body)), body, mac(self._key, b"record", self._rank, body)])

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Raises TransferError: the connection ended first, or brought something else."""
        for key in keys:
            if key not in self._records:
                self._records[key] = self._heard(key)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._records[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self._records for key in keys)

    def _heard(self, key: str) -> bytes:
        prefix = bytearray(_LENGTH.size)
        self._connection.recv_into(memoryview(prefix))
        (length,) = _LENGTH.unpack(prefix)
        if length > MAX_RECORD_BYTES:
            raise CorruptTransfer(f"Got a rendezvous record of {length} bytes but expected at most {MAX_RECORD_BYTES}")
        data = bytearray(length + MAC_BYTES)
        self._connection.recv_into(memoryview(data))
        body = bytes(data[:length])
        if not hmac.compare_digest(bytes(data[length:]), mac(self._key, b"record", 1 - self._rank, body)):
            raise CorruptTransfer("a rendezvous record's MAC is wrong")
        try:
            name, address = msgspec.convert(
                unpack_bounded(body, MAX_RECORD_BYTES, max_container=2), tuple[str, bytes], strict=True
            )
        except (ProtocolError, msgspec.ValidationError) as error:
            raise CorruptTransfer(f"Got a malformed rendezvous record: {error}") from error
        host, mine = _split(self._own)
        if name != key or len(address) != len(mine) or address[: _SIZE.size] != mine[: _SIZE.size]:
            raise CorruptTransfer(f"Got a rendezvous record that is not like this side's own: {name[:40]!r}")
        return host + address


def _split(record: bytes) -> tuple[bytes, bytes]:
    """gloo's record: the host's name behind its length; an address behind its length, and 8 bytes for each rank. Raises
    TransferError on anything else."""
    if len(record) >= _SIZE.size:
        at = _SIZE.size + _SIZE.unpack_from(record)[0]
        if at + _SIZE.size <= len(record):
            end = at + _SIZE.size + _SIZE.unpack_from(record, at)[0]
            if end <= len(record) and (len(record) - end) % 8 == 0:
                return record[:at], record[at:]
    raise TransferError("this torch's gloo has its ranks meet in a way that is not known here")


def mac(key: bytes, label: bytes, rank: int, body: bytes = b"") -> bytes:
    return hmac.digest(key, b"%b %d " % (label, rank) + body, hashlib.sha256)
