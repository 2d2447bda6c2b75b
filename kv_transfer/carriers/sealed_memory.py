"""Memory that two processes on one host map, and how each is sure of that.

    dialling side                                            listening side
    OwnMemory      a memfd, sized, sealed, two tokens in it
                   ── pid, descriptor, first token ──▶       PeerMemory   opens it through /proc, checks seals, size, first token
    proved_by      ◀── second token ─────────────────        answer       read out of the memory

Nothing is believed: a token that was found in the memory is proof that it is the same memory, whatever hosts, containers or
process numbers say. A memfd has no name in any file system: when the last mapping goes, by whatever death, so does it. Its
size is sealed, so that no peer can cut it short under a reader (SIGBUS). The listening side maps it for reading only.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import stat
from typing import Annotated

import msgspec
import numpy as np

from core.errors import ProtocolError, TransferError
from core.wire import unpack_bounded
from kv_transfer.carrier import CarrierUnavailable

NAME = "hetserve-kv"
TOKEN_BYTES = 16
HEAD_BYTES = mmap.PAGESIZE  # two tokens and the key; the slots behind it start on a page
_LINK = f"/memfd:{NAME} (deleted)"
_KEY = slice(2 * TOKEN_BYTES, 2 * TOKEN_BYTES + 8)
_MAX_ADDRESS_BYTES = 64


class _Address(msgspec.Struct, frozen=True, array_like=True):
    """Where to look for the memory, and what must be found in it."""

    pid: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
    descriptor: Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
    token: Annotated[bytes, msgspec.Meta(min_length=TOKEN_BYTES, max_length=TOKEN_BYTES)]


class OwnMemory:
    """`size` bytes behind the head, writable here. Raises CarrierUnavailable where there are no such memories."""

    def __init__(self, size: int) -> None:
        if not hasattr(os, "memfd_create"):
            raise CarrierUnavailable("this system has no sealed memory (memfd_create)")
        try:
            self._descriptor: int | None = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise CarrierUnavailable(f"cannot create memory: {error}") from error
        try:
            os.ftruncate(self._descriptor, HEAD_BYTES + size)
            fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._map = memoryview(mmap.mmap(self._descriptor, HEAD_BYTES + size))
        except (OSError, ValueError) as error:
            self.close_file()
            raise CarrierUnavailable(f"cannot map {HEAD_BYTES + size} bytes: {error}") from error
        head = secrets.token_bytes(_KEY.stop)
        self._map[: len(head)] = head

    @property
    def address(self) -> bytes:
        """For `PeerMemory`, while the file is open."""
        assert self._descriptor is not None
        address = _Address(os.getpid(), self._descriptor, bytes(self._map[:TOKEN_BYTES]))
        return msgspec.msgpack.encode(address)

    @property
    def key(self) -> int:
        """Known to those who see the memory."""
        return int.from_bytes(self._map[_KEY], "little")

    @property
    def view(self) -> memoryview:
        return self._map[HEAD_BYTES:]

    def proved_by(self, answer: bytes) -> bool:
        return answer == self._map[TOKEN_BYTES : 2 * TOKEN_BYTES]

    def touch(self) -> None:
        """Have every page in place, so that nobody waits for one later. Leaves the bytes as they are and holds the GIL for
        little of it. Raises TransferError if there is no memory."""
        assert self._descriptor is not None
        try:
            os.posix_fallocate(self._descriptor, 0, self._map.nbytes)
        except OSError as error:
            raise TransferError(f"no memory to share: {error}") from error
        np.frombuffer(self._map, dtype=np.uint8)[:: mmap.PAGESIZE].max()  # the kernel maps pages that are there by the dozen

    def close_file(self) -> None:
        """Nobody maps it by its address any more. What is mapped stays, until the last view of it is gone. Idempotent."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


class PeerMemory:
    """What `address` names, `size` bytes behind the head, read-only here; `address` may be anything. Raises CarrierUnavailable
    unless it is the memory of a process on this host that this one may look into."""

    def __init__(self, address: bytes, size: int) -> None:
        where = _parsed(address)
        path = f"/proc/{where.pid}/fd/{where.descriptor}"
        try:
            if os.readlink(path) != _LINK:  # look before opening: opening a device or a pipe can do harm
                raise CarrierUnavailable("the sender's memory is not on this host")
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as error:
            raise CarrierUnavailable(f"the sender's memory is not within reach: {error.strerror}") from error
        try:
            self._map = _mapped(descriptor, HEAD_BYTES + size)
        finally:
            os.close(descriptor)
        if self._map[:TOKEN_BYTES] != where.token:
            raise CarrierUnavailable("the sender's memory is not on this host")

    @property
    def answer(self) -> bytes:
        """For `OwnMemory.proved_by`."""
        return bytes(self._map[TOKEN_BYTES : 2 * TOKEN_BYTES])

    @property
    def key(self) -> int:
        return int.from_bytes(self._map[_KEY], "little")

    @property
    def view(self) -> memoryview:
        return self._map[HEAD_BYTES:]


def _parsed(address: bytes) -> _Address:
    try:
        return msgspec.convert(unpack_bounded(address, _MAX_ADDRESS_BYTES, max_container=4), _Address, strict=True)
    except (ProtocolError, msgspec.ValidationError) as error:
        raise CarrierUnavailable(f"the sender names no memory: {error}") from error


def _mapped(descriptor: int, size: int) -> memoryview:
    """Raises CarrierUnavailable unless it is plain memory of exactly this size, for good."""
    try:
        sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:
        sealed = 0
    if not sealed & fcntl.F_SEAL_SHRINK:  # first: only then does the size that is found stay
        raise CarrierUnavailable("the sender's memory is not sealed")
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_size != size:
        raise CarrierUnavailable(f"Got a memory of {found.st_size} bytes but expected {size}")
    try:
        return memoryview(mmap.mmap(descriptor, size, prot=mmap.PROT_READ))
    except (OSError, ValueError) as error:
        raise CarrierUnavailable(f"cannot map {size} bytes: {error}") from error
