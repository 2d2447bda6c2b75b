"""Two real processes over shared memory, and what kill -9 of either or both leaves behind: nothing."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from core.clock import MonotonicClock
from core.errors import TransferError
from kv_transfer.carriers import carriers_for
from kv_transfer.carriers.sealed_memory import NAME
from kv_transfer.events import Broken, Delivered, Received, SendFailed
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from kv_transfer.terms import Terms
from kv_transfer.transports.tcp import TcpTransport
from tests.kv_transfer.carriers.pieces import BLOCKS, LEASE_S, TOKENS, large_layout
from tests.kv_transfer.rig import SECRET, Inbox, filled, poisoned

ROOT = Path(__file__).parents[3]
PHASES = ["handshake", "under way", "done"]


@contextmanager
def child(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.kv_transfer.carriers.child", *arguments]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait(60)


def memories(pid: int | str = "self") -> set[str]:
    """The inodes of the memories that a process maps."""
    return {row.split()[4] for row in Path(f"/proc/{pid}/maps").read_text().splitlines() if f"/memfd:{NAME}" in row}


def holders(inodes: set[str]) -> list[str]:
    """The processes of this machine that still map any of them."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and memories(entry) & inodes:
                found.append(entry)
        except OSError:
            continue  # gone, or not ours
    return found


def named() -> set[str]:
    return set(os.listdir("/dev/shm"))


class Here:
    """This process's ends, with another pair over the same ends that must not notice: it sends to itself."""

    def __init__(self) -> None:
        self.source, self.target = filled(large_layout(), len(BLOCKS)), poisoned(large_layout(), len(BLOCKS))
        self.sent: defaultdict[str, Inbox] = defaultdict(Inbox)
        self.received: defaultdict[str, Inbox] = defaultdict(Inbox)
        self._turns = 0

    def __enter__(self) -> Here:
        common, clock, carriers = (TcpTransport(), SECRET, "model"), MonotonicClock(), carriers_for("shm")
        received, sent = (lambda event: self.received[event.attempt](event)), (lambda event: self.sent[event.attempt](event))
        self.receiver = KVReceiver(self.target, *common, 1, clock, received, carriers)
        self.sender = KVSender(self.source, *common, 2, clock, sent, carriers)
        return self

    def __exit__(self, *error: object) -> None:
        self.sender.close()
        self.receiver.stop()

    def works(self) -> None:
        """The pair that nobody kills moves a sequence."""
        self._turns += 1
        attempt = f"mine {self._turns}"
        self.receiver.open(Terms(100 + self._turns, attempt, 0, TOKENS, LEASE_S), [BLOCKS])
        session = self.sender.begin(Terms(100 + self._turns, attempt, 0, TOKENS, LEASE_S), [self.receiver.endpoint], [BLOCKS])
        session.push(0, 0, TOKENS)
        session.finish(b"")
        self.received[attempt].expect(Received)
        self.sent[attempt].expect(Delivered)
        for got, expected in zip(self.target.pages[0], self.source.pages[0], strict=True):
            assert (got == expected).all()


@pytest.fixture
def nothing_left() -> Iterator[None]:
    files, maps, threads = named(), memories(), set(threading.enumerate())
    yield
    gc.collect()
    assert named() == files
    assert memories() <= maps
    assert set(threading.enumerate()) <= threads


@pytest.mark.usefixtures("nothing_left")
def test_kv_crosses_between_two_processes() -> None:
    target, inbox = poisoned(large_layout(), len(BLOCKS)), Inbox()
    with KVReceiver(target, TcpTransport(), SECRET, "model", 1, MonotonicClock(), inbox, carriers_for("shm")) as receiver:
        receiver.open(Terms(9, "killed", 0, TOKENS, LEASE_S), [BLOCKS])
        with child("send", receiver.endpoint, "done") as sender:
            inbox.expect(Received, timeout_s=60)
            assert line(sender) == "done"
            assert len(memories() & memories(sender.pid)) == 1
    for got, expected in zip(target.pages[0], filled(large_layout(), len(BLOCKS)).pages[0], strict=True):
        assert (got == expected).all()


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_sender_leaves_nothing_and_breaks_only_its_own_session(phase: str) -> None:
    with Here() as here:
        here.works()
        here.receiver.open(Terms(9, "killed", 0, TOKENS, 2.0 if phase == "handshake" else LEASE_S), [BLOCKS])
        with child("send", here.receiver.endpoint, phase) as sender:
            assert line(sender) == phase
            inodes = memories(sender.pid)
            assert len(inodes) == 1
            here.works()
            kill(sender)
            if phase == "done":
                here.received["killed"].expect(Received)
            else:
                (broken,) = here.received["killed"].expect(Broken, timeout_s=60)
                assert isinstance(broken.error, TransferError)
            here.works()
            assert len(here.received["killed"].events) == 1
        assert here.receiver.open_grants == 0
    assert holders(inodes) == []


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_receiver_leaves_nothing_and_fails_only_its_own_session(phase: str) -> None:
    with Here() as here, child("receive", phase) as receiver:
        here.works()
        session = here.sender.begin(Terms(9, "killed", 0, TOKENS, LEASE_S), [line(receiver)], [BLOCKS])
        session.push(0, 0, TOKENS)
        session.finish(b"")
        assert line(receiver) == phase
        inodes = memories(receiver.pid)
        assert len(inodes) == 1
        kill(receiver)
        if phase == "done":
            here.sent["killed"].expect(Delivered)
        else:
            (failed,) = here.sent["killed"].expect(SendFailed, timeout_s=60)
            assert isinstance(failed.error, TransferError)
        here.works()
        assert len(here.sent["killed"].events) == 1
    assert holders(inodes) == []


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("first", ["sender", "receiver"])
def test_nothing_is_left_of_two_killed_processes(phase: str, first: str) -> None:
    with child("receive", "done" if phase == "handshake" else phase) as receiver, child("send", line(receiver), phase) as sender:
        assert line(sender if phase == "handshake" else receiver) == phase
        inodes = memories(receiver.pid) | memories(sender.pid)
        assert len(inodes) == 1
        for process in (sender, receiver) if first == "sender" else (receiver, sender):
            kill(process)
        assert holders(inodes) == []
