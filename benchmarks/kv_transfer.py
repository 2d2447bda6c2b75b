"""How fast KV crosses between two processes on this machine's loopback, against plain sendall and recv_into in the same run.

    python -m benchmarks.kv_transfer --sizes 1,16,64 --repeats 7 --json results.json

"Plain" moves the same bytes out of one warm buffer into another in 1 MiB calls. KV transfer also gathers them from paged
blocks, digests them twice, scatters them into the other side's blocks (of another size), checks coverage and commits.
Wires on a shared machine are noisy: compare columns of one run, never numbers of two.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import random
import socket
import statistics
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from core.clock import MonotonicClock
from core.layout import KVLayout, LayerShape
from kv_transfer.byte_store import ByteStore
from kv_transfer.events import Broken, Delivered, Received, SendFailed
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from kv_transfer.transports.tcp import TcpTransport, split_endpoint

MIB = 1 << 20
LAYERS = 8
SHAPES = tuple(LayerShape(8, 128, 128) for _ in range(LAYERS))
SOURCE_BLOCK, TARGET_BLOCK = 16, 64
LEASE_S = 60.0


@dataclass(frozen=True)
class Row:
    """Medians over the repeats, and the best; `share` is KV transfer's median rate over plain's."""

    mib: float
    plain_gb_per_s: float
    plain_best_gb_per_s: float
    kv_gb_per_s: float
    kv_best_gb_per_s: float
    kv_ms: float
    share: float


def main() -> None:
    options = _options()
    sizes = [int(float(size) * MIB) for size in options.sizes.split(",")]
    layout = KVLayout.whole(layers=SHAPES, dtype="bfloat16", block_size=SOURCE_BLOCK)
    tokens = [max(1, size // layout.bytes_per_token) for size in sizes]
    console = Console()
    with _Peer(max(tokens), options.buffer_bytes) as peer, Progress(console=console, transient=True) as progress:
        task = progress.add_task("moving KV", total=len(tokens) * options.repeats)
        rows = []
        for count in tokens:
            plain_s, kv_s = [], []
            for repeat in range(options.repeats + 1):
                plain, kv = peer.plain(count * layout.bytes_per_token), peer.kv(count)
                if repeat:  # the first round touches memory and warms the connection
                    plain_s.append(plain)
                    kv_s.append(kv)
                    progress.advance(task)
            rows.append(_row(count * layout.bytes_per_token, plain_s, kv_s))
    console.print(_table(rows))
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1,16,64,256", help="MiB of KV per transfer, comma separated")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--buffer-bytes", type=int, default=None, help="socket buffers; default: the kernel's choice")
    parser.add_argument("--json", default=None, help="also write the rows to this file")
    return parser.parse_args()


def _row(size: int, plain_s: list[float], kv_s: list[float]) -> Row:
    def rate(seconds: float) -> float:
        return size / seconds / 1e9

    plain, kv = statistics.median(plain_s), statistics.median(kv_s)
    return Row(size / MIB, rate(plain), rate(min(plain_s)), rate(kv), rate(min(kv_s)), kv * 1e3, plain / kv)


def _table(rows: list[Row]) -> Table:
    table = Table(title="KV over loopback TCP, GB/s: median (best)")
    for name in ("MiB", "sendall / recv_into", "KV transfer", "KV ms", "share of plain"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row.mib:g}",
            f"{row.plain_gb_per_s:.2f} ({row.plain_best_gb_per_s:.2f})",
            f"{row.kv_gb_per_s:.2f} ({row.kv_best_gb_per_s:.2f})",
            f"{row.kv_ms:.2f}",
            f"{row.share:.0%}",
        )
    return table


class _Peer:
    """The other process, and this side's ends of both wires to it."""

    def __init__(self, tokens: int, buffer_bytes: int | None) -> None:
        self._secret = os.urandom(32)
        self._transport = TcpTransport(buffer_bytes=buffer_bytes)
        self._source = ByteStore(
            KVLayout.whole(layers=SHAPES, dtype="bfloat16", block_size=SOURCE_BLOCK), -(-tokens // SOURCE_BLOCK)
        )
        self._blocks = random.Random(1).sample(range(-(-tokens // SOURCE_BLOCK)), -(-tokens // SOURCE_BLOCK))
        for key, value in self._source.pages:
            key[:], value[:] = 1, 2
        self._events: queue.SimpleQueue[Delivered | SendFailed] = queue.SimpleQueue()
        self._grant = 0
        self._buffer = bytearray(MIB)
        spawn = multiprocessing.get_context("spawn")
        self._commands, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, self._secret, tokens, buffer_bytes), daemon=True)

    def __enter__(self) -> _Peer:
        self._process.start()
        self._endpoint, plain = self._commands.recv()
        self._plain = socket.create_connection(split_endpoint(plain))
        self._plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sender = KVSender(self._source, self._transport, self._secret, "benchmark", 1, MonotonicClock(), self._events.put)
        return self

    def __exit__(self, *error: object) -> None:
        self._sender.close()
        self._commands.send(None)
        self._plain.close()
        self._process.join(10)

    def plain(self, size: int) -> float:
        """Seconds until the other side has said that it has `size` bytes."""
        self._commands.send(("plain", size))
        self._commands.recv()
        started_s = time.perf_counter()
        left = size
        while left:
            piece = min(left, MIB)
            self._plain.sendall(memoryview(self._buffer)[:piece])
            left -= piece
        self._plain.recv(1)
        return time.perf_counter() - started_s

    def kv(self, tokens: int) -> float:
        """Seconds from `begin` to the commit."""
        self._grant += 1
        self._commands.send(("kv", self._grant, tokens))
        self._commands.recv()
        started_s = time.perf_counter()
        session = self._sender.begin("attempt", self._grant, self._endpoint, self._blocks, 0, tokens, LEASE_S)
        for layer in range(LAYERS):
            session.push(layer, 0, tokens)
        session.finish(b"")
        event = self._events.get()
        took_s = time.perf_counter() - started_s
        if isinstance(event, SendFailed):
            raise event.error
        return took_s


def _serve(commands: Connection, secret: bytes, tokens: int, buffer_bytes: int | None) -> None:
    """The receiving process."""
    num_blocks = -(-tokens // TARGET_BLOCK)
    store = ByteStore(KVLayout.whole(layers=SHAPES, dtype="bfloat16", block_size=TARGET_BLOCK), num_blocks)
    for key, value in store.pages:
        key[:], value[:] = 3, 4
    blocks = random.Random(2).sample(range(num_blocks), num_blocks)
    transport, events = TcpTransport(buffer_bytes=buffer_bytes), queue.SimpleQueue[Received | Broken]()
    listening = socket.create_server(("127.0.0.1", 0))
    with KVReceiver(store, transport, secret, "benchmark", 1, MonotonicClock(), events.put) as receiver:
        commands.send((receiver.endpoint, f"127.0.0.1:{listening.getsockname()[1]}"))
        plain, _ = listening.accept()
        buffer = memoryview(bytearray(MIB))
        while (command := commands.recv()) is not None:
            if command[0] == "plain":
                commands.send(None)
                left = command[1]
                while left:
                    left -= plain.recv_into(buffer[: min(left, MIB)])
                plain.sendall(b"!")
            else:
                receiver.open(command[1], "attempt", blocks, 0, command[2], LEASE_S)
                commands.send(None)
                events.get()
        plain.close()
    listening.close()


if __name__ == "__main__":
    main()
