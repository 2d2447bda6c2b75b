"""The same memory, proved; anything else refused before it is touched."""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.carrier import CarrierUnavailable
from kv_transfer.carriers.sealed_memory import HEAD_BYTES, NAME, TOKEN_BYTES, OwnMemory, PeerMemory

ROOT = Path(__file__).parents[3]
SIZE = 3 * mmap.PAGESIZE
TOKEN = bytes(range(TOKEN_BYTES))
SHRINK, GROW = fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW


def address(descriptor: int, token: bytes = TOKEN, pid: int | None = None) -> bytes:
    return msgspec.msgpack.encode((os.getpid() if pid is None else pid, descriptor, token))


@contextmanager
def file(name: str = NAME, size: int = HEAD_BYTES + SIZE, seals: int = SHRINK | GROW) -> Iterator[int]:
    """A memory as a sender might make it that is not quite honest."""
    descriptor = os.memfd_create(name, os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    os.pwrite(descriptor, TOKEN, 0)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    yield descriptor
    os.close(descriptor)


def mapped() -> int:
    return Path("/proc/self/maps").read_text().count(f"/memfd:{NAME}")


def test_both_sides_see_the_same_bytes_and_each_knows_that_the_other_does() -> None:
    mine = OwnMemory(SIZE)
    theirs = PeerMemory(mine.address, SIZE)
    assert mine.proved_by(theirs.answer)
    assert mine.key == theirs.key
    mine.view[SIZE - 1] = 77
    assert theirs.view[SIZE - 1] == 77
    assert (mine.view.nbytes, theirs.view.nbytes) == (SIZE, SIZE)
    mine.close_file()


def test_who_has_not_seen_the_memory_cannot_answer() -> None:
    mine, other = OwnMemory(SIZE), OwnMemory(SIZE)
    for answer in (b"", bytes(TOKEN_BYTES), bytes(mine._map[:TOKEN_BYTES]), PeerMemory(other.address, SIZE).answer):
        assert not mine.proved_by(answer)
    assert mine.key != other.key
    mine.close_file()
    other.close_file()


def test_the_listening_side_cannot_write() -> None:
    mine = OwnMemory(SIZE)
    with pytest.raises(TypeError, match="read-only"):
        PeerMemory(mine.address, SIZE).view[0] = 1
    mine.close_file()


def test_nobody_can_cut_it_short_under_a_reader() -> None:
    mine = OwnMemory(SIZE)
    theirs = PeerMemory(mine.address, SIZE)
    assert mine._descriptor is not None
    for size in (0, HEAD_BYTES, HEAD_BYTES + 2 * SIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(mine._descriptor, size)
    with pytest.raises(PermissionError):  # and no seal can be lifted or added
        fcntl.fcntl(mine._descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert bytes(theirs.view[-8:]) == bytes(8)
    mine.close_file()


@pytest.mark.parametrize("seals", [0, GROW, fcntl.F_SEAL_WRITE])
def test_a_memory_that_its_owner_could_cut_short_is_refused(seals: int) -> None:
    with file(seals=seals) as descriptor, pytest.raises(CarrierUnavailable, match="not sealed"):
        PeerMemory(address(descriptor), SIZE)


@pytest.mark.parametrize("size", [TOKEN_BYTES, HEAD_BYTES, HEAD_BYTES + SIZE - 1, HEAD_BYTES + SIZE + 1, 1 << 40])
def test_a_memory_of_another_size_is_refused_before_it_is_mapped(size: int) -> None:
    with file(size=size) as descriptor, pytest.raises(CarrierUnavailable, match=f"Got a memory of {size} bytes"):
        PeerMemory(address(descriptor), SIZE)


def test_a_memory_without_the_token_is_another_one() -> None:
    """A process of the same number on another host, or in another container."""
    with file() as descriptor:
        PeerMemory(address(descriptor), SIZE)
        with pytest.raises(CarrierUnavailable, match="not on this host"):
            PeerMemory(address(descriptor, token=TOKEN[::-1]), SIZE)


def test_nothing_but_such_a_memory_is_ever_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a pipe would wait, opening a device may do anything."""
    reader, writer = os.pipe()
    plain = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    null = os.open("/dev/null", os.O_RDWR)
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("opened"))
    with file("another") as other:
        for descriptor in (reader, writer, plain, null, other):
            with pytest.raises(CarrierUnavailable, match="not on this host"):
                PeerMemory(address(descriptor), SIZE)
    for descriptor in (reader, writer, plain, null):
        os.close(descriptor)


def test_a_process_or_descriptor_that_is_not_there_is_named() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for wrong in (address(3, pid=gone.pid), address(1 << 20)):
        with pytest.raises(CarrierUnavailable, match="No such file"):
            PeerMemory(wrong, SIZE)


@given(st.binary(max_size=80) | st.tuples(st.integers(), st.integers(), st.binary()).map(lambda t: repr(t).encode()))
def test_garbage_for_an_address_is_refused(garbage: bytes) -> None:
    with pytest.raises(CarrierUnavailable):
        PeerMemory(garbage, SIZE)


@pytest.mark.parametrize(
    "wrong", [(0, 3, TOKEN), (1, -1, TOKEN), (1, 3, b""), (1, 3, TOKEN + b"x"), ("1", 3, TOKEN), (1, "../3", TOKEN)]
)
def test_an_address_is_numbers_and_a_token(wrong: tuple[object, ...]) -> None:
    with pytest.raises(CarrierUnavailable, match="names no memory"):
        PeerMemory(msgspec.msgpack.encode(wrong), SIZE)


def test_touching_puts_every_page_in_place_and_leaves_the_bytes_alone() -> None:
    mine = OwnMemory(SIZE)
    mine.view[: mmap.PAGESIZE] = bytes(range(256)) * (mmap.PAGESIZE // 256)
    mine.touch()
    assert mine._descriptor is not None
    assert os.fstat(mine._descriptor).st_blocks * 512 == HEAD_BYTES + SIZE
    mine.view[mmap.PAGESIZE :] = bytes(range(256)) * (SIZE // 256 - mmap.PAGESIZE // 256)
    mine.touch()
    assert bytes(mine.view) == bytes(range(256)) * (SIZE // 256)
    mine.close_file()


def test_it_is_gone_with_the_last_view_of_it() -> None:
    process = psutil.Process()
    gc.collect()
    fds, maps = process.num_fds(), mapped()
    mine = OwnMemory(SIZE)
    theirs = PeerMemory(mine.address, SIZE)
    mine.close_file()
    mine.close_file()
    view = theirs.view[5:9]
    assert mapped() == maps + 2
    del mine, theirs
    assert mapped() == maps + 1
    assert bytes(view) == bytes(4)
    del view
    assert (process.num_fds(), mapped()) == (fds, maps)


OTHER_USER = """
import os, sys
from kv_transfer.carrier import CarrierUnavailable
from kv_transfer.carriers.sealed_memory import PeerMemory
os.setresuid(65534, 65534, 65534)
try:
    PeerMemory(bytes.fromhex(sys.argv[1]), int(sys.argv[2]))
except CarrierUnavailable as error:
    print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_another_user_does_not_see_it() -> None:
    mine = OwnMemory(SIZE)
    child = subprocess.run(
        [sys.executable, "-c", OTHER_USER, mine.address.hex(), str(SIZE)], cwd=ROOT, text=True, capture_output=True, timeout=60
    )
    assert child.stdout == "the sender's memory is not within reach: Permission denied\n", child.stderr
    mine.close_file()


SENDER = """
from kv_transfer.carriers.sealed_memory import OwnMemory
import sys
mine = OwnMemory(int(sys.argv[1]))
print(mine.address.hex(), flush=True)
print(sys.stdin.readline())
"""


def test_a_process_in_another_pid_namespace_is_not_mistaken_for_one_of_this() -> None:
    """Its number means another process here, or none: what is found is not its memory."""
    command = ["unshare", "--pid", "--fork", sys.executable, "-c", SENDER, str(SIZE)]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        line = child.stdout.readline()
        if not line:
            pytest.skip("this user may not make pid namespaces")
        with pytest.raises(CarrierUnavailable, match=r"not (on this host|within reach)"):
            PeerMemory(bytes.fromhex(line), SIZE)
        child.communicate("\n", timeout=60)
