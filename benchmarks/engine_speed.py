"""The engine against `transformers`' own forward pass on a CPU: prefill and decode tokens per second, same weights.

    python -m benchmarks.engine_speed --threads 2 --dtype bfloat16 --json results.json

The baseline is `transformers` at its best: one padding-free batch, sdpa attention, its own `DynamicCache`, logits of the last
row alone in prefill; only its forward pass is timed. The engine is timed as it serves: whole `Engine.step` calls with
scheduling, batch building and greedy sampling, over scattered KV blocks, prompts of a batch in chunks of
`--batched-tokens`. Repetitions of the two alternate, and medians are compared, because rates of a shared machine drift.

`limit` is the time that the arithmetic or the bytes of the work need at the rates measured here, whichever is longer:
weights and KV are read once a step, products run at the bf16 (or fp32) rate of one large product.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from core.clock import MonotonicClock
from core.config import EngineConfig
from core.sampling import SamplingParams
from engine.engine import Engine
from engine.sequence import Sequence
from engine.torch_runner import TorchRunner
from tooling.model_factory import SIZES, ModelDims, make_model

Pair = tuple[float, float]
"""Seconds that the baseline and the engine took for the same work."""


@dataclass(frozen=True)
class Machine:
    """What it ran on, and the two rates that limit any engine there."""

    date: str
    processor: str
    threads: int
    torch: str
    transformers: str
    read_gb_per_s: float
    matmul_gflop_per_s: float


@dataclass(frozen=True)
class Work:
    """One phase of `batch` sequences. `tokens` is what it yields: prompt tokens read, or tokens decoded."""

    name: str
    batch: int
    tokens: int
    flop: float
    bytes: float


@dataclass(frozen=True)
class Row:
    """Medians over the repetitions, tokens per second; `ratio` of the medians; `share_of_limit` of the engine."""

    work: str
    transformers: float
    engine: float
    ratio: float
    limit: float
    share_of_limit: float


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    dtype: torch.dtype = getattr(torch, options.dtype)
    prompts = [tuple(map(int, item.split("x"))) for item in options.prompts.split(",")]
    batches = [int(item) for item in options.batches.split(",")]
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, size=options.size, dtype=dtype)
        bench = _Bench(Path(folder), SIZES[options.size], dtype, options)
    rates = [_rates(dtype)]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    measured: list[tuple[Work, list[Pair]]] = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(prompts) * options.repeats + len(batches) * options.steps)
        for work, run in itertools.chain(bench.prefills(prompts), bench.decodes(batches)):
            progress.update(task, description=work.name)
            pairs = []
            for pair in run():
                pairs.append(pair)
                progress.advance(task)
            measured.append((work, pairs))
            rates.append(_rates(dtype))
    machine = _machine(options.threads, rates)
    rows = [_row(work, pairs, machine) for work, pairs in measured]
    console.print(_table(rows, machine, options))
    if options.json:
        record = {"machine": asdict(machine), "options": vars(options), "rows": [asdict(row) for row in rows]}
        Path(options.json).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--size", choices=sorted(SIZES), default="125m")
    parser.add_argument("--prompts", default="512x1,512x8,2048x8", help="prompt tokens x batch, comma separated")
    parser.add_argument("--batches", default="1,8,32", help="sequences that decode together, comma separated")
    parser.add_argument("--context", type=int, default=512, help="tokens of context while decoding")
    parser.add_argument("--repeats", type=int, default=3, help="of each prefill")
    parser.add_argument("--steps", type=int, default=15, help="of each decode")
    parser.add_argument("--batched-tokens", type=int, default=2048, help="most tokens in one step of the engine")
    parser.add_argument("--json", default=None, help="also write the rows to this file")
    return parser.parse_args()


class _Bench:
    """One set of weights in both engines."""

    def __init__(self, folder: Path, dims: ModelDims, dtype: torch.dtype, options: argparse.Namespace) -> None:
        self._dims, self._itemsize, self._options = dims, dtype.itemsize, options
        self._baseline: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        self._baseline.eval()
        widest = max(int(item.split("x")[0]) * int(item.split("x")[1]) for item in options.prompts.split(","))
        deepest = max(int(item) for item in options.batches.split(",")) * (options.context + options.steps)
        config = EngineConfig(
            threads=options.threads,
            max_num_seqs=256,
            max_num_batched_tokens=options.batched_tokens,
            kv_bytes=int(1.2 * max(widest, deepest) * self._kv_bytes_per_token) + (1 << 26),
            prefix_cache=False,
        )
        self._engine = Engine(TorchRunner.load(folder, config, dtype=str(dtype).split(".")[-1]), config, MonotonicClock())
        self._random = random.Random(0)
        self._ids = itertools.count()

    def prefills(self, prompts: list[tuple[int, ...]]) -> Iterator[tuple[Work, Callable[[], Iterator[Pair]]]]:
        """For each `(length, batch)`: the work, and its repetitions."""
        for length, batch in prompts:
            tokens = length * batch
            attention = 4 * self._dims.layers * self._dims.heads * self._dims.head_dim * (length + 1) / 2
            flop = tokens * (2 * self._layer_weights + attention) + 2 * batch * self._head_weights
            read = (self._layer_weights + self._head_weights) * self._itemsize
            yield Work(f"prefill {length} x {batch}", batch, tokens, flop, read), partial(self._prefill, length, batch)

    def decodes(self, batches: list[int]) -> Iterator[tuple[Work, Callable[[], Iterator[Pair]]]]:
        """For each batch: the work of one step, and its repetitions."""
        context = self._options.context
        for batch in batches:
            attention = 4 * self._dims.layers * self._dims.heads * self._dims.head_dim * context
            flop = batch * (2 * (self._layer_weights + self._head_weights) + attention)
            read = (self._layer_weights + self._head_weights) * self._itemsize + batch * context * self._kv_bytes_per_token
            yield Work(f"decode {batch} at {context}", batch, batch, flop, read), partial(self._decode, batch)

    @torch.inference_mode()
    def _prefill(self, length: int, batch: int) -> Iterator[Pair]:
        for _ in range(self._options.repeats):
            prompts = self._prompts(length, batch)
            ids = torch.tensor(prompts)
            baseline = _timed(partial(self._baseline, ids, use_cache=True, logits_to_keep=1))
            self._add(prompts, max_tokens=1)
            ours = 0.0
            while self._engine.has_work:
                ours += _timed(self._engine.step)
            yield baseline, ours

    @torch.inference_mode()
    def _decode(self, batch: int) -> Iterator[Pair]:
        context, steps = self._options.context, self._options.steps
        prompts = self._prompts(context, batch)
        cache = DynamicCache(config=self._baseline.config)
        self._baseline(torch.tensor(prompts), past_key_values=cache, logits_to_keep=1)
        sequences = self._add([prompt[: context - steps // 2] for prompt in prompts], max_tokens=steps + 2)
        while any(sequence.output_tokens == 0 for sequence in sequences):
            self._engine.step()
        token = torch.tensor([[prompt[0]] for prompt in prompts])
        for step in range(steps + 1):
            baseline = _timed(lambda: self._baseline(token, past_key_values=cache))
            cache.crop(-1)
            ours = _timed(self._engine.step)
            if step:  # the first warms both
                yield baseline, ours
        for sequence in sequences:
            self._engine.cancel(sequence.sequence_id)

    def _prompts(self, length: int, batch: int) -> list[list[int]]:
        return [[self._random.randrange(self._dims.vocab_size) for _ in range(length)] for _ in range(batch)]

    def _add(self, prompts: list[list[int]], max_tokens: int) -> list[Sequence]:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        sequences = [Sequence(str(next(self._ids)), list(prompt), len(prompt), sampling) for prompt in prompts]
        for sequence in sequences:
            self._engine.add(sequence)
        return sequences

    @property
    def _layer_weights(self) -> int:
        d = self._dims
        attention = d.hidden * d.head_dim * (2 * d.heads + 2 * d.kv_heads)
        return d.layers * (attention + 3 * d.hidden * d.intermediate)

    @property
    def _head_weights(self) -> int:
        return self._dims.hidden * self._dims.vocab_size

    @property
    def _kv_bytes_per_token(self) -> int:
        return self._dims.layers * 2 * self._dims.kv_heads * self._dims.head_dim * self._itemsize


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _best(call: Callable[[], object], times: int) -> float:
    return min(_timed(call) for _ in range(times))


def _rates(dtype: torch.dtype) -> tuple[float, float]:
    """Bytes/s of reading memory and FLOP/s of one large product, the best of several tries."""
    words = torch.ones(1 << 26)  # 256 MiB, more than any cache
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    return words.nbytes / _best(words.sum, 5), 2 * 2048**3 / _best(lambda: a @ b.T, 5)


def _machine(threads: int, rates: list[tuple[float, float]]) -> Machine:
    """`rates` were taken between the measurements; the best counts, for a limit should be one that the machine did reach."""
    read, matmul = (max(column) for column in zip(*rates, strict=True))
    return Machine(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        processor=_processor(),
        threads=threads,
        torch=torch.__version__,
        transformers=transformers.__version__,
        read_gb_per_s=read / 1e9,
        matmul_gflop_per_s=matmul / 1e9,
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[-1] for line in lines if line.startswith("model name")), platform.processor())


def _row(work: Work, pairs: list[Pair], machine: Machine) -> Row:
    baseline_s, engine_s = (statistics.median(side) for side in zip(*pairs, strict=True))
    limit_s = max(work.flop / (machine.matmul_gflop_per_s * 1e9), work.bytes / (machine.read_gb_per_s * 1e9))
    return Row(
        work=work.name,
        transformers=work.tokens / baseline_s,
        engine=work.tokens / engine_s,
        ratio=baseline_s / engine_s,
        limit=work.tokens / limit_s,
        share_of_limit=limit_s / engine_s,
    )


def _table(rows: list[Row], machine: Machine, options: argparse.Namespace) -> Table:
    table = Table(
        title=f"Tokens per second, llama {options.size}, {options.dtype}, medians",
        caption=f"{machine.date}, {machine.processor}, {machine.threads} threads, torch {machine.torch}, transformers "
        f"{machine.transformers}; reads {machine.read_gb_per_s:.1f} GB/s, multiplies {machine.matmul_gflop_per_s:.0f} GFLOP/s",
    )
    for name in ("work", "transformers", "HetServe", "ratio", "limit", "share of limit"):
        table.add_column(name, justify="left" if name == "work" else "right")
    for row in rows:
        numbers = (
            f"{row.transformers:,.0f}",
            f"{row.engine:,.0f}",
            f"{row.ratio:.2f}",
            f"{row.limit:,.0f}",
            f"{row.share_of_limit:.0%}",
        )
        table.add_row(row.work, *numbers)
    return table


if __name__ == "__main__":
    main()
