"""Is the host's work hidden behind the device's? Step periods over a simulated device that takes the same time for every step.

    python -m benchmarks.overlap --json results.json

A thread schedules, lays out and takes in the steps of an `Engine` whose runner is on threads of its own (`engine.device`), as an
instance's loop does. With no step ahead a period is the device's time plus the host's; with one, the device's alone. `host` is
the processor time that scheduling, layout and results take in a step; the rest of a period the thread sleeps.

A period is the mean over a window of steps, and the median of the windows counts, so that what other work on the machine holds up
for a while does not.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import threading
import time
from collections.abc import Sequence as Rows
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from core.clock import MonotonicClock
from core.config import EngineConfig
from core.cost import CostModel
from core.layout import KVLayout, LayerShape
from core.sampling import SamplingParams
from engine.device import Device
from engine.engine import Engine
from engine.sequence import Sequence
from engine.simulated_runner import SimulatedRunner

_BLOCK_SIZE = 16
_WARM_STEPS = 10
_WINDOW_STEPS = 25


@dataclass(frozen=True)
class Row:
    """`over` is the excess of the period over the device's time; `worst_ms` the period of the worst window; `host_us` the median
    of a step."""

    sequences: int
    steps_ahead: int
    device_ms: float
    period_ms: float
    worst_ms: float
    over: float
    host_us: float


class Loop:
    """An engine and the thread that turns it."""

    def __init__(self, options: argparse.Namespace, sequences: int, steps_ahead: int) -> None:
        tokens = options.context + options.steps + _WARM_STEPS + 8
        layout = KVLayout.whole(layers=(LayerShape(1, 64, 64),) * 32, dtype="bfloat16", block_size=_BLOCK_SIZE)
        cost = CostModel(
            step_s=options.device_ms / 1e3, prefill_token_s=0, attention_s=0, decode_sequence_s=0, decode_context_s=0
        )
        clock = MonotonicClock()
        runner = SimulatedRunner(
            layout, sequences * layout.blocks_for(tokens) + 1, tokens, 32_000, cost, clock=clock, steps_ahead=steps_ahead
        )
        self._turn = threading.Event()
        self._device = Device(runner, on_done=self._turn.set)
        config = EngineConfig(max_num_seqs=sequences, max_num_batched_tokens=sequences * options.context)
        self._engine = Engine(self._device, config, clock)
        sampling = SamplingParams(max_tokens=options.steps + _WARM_STEPS + 4, temperature=0, ignore_eos=True)
        for index in range(sequences):
            prompt = [1 + (index + place) % 1000 for place in range(options.context)]
            self._engine.add(Sequence(str(index), prompt, len(prompt), sampling))

    def run(self, steps: int) -> tuple[list[float], list[float]]:
        """When each step was collected, in seconds, and the processor time of the turns that led there."""
        ended: list[float] = []
        worked: list[float] = []
        began = time.thread_time()
        while len(ended) <= steps + _WARM_STEPS:
            while self._engine.launch():
                pass
            self._turn.clear()
            if not self._engine.ready:
                self._turn.wait()
                continue
            output = self._engine.collect()
            if output.failed:
                raise RuntimeError(f"a sequence failed: {output.failed[0][1]}")
            ended.append(time.perf_counter())
            worked.append(time.thread_time() - began)
            began = time.thread_time()
        self._device.close()
        return ended[_WARM_STEPS:], worked[_WARM_STEPS:]


def measure(options: argparse.Namespace, sequences: int, steps_ahead: int) -> Row:
    ended, worked = Loop(options, sequences, steps_ahead).run(options.steps)
    marks = ended[::_WINDOW_STEPS]
    windows = [(end - start) / _WINDOW_STEPS * 1e3 for start, end in itertools.pairwise(marks)]
    period_ms = statistics.median(windows)
    over = period_ms / options.device_ms - 1
    return Row(sequences, steps_ahead, options.device_ms, period_ms, max(windows), over, statistics.median(worked) * 1e6)


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
