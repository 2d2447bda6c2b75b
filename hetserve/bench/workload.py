"""Which requests arrive when: drawn from an arrival process, or read from a trace. Pure, and the same for the same seed."""

from __future__ import annotations

import csv
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from pathlib import Path


class TraceError(ValueError):
    """A file that is no trace; says which line is wrong and how."""


class Arrivals(Enum):
    """`poisson`: independent arrivals; `constant`: evenly spaced; `burst`: groups at once, groups evenly spaced."""

    POISSON = "poisson"
    CONSTANT = "constant"
    BURST = "burst"


@dataclass(frozen=True)
class Arrival:
    """One request to come, `at_s` after the start."""

    at_s: float
    input_tokens: int
    output_tokens: int


def arrival_times(process: Arrivals, rate: float, count: int, rng: random.Random, burst_size: int = 8) -> list[float]:
    """`count` times in seconds from 0, in order, at a mean of `rate` a second."""
    match process:
        case Arrivals.POISSON:
            gaps = (rng.expovariate(rate) for _ in range(count - 1))
            return list(itertools.accumulate(gaps, initial=0.0))[:count]
        case Arrivals.CONSTANT:
            return [index / rate for index in range(count)]
        case Arrivals.BURST:
            return [index // burst_size * burst_size / rate for index in range(count)]


def synthetic(times_s: Sequence[float], input_tokens: int, output_tokens: int) -> list[Arrival]:
    """Requests of one size at the given times."""
    return [Arrival(at_s, input_tokens, output_tokens) for at_s in times_s]


def read_trace(path: Path, time_scale: float = 1.0, limit: int | None = None) -> list[Arrival]:
    """A CSV with the columns of Azure's LLM traces: TIMESTAMP, ContextTokens, GeneratedTokens.

    Args:
        time_scale: every gap is multiplied by it: 0.5 is twice as fast.
        limit: only the first so many.

    Raises:
        TraceError: no such file, a column missing, or a line out of order or unreadable.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            arrivals = list(itertools.islice(_rows(path, csv.DictReader(file), time_scale), limit))
    except OSError as error:
        raise TraceError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"{path} is not a text file") from error
    if not arrivals:
        raise TraceError(f"{path} holds no requests")
    return arrivals


def _rows(path: Path, reader: csv.DictReader[str], time_scale: float) -> Iterator[Arrival]:
    missing = {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} - set(reader.fieldnames or ())
    if missing:
        raise TraceError(f"{path}: no column {', '.join(sorted(missing))}")
    first: datetime | None = None
    last_s = 0.0
    for row in reader:
        try:
            when = datetime.fromisoformat(row["TIMESTAMP"])
            first = first or when
            at_s = (when - first).total_seconds() * time_scale
            arrival = Arrival(at_s, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        except (TypeError, ValueError) as error:
            raise TraceError(f"{path}, line {reader.line_num}: {error}") from error
        if at_s < last_s:
            raise TraceError(f"{path}, line {reader.line_num}: earlier than the line before it")
        last_s = at_s
        if arrival.input_tokens < 1 or arrival.output_tokens < 1:
            continue  # a request that failed in production: nothing to replay
        yield arrival


class PromptMaker:
    """Random prompts out of token ids that the server is known to accept. No two share a prefix, bar chance."""

    def __init__(self, vocabulary: Sequence[int], seed: int) -> None:
        self._vocabulary = tuple(vocabulary)
        self._seed = seed

    def prompt(self, index: int, tokens: int) -> list[int]:
        """The prompt of request `index`: the same whatever was asked for before."""
        return random.Random(f"{self._seed}/{index}").choices(self._vocabulary, k=tokens)
