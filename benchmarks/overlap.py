"""Is the host's work hidden behind the device's? Step periods over a simulated device that takes the same time for every step.

    python -m benchmarks.overlap --json results.json

An instance's own loop (`instance.loop`), with mailbox, attempts, outbox and engine, serves sequences that all decode together,
over a runner on threads of its own (`engine.device`). With no step ahead a period is the device's time plus the host's; with one,
the device's alone. `host` is the processor time of the loop's thread in a step: mail, decision, layout, results, tokens sent.

A period is the mean over a window of steps, and the median of the windows counts, so that what other work on the machine holds up
for a while does not.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from collections.abc import Sequence as Rows
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from core.clock import Clock, MonotonicClock
from core.config import EngineConfig, Role
from core.cost import CostModel
from core.layout import KVLayout, LayerShape
from core.messages import Address, Submit
from core.sampling import SamplingParams
from core.tokens import pack_tokens
from decode.worker import DecodeWorker
from engine.device import Device
from engine.engine import Engine
from engine.simulated_runner import SimulatedRunner
from instance.loop import EngineLoop
from kv_transfer.byte_store import ByteStore
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from kv_transfer.transports.inproc import InprocTransport
from mail.attempt_book import AttemptBook
from mail.door import Door
from mail.keys import ClusterKeys
from mail.mailbox import Mailbox
from mail.outbox import Outbox
from mail.peers import Peers
from prefill.worker import PrefillWorker

_BLOCK_SIZE = 16
_WARM_STEPS = 10
_WINDOW_STEPS = 25
_LEASE_S = 600.0


@dataclass(frozen=True)
class Row:
    """`over` is the excess of the period over the device's time; `worst_ms` the period of the worst window; `host_us` the mean
    of a step."""

    sequences: int
    steps_ahead: int
    device_ms: float
    period_ms: float
    worst_ms: float
    over: float
    host_us: float


class Bench:
    """One instance's loop, with everything around it, turned by whoever calls `run`. The gateway's mailbox only fills."""

    def __init__(
        self, options: argparse.Namespace, sequences: int, steps_ahead: int, stack: ExitStack, clock: Clock, door: Door
    ) -> None:
        self._options, self._sequences = options, sequences
        tokens = options.context + options.steps + _WARM_STEPS + 8
        layout = KVLayout.whole(layers=(LayerShape(1, 4, 4),) * 2, dtype="bfloat16", block_size=_BLOCK_SIZE)
        blocks = sequences * layout.blocks_for(tokens) + 1
        cost = CostModel(
            step_s=options.device_ms / 1e3, prefill_token_s=0, attention_s=0, decode_sequence_s=0, decode_context_s=0
        )
        runner = SimulatedRunner(layout, blocks, tokens, 32_000, cost, clock=clock, steps_ahead=steps_ahead)
        self._mailbox, gateway = Mailbox(door), Mailbox(door)
        stack.callback(gateway.close)
        stack.callback(self._mailbox.close)
        self._ended: list[float] = []
        self._device = Device(runner, on_done=self._over)
        config = EngineConfig(
            max_num_seqs=sequences, max_num_batched_tokens=sequences * options.context, max_waiting_tokens=1 << 30
        )
        engine = Engine(self._device, config, clock)
        self._address = Address("bench", 1, self._mailbox.endpoint)
        self._gateway = Address("gateway", 1, gateway.endpoint)
        self._peers = Peers(door)
        stack.callback(self._peers.close)
        self._loop = self._staff(engine, ByteStore(layout, blocks), door, stack, clock)

    def _staff(self, engine: Engine, store: ByteStore, door: Door, stack: ExitStack, clock: Clock) -> EngineLoop:
        common = store, InprocTransport(), door.keys.transfer_secret, "bench", 1, clock
        sender = stack.enter_context(KVSender(*common, lambda event: None))
        receiver = stack.enter_context(KVReceiver(*common, lambda event: None))
        book = AttemptBook(self._address, Outbox(self._address, self._peers, clock), self._peers, clock, _LEASE_S)
        prefill = PrefillWorker(engine, sender, book, clock)
        decode = DecodeWorker(engine, receiver, book, self._peers, self._address, clock, _LEASE_S, 1 << 30)
        return EngineLoop(engine, self._mailbox, book, prefill, decode, Role.MIXED, clock, store.fence)

    def run(self) -> tuple[list[float], float]:
        """When each counted step was over, in seconds, and the processor time of this thread in one."""
        self._submit()
        began = time.thread_time()
        while len(self._ended) <= self._options.steps + _WARM_STEPS:
            if len(self._ended) < _WARM_STEPS:
                began = time.thread_time()
            rest_s = self._loop.turn()
            if rest_s > 0:
                self._mailbox.wait(rest_s)
        worked_s = (time.thread_time() - began) / self._options.steps
        self._device.close()
        return self._ended[_WARM_STEPS:], worked_s

    def _submit(self) -> None:
        count = self._options.steps + _WARM_STEPS + 4
        sampling = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
        for index in range(self._sequences):
            prompt = [1 + (index + place) % 1000 for place in range(self._options.context)]
            submit = Submit(
                attempt=str(index),
                gateway=self._gateway,
                tokens=pack_tokens(prompt),
                prompt_tokens=len(prompt),
                sampling=sampling,
                stage="local",
                ticket=index,
            )
            if not self._peers.send(self._address.mailbox, submit):
                raise RuntimeError("the mailbox is full")

    def _over(self) -> None:
        self._ended.append(time.perf_counter())
        self._mailbox.wake()


@contextmanager
def bench(options: argparse.Namespace, sequences: int, steps_ahead: int) -> Iterator[Bench]:
    with ExitStack() as stack:
        door = stack.enter_context(Door(ClusterKeys.generate()))
        yield Bench(options, sequences, steps_ahead, stack, MonotonicClock(), door)


def measure(options: argparse.Namespace, sequences: int, steps_ahead: int) -> Row:
    with bench(options, sequences, steps_ahead) as it:
        ended, worked_s = it.run()
    marks = ended[::_WINDOW_STEPS]
    windows = [(end - start) / _WINDOW_STEPS * 1e3 for start, end in itertools.pairwise(marks)]
    period_ms = statistics.median(windows)
    over = period_ms / options.device_ms - 1
    return Row(sequences, steps_ahead, options.device_ms, period_ms, max(windows), over, worked_s * 1e6)


def table_of(rows: Rows[Row]) -> Table:
    table = Table(title="Step periods over a simulated device")
    for name in ("sequences", "steps ahead", "device ms", "period ms", "worst", "over", "host us"):
        table.add_column(name, justify="right")
    for row in rows:
        numbers = f"{row.device_ms:g}", f"{row.period_ms:.3f}", f"{row.worst_ms:.3f}", f"{row.over:+.1%}", f"{row.host_us:.0f}"
        table.add_row(str(row.sequences), str(row.steps_ahead), *numbers)
    return table


def parse_options(arguments: Rows[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", default="64,256,512", help="that decode together, comma separated")
    parser.add_argument("--device-ms", type=float, default=10.0, help="of a step")
    parser.add_argument("--context", type=int, default=256, help="tokens of context while decoding")
    parser.add_argument("--steps", type=int, default=300, help="counted")
    parser.add_argument("--json", default=None, help="also write the rows to this file")
    return parser.parse_args(arguments)


def main(arguments: Rows[str] | None = None) -> None:
    options = parse_options(arguments)
    if options.steps < _WINDOW_STEPS:
        raise SystemExit(f"Got --steps {options.steps} but expected at least a window of {_WINDOW_STEPS}")
    sizes = [int(item) for item in options.sequences.split(",")]
    rows = [measure(options, sequences, steps_ahead) for sequences in sizes for steps_ahead in (0, 1)]
    Console().print(table_of(rows))
    if options.json:
        record = {"options": vars(options), "rows": [asdict(row) for row in rows]}
        Path(options.json).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
