"""A peer that dies or stops in the middle of a payload, when gloo itself notices nothing but a time limit."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from core.errors import TransferError
from kv_transfer.carriers.gloo_pair import GlooPair
from kv_transfer.transports.socket_connection import SocketConnection

ROOT = Path(__file__).parents[3]
SIZE = 256 << 20  # more than the kernel takes, and some tenths of a second
PEER = """
import socket, sys, threading
from kv_transfer.carriers.gloo_pair import GlooPair
from kv_transfer.transports.socket_connection import SocketConnection

pair = GlooPair(SocketConnection(socket.socket(fileno=int(sys.argv[1]))), b"k" * 64, 1, "127.0.0.1")
data = memoryview(bytearray(b"1" * SIZE))
pair.MOVE(data, 3600.0)
print("begun", flush=True)
threading.Event().wait()
"""


def stop(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGSTOP)
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
        threading.Event().wait(0.001)


@pytest.mark.parametrize("move", ["send", "receive"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_who_waits_for_half_a_payload_is_woken_by_the_peers_death_and_by_close(move: str, how: signal.Signals) -> None:
    near, far = socket.socketpair()
    code = PEER.replace("MOVE", "receive" if move == "send" else "send").replace("SIZE", str(SIZE))
    with subprocess.Popen(
        [sys.executable, "-c", code, str(far.fileno())], cwd=ROOT, pass_fds=[far.fileno()], stdout=subprocess.PIPE, text=True
    ) as process:
        far.close()
        pair = GlooPair(SocketConnection(near), b"k" * 64, 0, "127.0.0.1")
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            data = bytearray(SIZE)
            if move == "send":
                stop(process)
                waiting = pair.send(memoryview(data), 10.0)
            else:
                waiting = pair.receive(memoryview(data), 10.0)
                while not data[0]:
                    pass
                stop(process)
                if data[-1]:
                    pytest.skip("the payload was over before the peer stopped")
            if how is signal.SIGKILL:
                process.kill()
            else:
                pair.close()
            with pytest.raises(TransferError) as raised:
                waiting.wait()
            assert "Timed out" not in str(raised.value)
        finally:
            process.kill()
            pair.close()
