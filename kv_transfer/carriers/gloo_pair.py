"""Two ranks of gloo for one connection: a group of its own, which nothing else in the process knows.

Made from gloo's own classes, beside `torch.distributed`'s default group and never through it. The addresses that two ranks need
of each other, for which a job would ask a TCPStore, travel over the connection that has just shaken hands, so that no further
port listens for them; what listens is one gloo socket on the configured host. It takes whoever comes first, so a pair is used
only once each side has proved over it that it is the other end of the connection.

What ends a blocked operation, tried with torch 2.13: the peer's end of the socket closing; its own time limit; and *another*
operation's limit running out, because gloo then breaks the whole group. `abort`, `shutdown` and dropping the group do not. So
`close` asks for a message that nobody sends and gives it a millisecond.

What gloo does not guard against: somebody who announces more bytes than were asked for ends this process (gloo aborts), be it the
peer or whoever came to the socket before it. Between processes that run this file it cannot come to that, because lengths come
from headers whose digests were checked.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
import threading
from contextlib import suppress
from datetime import timedelta
from typing import Any, Literal

import msgspec
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from core.errors import CorruptTransfer, ProtocolError, TransferError
from core.wire import unpack_bounded
from kv_transfer.transport import Connection

GLOO_TIMEOUT_S = 1.0  # gloo waits five times this for a peer to connect
PROOF_TIMEOUT_S = 5.0
MAX_RECORD_BYTES = 1024

_PAYLOAD_TAG = 0
_LENGTH = struct.Struct("<H")
_SIZE = struct.Struct("<Q")
_MAC_BYTES = 32

Rank = Literal[0, 1]
Group = Any  # dist.ProcessGroupGloo, whose stub lacks half its methods


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
        data = bytearray(length + _MAC_BYTES)
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


class Move:
    """Bytes on their way. To be waited for once, or dropped after the pair was closed."""

    def __init__(self, what: str, work: Any, data: memoryview) -> None:
        self._what = what
        self._work = work
        self._data = data  # gloo knows where it is, and does not keep it alive

    def wait(self, timeout_s: float) -> None:
        """Raises TransferError: the pair broke or was closed first, or it took too long, which breaks the pair."""
        work, self._work = self._work, None
        try:
            work.wait(timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise TransferError(f"gloo cannot {self._what}: {str(error)[:300]}") from None
        finally:
            work = None  # see GlooPair._begin


class GlooPair:
    """This process's end of a pair, made and proved. One thread at a time may send, and one receive; `close` may come from any.

    Blocks, for about 10 s at most, until the peer has come too.

    Args:
        connection: brings the addresses; nothing else may be on its way meanwhile. Closing it ends a wait for them.
        rank: 0 on the dialling side.
        host: where gloo listens, and from where its address is taken.

    Raises:
        TransferError: no pair came about.
    """

    def __init__(self, connection: Connection, key: bytes, rank: Rank, host: str) -> None:
        self._peer = 1 - rank
        self._lock = threading.Lock()
        self._store = Rendezvous(connection, key, rank)  # gloo does not keep its Python half alive
        self._group: Group | None = _group(self._store, rank, host)
        try:
            self._prove(key, rank)
        except TransferError:
            self.close()
            raise

    def send(self, data: memoryview) -> Move:
        """`data` leaves when the peer asks for it, and stays as it is until then. Raises TransferError if the pair is closed."""
        return self._begin("send", data)

    def recv_into(self, out: memoryview, timeout_s: float) -> None:
        """Fill `out` with the peer's next. Raises TransferError."""
        self._begin("receive", out).wait(timeout_s)

    def close(self) -> None:
        """Wakes who waits for a move, here and at the peer; their buffers are nobody's any more. Idempotent."""
        with self._lock:
            group, self._group = self._group, None
        if group is not None:
            with suppress(RuntimeError):
                never = torch.empty(1, dtype=torch.uint8)
                group.recv([never], self._peer, 1 + secrets.randbelow(1 << 30)).wait(timedelta(milliseconds=1))

    def _begin(self, what: Literal["send", "receive"], data: memoryview) -> Move:
        tensor = torch.frombuffer(data, dtype=torch.uint8)
        group = self._group
        try:
            if group is None:
                raise TransferError("the pair is closed")
            begin = group.send if what == "send" else group.recv
            return Move(what, begin([tensor], self._peer, _PAYLOAD_TAG), data)
        except RuntimeError as error:
            raise TransferError(f"gloo cannot {what}: {str(error)[:300]}") from None
        finally:
            # An error keeps its frames and they their variables: this one must not keep the group, its socket and thread.
            group = begin = None

    def _prove(self, key: bytes, rank: Rank) -> None:
        mine, theirs = mac(key, b"pair", rank), mac(key, b"pair", 1 - rank)
        got = bytearray(_MAC_BYTES)
        if rank == 0:
            self.send(memoryview(bytearray(mine))).wait(PROOF_TIMEOUT_S)
        self.recv_into(memoryview(got), PROOF_TIMEOUT_S)
        if not hmac.compare_digest(bytes(got), theirs):
            raise CorruptTransfer("somebody else has come to this pair")
        if rank == 1:
            self.send(memoryview(bytearray(mine))).wait(PROOF_TIMEOUT_S)


def mac(key: bytes, label: bytes, rank: int, body: bytes = b"") -> bytes:
    return hmac.digest(key, b"%b %d " % (label, rank) + body, hashlib.sha256)


def _group(store: Rendezvous, rank: Rank, host: str) -> Group:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # the stub names another class
    try:
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        options._threads = 1
        options._timeout = timedelta(seconds=GLOO_TIMEOUT_S)
        return dist.ProcessGroupGloo(store, rank, 2, options)
    except RuntimeError as error:
        raise TransferError(f"gloo's two ranks cannot meet: {str(error)[:300]}") from None
    finally:
        options = None  # see GlooPair._begin
