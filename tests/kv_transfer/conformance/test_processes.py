"""Two real processes over TCP: a transfer, a killed sender, and nothing left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import psutil

from core.clock import ManualClock, MonotonicClock
from core.errors import LeaseExpired, TransferError
from kv_transfer.byte_store import ByteStore
from kv_transfer.carriers import carriers_for
from kv_transfer.events import Broken, Delivered, Received, SendFailed
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from kv_transfer.terms import Terms
from kv_transfer.transports.tcp import TcpTransport
from tests.kv_transfer.conformance.ways import over_all_transports
from tests.kv_transfer.rig import POISON, SECRET, Inbox, filled, layout, poisoned, sequence_bytes, untouched_outside

ROOT = Path(__file__).parents[3]
SENDER = """
import sys
from core.clock import MonotonicClock
from kv_transfer.carriers import carriers_for
from kv_transfer.sender import KVSender
from kv_transfer.terms import Terms
from kv_transfer.transports.tcp import TcpTransport
from tests.kv_transfer.rig import SECRET, Inbox, filled, layout
from kv_transfer.events import Delivered, SendFailed

inbox, carriers = Inbox(), carriers_for(sys.argv[2])
with KVSender(filled(layout(5)), TcpTransport(), SECRET, "model", 3, MonotonicClock(), inbox, carriers) as sender:
    session = sender.begin(Terms(9, "attempt", 2, 15, 20.0), [sys.argv[1]], [[3, 7, 1]], 1)
    session.push(2, 0, 15)
    session.push(0, 0, 15)
    print("pushed", flush=True)
    command = sys.stdin.readline()
    if command:
        session.push(1, 0, 15)
        session.finish(b"token 17")
    if command == "finish\\n":
        print(inbox.expect(Delivered)[0].kv_bytes, flush=True)
    if command == "finish late\\n":
        print(inbox.expect(SendFailed)[0].error.code, flush=True)
"""


def spawn(endpoint: str, transport: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SENDER, endpoint, transport], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


@over_all_transports
def test_kv_crosses_between_two_processes(transport: str) -> None:
    target, inbox = poisoned(layout(16)), Inbox()
    with KVReceiver(target, TcpTransport(), SECRET, "model", 1, MonotonicClock(), inbox, carriers_for(transport)) as receiver:
        receiver.open(Terms(9, "attempt", 2, 15, 20.0), [[21]])
        with spawn(receiver.endpoint, transport) as child:
            out, _ = child.communicate("finish\n", timeout=60)
        (received,) = inbox.expect(Received)
    size = 13 * target.layout.bytes_per_token
    assert out.split() == ["pushed", str(size)]
    assert (received.tail, received.kv_bytes) == (b"token 17", size)
    assert sequence_bytes(target, [21], 2, 15) == sequence_bytes(filled(layout(5)), [3, 7, 1], 2, 15)
    assert untouched_outside(target, [21], 2, 15)


@over_all_transports
def test_a_killed_sender_breaks_its_session_at_once_not_at_the_end_of_its_lease(transport: str) -> None:
    inbox, stored = Inbox(), threading.Event()

    class Store(ByteStore):
        def write(self, layer: int, blocks: Sequence[int], start: int, count: int, data: memoryview) -> None:
            super().write(layer, blocks, start, count, data)
            stored.set()

    with KVReceiver(
        Store(layout(16), 32), TcpTransport(), SECRET, "model", 1, MonotonicClock(), inbox, carriers_for(transport)
    ) as receiver:
        receiver.open(Terms(9, "attempt", 2, 15, 3600.0), [[21]])
        with spawn(receiver.endpoint, transport) as child:
            assert stored.wait(60)
            child.send_signal(signal.SIGKILL)
        (broken,) = inbox.expect(Broken)
        assert type(broken.error) is TransferError
        assert receiver.open_grants == 0


@over_all_transports
def test_a_stopped_sender_loses_its_lease_and_what_it_sends_when_it_wakes_is_not_stored(transport: str) -> None:
    inbox, target, stored = Inbox(), poisoned(layout(16)), threading.Event()
    write, clock = target.write, ManualClock()
    target.write = lambda *args: (write(*args), stored.set())[0]
    with KVReceiver(target, TcpTransport(), SECRET, "model", 1, clock, inbox, carriers_for(transport)) as receiver:
        receiver.open(Terms(9, "attempt", 2, 15, 5.0), [[21]])
        with spawn(receiver.endpoint, transport) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "pushed\n"
            assert stored.wait(60)
            child.send_signal(signal.SIGSTOP)
            clock.advance(6.0)
            receiver.sweep()
            (broken,) = inbox.expect(Broken)
            assert isinstance(broken.error, LeaseExpired)
            for page in (page for pages in target.pages for page in pages):
                page[:] = POISON  # the blocks' new owner
            child.send_signal(signal.SIGCONT)
            out, _ = child.communicate("finish late\n", timeout=60)
            assert out.split() == ["lease_expired"]
            assert untouched_outside(target, [21], 2, 2)


@over_all_transports
def test_no_thread_or_descriptor_is_left_after_many_lives(transport: str) -> None:
    process, carriers = psutil.Process(), carriers_for(transport)
    source, target = filled(layout(4)), poisoned(layout(4))
    fds, threads = process.num_fds(), set(threading.enumerate())
    for life in range(10):
        sent, received = Inbox(), Inbox()
        receiver = KVReceiver(target, TcpTransport(), SECRET, "model", life, MonotonicClock(), received, carriers)
        sender = KVSender(source, TcpTransport(), SECRET, "model", life, MonotonicClock(), sent, carriers)
        for grant in range(3):
            receiver.open(Terms(grant, f"a{grant}", 0, 8, 20.0), [[1, 2]])
            session = sender.begin(Terms(grant, f"a{grant}", 0, 8, 20.0), [receiver.endpoint], [[3, 4]])
            for layer in range(3):
                session.push(layer, 0, 8)
            if grant:
                session.finish(b"")
        dead = sender.begin(Terms(9, "dead", 0, 1, 20.0), ["127.0.0.1:1"], [[0]])
        dead.push(0, 0, 1)
        sent.expect(Delivered, 2)
        sent.expect(SendFailed)
        if life % 2:
            sender.close()
            receiver.stop()
        else:
            receiver.stop()
            sender.close()
        assert len(received.of(Received)) == 2
    assert set(threading.enumerate()) == threads
    assert process.num_fds() == fds
