"""Two real processes over gloo, one of which is killed or stopped at each stage: the other loses that one session, with a typed
error, and neither its other pairs nor its threads."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest

from core.clock import MonotonicClock
from core.errors import LeaseExpired, TransferError
from kv_transfer.carriers import carriers_for, distributed
from kv_transfer.events import Broken, Delivered, Received, SendFailed
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from kv_transfer.terms import Terms
from kv_transfer.transports.tcp import TcpTransport
from tests.kv_transfer.carriers.gloo_child import BLOCKS, HOST, LAYOUT, TOKENS
from tests.kv_transfer.rig import SECRET, Inbox, filled, poisoned

ROOT = Path(__file__).parents[3]
PHASES = ["pair", "payload", "store", "done"]
STOPPED_LEASE_S = 2.0
CHILDS = "child's"


@contextmanager
def child(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.kv_transfer.carriers.gloo_child", *arguments]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def strike(process: subprocess.Popen[str], how: signal.Signals) -> None:
    process.send_signal(how)
    if how is signal.SIGSTOP:
        while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
            threading.Event().wait(0.01)
    else:
        process.wait(60)


@contextmanager
def renewed(receiver: KVReceiver, grant: int) -> Iterator[None]:
    """However long the child takes to come."""
    over = threading.Event()

    def renew() -> None:
        while not over.wait(STOPPED_LEASE_S / 10):
            receiver.renew(grant)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class Here:
    """This process's ends, and a second pair over the same ends, that must not notice: it sends to itself."""

    def __init__(self) -> None:
        self.source, self.target = filled(LAYOUT, len(BLOCKS)), poisoned(LAYOUT, len(BLOCKS))
        self.sent: defaultdict[str, Inbox] = defaultdict(Inbox)
        self.received: defaultdict[str, Inbox] = defaultdict(Inbox)
        wires, clock, carriers = TcpTransport(), MonotonicClock(), carriers_for("distributed", HOST)
        hear, learn = (lambda event: self.received[event.attempt](event)), (lambda event: self.sent[event.attempt](event))
        self.receiver = KVReceiver(self.target, wires, SECRET, "model", 1, clock, hear, carriers)
        self.sender = KVSender(self.source, wires, SECRET, "model", 2, clock, learn, carriers)
        self._transfers = 0

    def send(self, endpoint: str, lease_s: float) -> None:
        session = self.sender.begin(Terms(9, CHILDS, 0, TOKENS, lease_s), [endpoint], [BLOCKS])
        session.push(0, 0, TOKENS)
        session.finish(b"")

    def another_pair_works(self) -> None:
        self._transfers += 1
        grant, count = 100 + self._transfers, 512
        self.receiver.open(Terms(grant, "own", 0, count, 60.0), [[1, 2]])
        session = self.sender.begin(Terms(grant, "own", 0, count, 60.0), [self.receiver.endpoint], [[3, 4]])
        session.push(0, 0, count)
        session.finish(b"")
        self.received["own"].expect(Received, self._transfers)
        for got, sent in zip(self.target.pages[0], self.source.pages[0], strict=True):
            assert np.array_equal(got[[1, 2]], sent[[3, 4]])

    def close(self) -> None:
        """Joins every thread: none may be stuck with the dead."""
        self.sender.close()
        self.receiver.stop()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Here]:
    monkeypatch.setattr(distributed, "PAYLOAD_TIMEOUT_S", 3600.0)  # nothing here may owe its end to it
    with_ends = Here()
    with_ends.another_pair_works()
    with_ends.close()
    process = psutil.Process()
    gc.collect()
    fds, threads = process.num_fds(), process.num_threads()
    ends = Here()
    yield ends
    ends.close()
    del ends
    while process.num_fds() > fds or process.num_threads() > threads:
        gc.collect()
        threading.Event().wait(0.01)


def test_kv_crosses_between_two_processes(here: Here) -> None:
    with child("receive", "done") as process:
        here.send(line(process), 60.0)
        (delivered,) = here.sent[CHILDS].expect(Delivered, timeout_s=60)
        assert delivered.kv_bytes == TOKENS * LAYOUT.bytes_per_token
        assert line(process) == "done"
    here.receiver.open(Terms(9, CHILDS, 0, TOKENS, 60.0), [BLOCKS])
    with child("send", here.receiver.endpoint, "done") as process:
        here.received[CHILDS].expect(Received, timeout_s=60)
        assert line(process) == "done"
    for got, sent in zip(here.target.pages[0], here.source.pages[0], strict=True):
        assert np.array_equal(got, sent)


@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_receiver_fails_the_session_at_once(here: Here, phase: str) -> None:
    with child("receive", phase) as process:
        here.send(line(process), 3600.0)
        assert line(process) == phase
        here.another_pair_works()
        strike(process, signal.SIGKILL)
        if phase == "done":
            here.sent[CHILDS].expect(Delivered)
        else:
            (failed,) = here.sent[CHILDS].expect(SendFailed)
            assert type(failed.error) is TransferError
        here.another_pair_works()


@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_sender_breaks_the_grant_at_once(here: Here, phase: str) -> None:
    here.receiver.open(Terms(9, CHILDS, 0, TOKENS, 3600.0), [BLOCKS])
    with child("send", here.receiver.endpoint, phase) as process:
        assert line(process) == phase
        here.another_pair_works()
        strike(process, signal.SIGKILL)
        if phase in ("payload", "store"):
            (broken,) = here.received[CHILDS].expect(Broken)
            assert type(broken.error) is TransferError
        elif phase == "pair":
            assert here.receiver.close(9, "it never began")
        here.another_pair_works()


@pytest.mark.parametrize("phase", PHASES)
def test_a_stopped_receiver_costs_the_session_its_lease(here: Here, phase: str) -> None:
    with child("receive", phase) as process:
        here.send(line(process), STOPPED_LEASE_S)
        assert line(process) == phase
        strike(process, signal.SIGSTOP)
        here.another_pair_works()
        if phase == "done":
            here.sent[CHILDS].expect(Delivered)
        else:
            (failed,) = here.sent[CHILDS].expect(SendFailed)
            assert isinstance(failed.error, LeaseExpired)
        here.another_pair_works()
        here.close()  # while it is stopped


@pytest.mark.parametrize("phase", PHASES)
def test_a_stopped_sender_costs_the_grant_its_lease(here: Here, phase: str) -> None:
    here.receiver.open(Terms(9, CHILDS, 0, TOKENS, STOPPED_LEASE_S), [BLOCKS])
    with child("send", here.receiver.endpoint, phase) as process:
        with renewed(here.receiver, 9):
            assert line(process) == phase
        strike(process, signal.SIGSTOP)
        here.another_pair_works()
        if phase == "done":
            here.received[CHILDS].expect(Received)
        else:
            (broken,) = here.received[CHILDS].expect(Broken)
            assert isinstance(broken.error, LeaseExpired)
        here.another_pair_works()
        here.close()  # while it is stopped
