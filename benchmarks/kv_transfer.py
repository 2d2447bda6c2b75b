"""How fast KV crosses between two processes of this machine, by each transport that works here, against plain sendall and
recv_into over loopback in the same run.

    python -m benchmarks.kv_transfer --sizes 1,16,64 --repeats 7 --rounds 3 --json results.json

"Plain" moves the same bytes out of one warm buffer into another in 1 MiB calls. KV transfer also gathers them from paged
blocks, digests them twice, scatters them into the other side's blocks (of another size), checks coverage and commits.
Wires on a shared machine are noisy, and a connection keeps for its life whatever speed its first moments gave it: compare columns
of one run, never numbers of two. Each round makes new processes and connections.
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
from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from core.clock import MonotonicClock
from core.config import TransferConfig
from core.layout import KVLayout, LayerShape
from kv_transfer.byte_store import ByteStore
from kv_transfer.carrier import CarrierUnavailable
from kv_transfer.carriers import carriers_for
from kv_transfer.events import Broken, Delivered, Received, SendFailed
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from kv_transfer.terms import Terms
from kv_transfer.transports.tcp import TcpTransport, split_endpoint

MIB = 1 << 20
LAYERS = 8
SHAPES = tuple(LayerShape(8, 128, 128) for _ in range(LAYERS))
SOURCE_BLOCK, TARGET_BLOCK = 16, 64
LEASE_S = 60.0


@dataclass(frozen=True)
class Speed:
    """The median over the repeats of all rounds, and the best; `share` is the median rate over plain's."""

    gb_per_s: float
    best_gb_per_s: float
    ms: float
    share: float


@dataclass(frozen=True)
class Row:
    """`speeds` by the name of the way: `plain`, or a transport."""

    mib: float
    speeds: dict[str, Speed]


def main() -> None:
    options = _options()
    console = Console()
    layout = _layout(SOURCE_BLOCK)
    tokens = [max(1, int(float(size) * MIB) // layout.bytes_per_token) for size in options.sizes.split(",")]
    transports = options.transports.split(",") if options.transports else available()
    seconds: dict[tuple[int, str], list[float]] = defaultdict(list)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("moving KV", total=options.rounds * len(tokens) * options.repeats)
        for _ in range(options.rounds):
            with _Peer(max(tokens), options.buffer_bytes, transports) as peer:
                for count in tokens:
                    for repeat in range(options.repeats + 1):
                        took = peer.each_way(count)
                        if repeat:  # the first one touches memory and warms the connections
                            for way, took_s in took.items():
                                seconds[count, way].append(took_s)
                            progress.advance(task)
    rows = [
        _row(count * layout.bytes_per_token, {way: seconds[count, way] for way in ["plain", *transports]}) for count in tokens
    ]
    console.print(_table(rows))
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")


def available() -> list[str]:
    """The transports that the configuration can force and that work between two processes of this machine."""
    found = []
    for name in get_args(TransferConfig.model_fields["transport"].annotation):
        carriers = carriers_for(name)
        with suppress(CarrierUnavailable):
            if name != "auto":
                carriers[0].offer(MIB).withdraw()
                found.append(name)
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1,16,64,256", help="MiB of KV per transfer, comma separated")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--transports", default=None, help="comma separated; default: all that work here")
    parser.add_argument("--buffer-bytes", type=int, default=None, help="socket buffers; default: the kernel's choice")
    parser.add_argument("--json", default=None, help="also write the rows to this file")
    return parser.parse_args()


def _layout(block_size: int) -> KVLayout:
    return KVLayout.whole(layers=SHAPES, dtype="bfloat16", block_size=block_size)


def _row(size: int, seconds: dict[str, list[float]]) -> Row:
    plain_s = statistics.median(seconds["plain"])
    speeds = {}
    for way, taken in seconds.items():
        median_s = statistics.median(taken)
        speeds[way] = Speed(size / median_s / 1e9, size / min(taken) / 1e9, median_s * 1e3, plain_s / median_s)
    return Row(size / MIB, speeds)


def _table(rows: list[Row]) -> Table:
    table = Table(title="KV between two processes: GB/s median (best), ms, share of plain", show_lines=True)
    table.add_column("MiB", justify="right")
    for way in rows[0].speeds:
        table.add_column(way, justify="right")
    for row in rows:
        cells = [f"{s.gb_per_s:.2f} ({s.best_gb_per_s:.2f})\n{s.ms:.2f} ms  {s.share:.0%}" for s in row.speeds.values()]
        table.add_row(f"{row.mib:g}", *cells)
    return table


class _Peer:
    """The other process, and this side's ends of both wires to it."""

    def __init__(self, tokens: int, buffer_bytes: int | None, transports: list[str]) -> None:
        self._secret = os.urandom(32)
        self._transport = TcpTransport(buffer_bytes=buffer_bytes)
        self._transports = transports
        self._source = ByteStore(_layout(SOURCE_BLOCK), -(-tokens // SOURCE_BLOCK))
        self._blocks = random.Random(1).sample(range(-(-tokens // SOURCE_BLOCK)), -(-tokens // SOURCE_BLOCK))
        for key, value in self._source.pages:
            key[:], value[:] = 1, 2
        self._events: queue.SimpleQueue[Delivered | SendFailed] = queue.SimpleQueue()
        self._grant = 0
        self._buffer = bytearray(MIB)
        spawn = multiprocessing.get_context("spawn")
        self._commands, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, self._secret, tokens, buffer_bytes, transports), daemon=True)

    def __enter__(self) -> _Peer:
        self._process.start()
        self._endpoints, plain = self._commands.recv()
        self._plain = socket.create_connection(split_endpoint(plain))
        self._plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._senders = {
            name: KVSender(
                self._source,
                self._transport,
                self._secret,
                "benchmark",
                1,
                MonotonicClock(),
                self._events.put,
                carriers_for(name),
            )
            for name in self._transports
        }
        return self

    def __exit__(self, *error: object) -> None:
        for sender in self._senders.values():
            sender.close()
        self._commands.send(None)
        self._plain.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()

    def each_way(self, tokens: int) -> dict[str, float]:
        """Seconds by way, one after the other."""
        plain_s = self.plain(tokens * self._source.layout.bytes_per_token)
        return {"plain": plain_s, **{name: self.kv(tokens, name) for name in self._transports}}

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

    def kv(self, tokens: int, transport: str) -> float:
        """Seconds from `begin` to the commit."""
        self._grant += 1
        self._commands.send(("kv", self._grant, tokens, transport))
        self._commands.recv()
        started_s = time.perf_counter()
        session = self._senders[transport].begin(
            Terms(self._grant, "attempt", 0, tokens, LEASE_S), (self._endpoints[transport],), [self._blocks]
        )
        for layer in range(LAYERS):
            session.push(layer, 0, tokens)
        session.finish(b"")
        event = self._events.get()
        took_s = time.perf_counter() - started_s
        if isinstance(event, SendFailed):
            raise event.error
        return took_s


def _serve(commands: Connection, secret: bytes, tokens: int, buffer_bytes: int | None, transports: list[str]) -> None:
    """The receiving process."""
    num_blocks = -(-tokens // TARGET_BLOCK)
    store = ByteStore(_layout(TARGET_BLOCK), num_blocks)
    for key, value in store.pages:
        key[:], value[:] = 3, 4
    blocks = random.Random(2).sample(range(num_blocks), num_blocks)
    transport, events = TcpTransport(buffer_bytes=buffer_bytes), queue.SimpleQueue[Received | Broken]()
    receivers = {
        name: KVReceiver(store, transport, secret, "benchmark", 1, MonotonicClock(), events.put, carriers_for(name))
        for name in transports
    }
    with socket.create_server(("127.0.0.1", 0)) as listening:
        endpoints = {name: receiver.endpoint for name, receiver in receivers.items()}
        commands.send((endpoints, f"127.0.0.1:{listening.getsockname()[1]}"))
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
            _, grant, count, name = command
            receivers[name].open(Terms(grant, "attempt", 0, count, LEASE_S), [blocks])
            commands.send(None)
            events.get()
    plain.close()
    for receiver in receivers.values():
        receiver.stop()


if __name__ == "__main__":
    main()
