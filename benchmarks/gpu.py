"""What one GPU does with the engine, beside what it could do: run this once on a machine that has one.

    python -m benchmarks.gpu --json results.json

It runs the tests marked `gpu`, measures the device's memory bandwidth (a large copy) and its bf16 product rate, and times
whole `Engine.step` calls, scheduling and sampling included, of a random-weight Llama (1B shape, bf16): prefill and decode at
several batch sizes, with eager decode steps and with recorded ones (`engine.cuda_graph`).

Shares of the limits:
- decode: bytes that a step must read (weights once, and every sequence's KV) times steps per second, over bandwidth;
- prefill: 2 floating-point operations per weight and token, over the product rate. The output head counts once a prompt, as
  it is computed; attention's own products are left out, so the share is a little low for long prompts.

Needs torch with CUDA, transformers, accelerate, tokenizers, safetensors, numpy, psutil, pydantic, pyyaml, msgspec and rich;
pytest for the tests (left out, and said so, where it is missing). Neither Ray nor pyzmq.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from core.clock import MonotonicClock
from core.config import EngineConfig
from core.sampling import SamplingParams
from engine import sequence as engine_sequence
from engine.engine import Engine
from engine.torch_runner import TorchRunner
from tooling.model_factory import SIZES, ModelDims, make_model

ROOT = Path(__file__).resolve().parents[1]
_COPY_BYTES = 1 << 30
_PRODUCT_SIZE = 8192
_WARM_STEPS = 3


@dataclass(frozen=True)
class Weights:
    """How many numbers a token passes through. `body` once a token; `head`, the output projection, where one is drawn."""

    body: int
    head: int
    itemsize: int
    kv_bytes_per_token: int


@dataclass(frozen=True)
class Device:
    """Where it ran, and the two rates that limit any engine there. A copied byte counts twice: read and written."""

    name: str
    date: str
    torch: str
    cuda: str
    transformers: str
    bytes_per_s: float
    flop_per_s: float


@dataclass(frozen=True)
class Row:
    """One measurement. `steps` is how decode steps ran: eager or recorded; `share` is of the limit that `limit` names."""

    phase: str
    steps: str
    batch: int
    tokens_per_s: float
    step_ms: float
    share: float
    limit: str


def weights_of(dims: ModelDims, itemsize: int) -> Weights:
    """Of a Llama whose embeddings are not its head. Norms, a thousandth of it all, are left out."""
    attention = dims.hidden * dims.head_dim * (2 * dims.heads + 2 * dims.kv_heads)
    body = dims.layers * (attention + 3 * dims.hidden * dims.intermediate)
    kv_bytes = dims.layers * 2 * dims.kv_heads * dims.head_dim * itemsize
    return Weights(body, dims.hidden * dims.vocab_size, itemsize, kv_bytes)


def decode_share(weights: Weights, context_tokens: int, step_s: float, bytes_per_s: float) -> float:
    """Share of the bandwidth that a step uses which reads the weights and the KV of `context_tokens` tokens in all."""
    read = (weights.body + weights.head) * weights.itemsize + context_tokens * weights.kv_bytes_per_token
    return read / step_s / bytes_per_s


def prefill_share(weights: Weights, tokens: int, prompts: int, seconds: float, flop_per_s: float) -> float:
    """Share of the product rate used by reading `prompts` prompts of `tokens` tokens in all."""
    return 2 * (weights.body * tokens + weights.head * prompts) / seconds / flop_per_s


class Bench:
    """Times one engine. `timer` gives seconds."""

    def __init__(self, engine: Engine, vocab_size: int, timer: Callable[[], float] = time.perf_counter) -> None:
        self._engine = engine
        self._vocab_size = vocab_size
        self._timer = timer
        self._random = random.Random(0)
        self._ids = itertools.count()

    def prefill_s(self, batch: int, prompt_tokens: int, repeats: int) -> float:
        """Median seconds from `batch` prompts to the first token of each, after one round that is not counted."""
        times = []
        for _ in range(repeats + 1):
            self._add(batch, prompt_tokens, max_tokens=1)
            started = self._timer()
            while self._engine.has_work:
                self._step()
            times.append(self._timer() - started)
        return statistics.median(times[1:])

    def decode_step_s(self, batch: int, context_tokens: int, steps: int) -> float:
        """Median seconds of a step of `batch` sequences whose contexts lie around `context_tokens`."""
        total = _WARM_STEPS + steps
        sequences = self._add(batch, max(1, context_tokens - total // 2), max_tokens=total + batch + 2)
        while any(sequence.output_tokens == 0 for sequence in sequences):
            self._step()
        times = []
        for _ in range(total):
            started = self._timer()
            self._step(expected_batch=batch)
            times.append(self._timer() - started)
        for sequence in sequences:
            self._engine.cancel(sequence.sequence_id)
        return statistics.median(times[_WARM_STEPS:])

    def _step(self, expected_batch: int | None = None) -> None:
        output = self._engine.step()
        if output.failed:
            raise RuntimeError(f"a sequence failed: {output.failed[0][1]}")
        tokens = sum(part.count for part in output.parts)
        if expected_batch is not None and tokens != expected_batch:
            raise RuntimeError(f"Got {tokens} tokens in a step but expected {expected_batch}")

    def _add(self, batch: int, prompt_tokens: int, max_tokens: int) -> list[engine_sequence.Sequence]:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        sequences = []
        for _ in range(batch):
            tokens = [self._random.randrange(self._vocab_size) for _ in range(prompt_tokens)]
            sequences.append(engine_sequence.Sequence(str(next(self._ids)), tokens, prompt_tokens, sampling))
        for sequence in sequences:
            self._engine.add(sequence)
        return sequences


def measure(bench: Bench, weights: Weights, device: Device, options: argparse.Namespace, steps: str) -> list[Row]:
    """All rows of one engine."""
    rows = []
    for batch in options.batches:
        tokens = batch * options.prompt
        seconds = bench.prefill_s(batch, options.prompt, options.repeats)
        share = prefill_share(weights, tokens, batch, seconds, device.flop_per_s)
        rows.append(Row(f"prefill {options.prompt}", steps, batch, tokens / seconds, seconds * 1e3, share, "bf16 products"))
    for batch in options.batches:
        step_s = bench.decode_step_s(batch, options.context, options.steps)
        share = decode_share(weights, batch * options.context, step_s, device.bytes_per_s)
        rows.append(Row(f"decode at {options.context}", steps, batch, batch / step_s, step_s * 1e3, share, "memory bandwidth"))
    return rows


def measure_model(dims: ModelDims, device: Device, options: argparse.Namespace, console: Console) -> list[Row]:
    """The same weights twice: with eager decode steps, and with recorded ones where they can be recorded."""
    rows: list[Row] = []
    weights, most = weights_of(dims, torch.bfloat16.itemsize), max(options.batches)
    longest = max(options.prompt, options.context + options.steps) + 256 + most
    config = EngineConfig(
        max_num_seqs=most,
        max_num_batched_tokens=options.batched_tokens,
        max_waiting_tokens=2 * most * longest,
        kv_bytes=int(1.1 * most * longest * weights.kv_bytes_per_token) + (64 << 20),
        prefix_cache=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, size=options.size, dtype=torch.bfloat16)
        for capture in (False, True):
            started = time.perf_counter()
            chosen = config.model_copy(update={"capture": capture})
            runner = TorchRunner.load(folder, chosen, max_model_len=min(dims.max_position_embeddings, 2 * longest))
            took_s = time.perf_counter() - started
            console.print(f"loaded in {took_s:.0f} s: {runner.backend_name} attention, recorded {runner.captured_batch_sizes}")
            if capture and not runner.captured_batch_sizes:
                console.print(f"[yellow]decode steps are not recorded: {runner.not_captured}")
                break
            bench = Bench(Engine(runner, chosen, MonotonicClock()), dims.vocab_size)
            rows += measure(bench, weights, device, options, "recorded" if capture else "eager")
            del bench, runner
            gc.collect()
            torch.cuda.empty_cache()
    return rows


def look_at_device() -> Device:
    """Rates at their best of several tries: a limit should be one that the device did reach."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    copy_s = _best_s(lambda: target.copy_(source))
    a, b = (torch.randn(_PRODUCT_SIZE, _PRODUCT_SIZE, device="cuda").to(torch.bfloat16) for _ in range(2))
    product_s = _best_s(lambda: a @ b)
    return Device(
        name=torch.cuda.get_device_name(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        torch=torch.__version__,
        cuda=str(torch.version.cuda),
        transformers=transformers.__version__,
        bytes_per_s=2 * _COPY_BYTES / copy_s,
        flop_per_s=2 * _PRODUCT_SIZE**3 / product_s,
    )


def _best_s(work: Callable[[], object], times: int = 20) -> float:
    best_ms = float("inf")
    for _ in range(times):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        work()
        end.record()
        end.synchronize()
        best_ms = min(best_ms, begin.elapsed_time(end))
    return best_ms / 1e3


def run_tests() -> tuple[bool, str]:
    """Whether the tests marked `gpu` passed, and pytest's last lines."""
    if importlib.util.find_spec("pytest") is None:
        return False, "not run: pytest is not installed"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider", "--tb=short"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode == 0, "\n".join((done.stdout + done.stderr).strip().splitlines()[-40:])


def table_of(rows: Sequence[Row], device: Device, size: str) -> Table:
    table = Table(
        title=f"Llama {size}, bf16, on {device.name}",
        caption=f"{device.date}, torch {device.torch}, CUDA {device.cuda}, transformers {device.transformers}; copies "
        f"{device.bytes_per_s / 1e9:,.0f} GB/s, multiplies {device.flop_per_s / 1e12:,.0f} TFLOP/s",
    )
    for name in ("phase", "decode steps", "batch", "tokens/s", "ms", "share", "of"):
        table.add_column(name, justify="left" if name in ("phase", "decode steps", "of") else "right")
    for row in rows:
        numbers = f"{row.batch}", f"{row.tokens_per_s:,.0f}", f"{row.step_ms:.2f}", f"{row.share:.0%}"
        table.add_row(row.phase, row.steps, *numbers, row.limit)
    return table


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="1b")
    parser.add_argument("--batches", type=_sizes, default=[1, 8, 32, 128], help="sequences together, comma separated")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of a prompt in prefill")
    parser.add_argument("--context", type=int, default=1024, help="tokens of context in decode")
    parser.add_argument("--steps", type=int, default=50, help="decode steps timed")
    parser.add_argument("--repeats", type=int, default=3, help="prefills timed")
    parser.add_argument("--batched-tokens", type=int, default=8192, help="most tokens in one step")
    parser.add_argument("--no-tests", action="store_true", help="leave out the tests marked gpu")
    parser.add_argument("--json", default=None, help="also write everything to this file")
    return parser.parse_args(arguments)


def _sizes(text: str) -> list[int]:
    return [int(item) for item in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_options(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu needs a CUDA device, and torch sees none on this machine")
    console = Console()
    passed, report = (None, "left out") if options.no_tests else run_tests()
    console.print(report, markup=False, highlight=False)
    device = look_at_device()
    rows = measure_model(SIZES[options.size], device, options, console)
    console.print(table_of(rows, device, options.size))
    if options.json:
        record = {
            "device": asdict(device),
            "options": vars(options),
            "tests": {"passed": passed, "report": report},
            "rows": [asdict(row) for row in rows],
        }
        Path(options.json).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if passed is False:
        raise SystemExit("the tests marked gpu did not pass")


if __name__ == "__main__":
    main()
