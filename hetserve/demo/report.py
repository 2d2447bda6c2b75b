"""What came of the demo, and how it is told: figures, a table, sentences. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.box import SIMPLE_HEAD
from rich.table import Table

from hetserve.types import Trace


@dataclass(frozen=True)
class Served:
    """What came of one question. `error` is None when it was answered, and disaggregated; `stamps` are the times in seconds at
    which pieces of text came."""

    name: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    prompt_tokens: int = 0
    ttft_s: float | None = None
    stamps: tuple[float, ...] = ()
    trace: Trace | None = None
    error: str | None = None

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    @property
    def tpot_s(self) -> float | None:
        """Seconds a token, after the first."""
        return (self.stamps[-1] - self.stamps[0]) / (self.tokens - 1) if self.tokens > 1 and self.stamps else None


@dataclass(frozen=True)
class Kill:
    """One process that was ended on purpose, `at_s`, when `after_tokens` of the answer had been received."""

    victim: str
    pid: int
    at_s: float
    after_tokens: int
    ended: bool


def problem_of(trace: Trace | None, text: str, tokens: int) -> str | None:
    """What is wrong with an answer that came to its end; None if nothing is."""
    if trace is None or not text or not tokens:
        return "the answer carried no text, no tokens or no trace"
    if not trace.disaggregated:
        return f"not disaggregated: {trace.prefill} and {trace.decode}, {trace.kv_bytes} bytes"
    return None


def served_table(served: Sequence[Served]) -> Table:
    """One row per answer. Latencies are this client's own."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("request", "prefilled on", "decoded on"):
        table.add_column(heading, no_wrap=True)
    for heading in ("prompt", "KV moved", "TTFT", "TPOT", "tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    for item in served:
        trace = item.trace
        table.add_row(
            item.name,
            trace.prefill if trace else "",
            trace.decode if trace else "",
            str(item.prompt_tokens),
            size(trace.kv_bytes) if trace else "",
            milliseconds(item.ttft_s),
            milliseconds(item.tpot_s),
            str(item.tokens),
        )
    return table


def pause_s(stamps: Sequence[float], at_s: float) -> float:
    """The longest silence of a stream that ended after `at_s`."""
    return max((after - before for before, after in pairwise(stamps) if after > at_s), default=0.0)


def kill_problem(kill: Kill | None, killed: Served, unfailed: Served) -> str | None:
    """Why the kill proves nothing, or what it broke; None when the answer went on as if nothing had happened."""
    if killed.error is not None:
        return killed.error
    if kill is None:
        return "the answer was over before its process could be killed"
    if not kill.ended:
        return f"process {kill.pid} of {kill.victim} outlived SIGKILL"
    assert killed.trace is not None
    if killed.trace.attempts < 2:
        return f"the kill did not land: {killed.trace.decode} had ended the answer at the first attempt"
    if killed.token_ids != unfailed.token_ids or killed.text != unfailed.text:
        return f"the answer is not the one without a kill: {_first_difference(killed, unfailed)}"
    return None


def kill_story(kill: Kill, killed: Served) -> str:
    """What happened, of a kill without a problem."""
    assert killed.trace is not None
    return (
        f"{kill.victim} (process {kill.pid}) was ended by SIGKILL when {kill.after_tokens} of {killed.tokens} tokens had come. "
        f"The stream paused for {pause_s(killed.stamps, kill.at_s):.2f} s; {killed.trace.decode} took over, at attempt "
        f"{killed.trace.attempts}. All {killed.tokens} tokens equal those of the answer that nobody disturbed."
    )


def size(count: int) -> str:
    """`1.5 MB`: bytes in decimal units."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.1f} ms"


def _first_difference(killed: Served, unfailed: Served) -> str:
    pairs = zip(killed.token_ids, unfailed.token_ids, strict=False)
    at = next((index for index, (one, other) in enumerate(pairs) if one != other), min(killed.tokens, unfailed.tokens))
    return f"{killed.tokens} tokens and {unfailed.tokens}, alike up to {at}"
