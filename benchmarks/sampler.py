"""The sampler alone on a CPU: milliseconds to draw one token for every row of a step, beside the usual way with torch.

    python -m benchmarks.sampler --json results.json

`torch` is what vLLM's own PyTorch sampler does: float32, sort for `top_p` and `top_k`, softmax, divide by exponential noise,
take the largest; its penalties are left out. Both get bf16 logits of two shapes: `flat` (normal, deviation 0.5) and `peaked`
(normal, deviation 3, twenty tokens 12 higher). Both run on one thread, whose own CPU time is taken, since that is what other work
on the machine disturbs least; draws of the two alternate; medians.

`penalties` rows are greedy with all three penalties, at two lengths of context: what they cost must not depend on it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from core.sampling import SamplingParams
from engine.sampling.sampler import Sampler

_PENALTIES = {"temperature": 0.0, "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.1}
_CASES: dict[str, tuple[dict[str, float], int]] = {
    "greedy": ({"temperature": 0.0}, 16),
    "temperature 1": ({}, 16),
    "min_p 0.05": ({"min_p": 0.05}, 16),
    "top_k 50": ({"top_k": 50}, 16),
    "top_p 0.9": ({"top_p": 0.9}, 16),
    "top_k 50, top_p 0.9": ({"top_k": 50, "top_p": 0.9}, 16),
    "penalties, context 16": (_PENALTIES, 16),
    "penalties, context 16k": (_PENALTIES, 16_384),
}
"""Name: the parameters, and tokens of context."""


@dataclass(frozen=True)
class Row:
    """Medians in milliseconds of CPU time a draw of the whole batch; `torch_ms` is None where it is not compared."""

    case: str
    logits: str
    vocab: int
    batch: int
    ms: float
    torch_ms: float | None


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    vocabs, batches = ([int(item) for item in part.split(",")] for part in (options.vocabs, options.batches))
    rows = [
        _measure(case, shape, vocab, batch, options.repeats)
        for vocab in vocabs
        for batch in batches
        for shape in ("flat", "peaked")
        for case in _CASES
    ]
    Console().print(_table(rows))
    if options.json:
        record = {"torch": torch.__version__, "options": vars(options), "rows": [asdict(row) for row in rows]}
        Path(options.json).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabs", default="32000,128256")
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", default=None, help="also write the rows to this file")
    return parser.parse_args()


@torch.inference_mode()
def _measure(case: str, shape: str, vocab: int, batch: int, repeats: int) -> Row:
    options, context = _CASES[case]
    sampler = Sampler(vocab, frozenset([2]))
    for row in range(batch):
        tokens = [(7 * row + 13 * place) % vocab for place in range(context)]
        sampler.admit(row, tokens, context // 2, SamplingParams(seed=row, **options))  # type: ignore[arg-type]
    logits, compared = _logits(shape, vocab, batch), "penalties" not in case
    ours, theirs = [], []
    for repeat in range(repeats + 1):
        ours.append(_timed(partial(_draw, sampler, logits, context // 2 + repeat)))
        if compared:
            theirs.append(_timed(partial(_usual, logits, options)))
    torch_ms = 1e3 * statistics.median(theirs[1:]) if compared else None
    return Row(case, shape, vocab, batch, 1e3 * statistics.median(ours[1:]), torch_ms)


def _logits(shape: str, vocab: int, batch: int) -> torch.Tensor:
    logits = torch.randn(batch, vocab, generator=torch.Generator().manual_seed(0)) * (0.5 if shape == "flat" else 3.0)
    if shape == "peaked":
        logits[:, :: vocab // 20] += 12
    return logits.bfloat16()


def _draw(sampler: Sampler, logits: torch.Tensor, position: int) -> None:
    sampler.draw(logits, range(len(logits)), [position] * len(logits)).read()


def _usual(logits: torch.Tensor, options: dict[str, float]) -> list[int]:
    """One token per row, with no regard to seeds."""
    scores = logits.float()
    if options.get("temperature") == 0.0:
        return scores.argmax(dim=-1).tolist()
    scores = scores / options.get("temperature", 1.0)
    if "min_p" in options:
        chances = scores.softmax(dim=-1)
        scores = scores.masked_fill(chances < options["min_p"] * chances.amax(dim=-1, keepdim=True), float("-inf"))
    if "top_k" in options or "top_p" in options:
        rising, order = scores.sort(dim=-1)
        if "top_k" in options:
            rising = rising.masked_fill(rising < rising[:, -int(options["top_k"]), None], float("-inf"))
        if "top_p" in options:
            dropped = rising.softmax(dim=-1).cumsum(dim=-1) <= 1 - options["top_p"]
            dropped[:, -1] = False
            rising = rising.masked_fill(dropped, float("-inf"))
        scores = torch.empty_like(scores).scatter_(-1, order, rising)
    chances = scores.softmax(dim=-1)
    return chances.div_(torch.empty_like(chances).exponential_()).argmax(dim=-1).tolist()


def _timed(call: Callable[[], object]) -> float:
    started = time.thread_time()
    call()
    return time.thread_time() - started


def _table(rows: list[Row]) -> Table:
    table = Table(title="Milliseconds to draw, medians", caption=f"one thread, torch {torch.__version__}")
    for name in ("vocabulary", "batch", "logits", "case", "HetServe", "torch", "ratio"):
        table.add_column(name, justify="left" if name in ("logits", "case") else "right")
    for row in rows:
        compared = ("", "") if row.torch_ms is None else (f"{row.torch_ms:.2f}", f"{row.torch_ms / row.ms:.1f}")
        table.add_row(f"{row.vocab:,}", str(row.batch), row.logits, row.case, f"{row.ms:.2f}", *compared)
    return table


if __name__ == "__main__":
    main()
