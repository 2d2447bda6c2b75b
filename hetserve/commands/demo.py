"""`hetserve demo`: the whole thing on one machine in a minute, proved by its own figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hetserve._app_path import use_app
from hetserve.client import Client
from hetserve.commands.interrupts import Interrupts
from hetserve.commands.pools import PoolFlags, with_flags
from hetserve.errors import APIError
from hetserve.exchange import Timeouts
from hetserve.streams import Stream
from hetserve.types import Message, SamplingOptions, Trace

if TYPE_CHECKING:
    import psutil

    from core.config import ClusterConfig

SIZE = "15m"
MADE_HERE = ".random"
"""Marks a folder of random weights that is complete: one left half made is made again."""
PROMPTS = (
    "Once upon a time, in a harbour at the edge of the map, a keeper of the light wrote down every ship that passed.",
    "List three reasons why reading a prompt and writing an answer suit different processors:",
    "def fibonacci(n: int) -> int:\n    ",
)
CHAT: tuple[Message, ...] = (
    {"role": "system", "content": "You answer briefly and never guess."},
    {"role": "user", "content": "What does a key-value cache hold, and why would anyone send it over a network?"},
)
GONE_WITHIN_S = 10.0


@dataclass(frozen=True)
class Served:
    """What came of one prompt. `error` is None when it was answered and disaggregated."""

    name: str
    prompt_tokens: int = 0
    tokens: int = 0
    ttft_s: float | None = None
    tpot_s: float | None = None
    trace: Trace | None = None
    error: str | None = None


def demo(
    model: Annotated[
        Path | None, typer.Option(help="A real model's folder, in place of random weights.", file_okay=False)
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where the random model is made, once.", file_okay=False)] = Path(".demo"),
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens per answer.")] = 48,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Start one prefill and one decode instance here, send prompts over HTTP, show how each was served, and clean up.

    Fails unless every prompt was read by one instance and answered by the other.
    """
    console = Console(highlight=False)
    use_app()
    chosen = _model(console, model, folder)
    with Interrupts().installed() as interrupts:
        served, left = _run(console, chosen, interrupts, max_tokens, seed)
    for process in left:
        console.print(f"[red]still running: {process}[/red]")
    failed = [item for item in served if item.error is not None]
    for item in failed:
        console.print(f"[red]{item.name}: {item.error}[/red]", soft_wrap=True)
    if failed or left:
        raise typer.Exit(1)
    moved = sum(item.trace.kv_bytes for item in served if item.trace is not None)
    console.print(
        f"[green]All {len(served)} answers were prefilled on one instance and decoded on the other; {size(moved)} of KV moved. "
        "Nothing was left running.[/green]",
        soft_wrap=True,
    )


def _run(
    console: Console, model: Path, interrupts: Interrupts, max_tokens: int, seed: int
) -> tuple[list[Served], list[psutil.Process]]:
    """Start, ask, stop. Returns what was served, and the processes that outlived the stop.

    Raises KeyboardInterrupt when told to end, after everything was stopped.
    """
    from cluster.launch import Cluster, Interrupted

    console.rule("1. Start: one prefill and one decode instance on Ray")
    cluster = Cluster(demo_config(model), console=console)
    processes: list[psutil.Process] = []
    try:
        cluster.start(interrupts.asked)
        processes = _children()
        console.print(f"Ready in {cluster.total_s:.1f} s at {cluster.url}, with OpenAI's API.", soft_wrap=True)
        console.rule("2. Ask")
        if (model / MADE_HERE).exists():
            console.print("[dim]The weights are random: what follows is gibberish, and so it should be.[/dim]")
        with interrupts.at_once():
            served = ask(console, cluster.url, max_tokens, seed)
        console.rule("3. How it was served")
        console.print(served_table(served))
    except Interrupted:
        raise KeyboardInterrupt from None
    finally:
        console.print("Stopping.")
        cluster.stop()
    return served, _left_over(processes)


def demo_config(model: Path) -> ClusterConfig:
    """One prefill and one decode instance in fp32 on a free port of this machine, sharing whatever GPUs it has."""
    from core.config import parse_config

    base = {
        "model": str(model.resolve()),
        "dtype": "float32",
        "gateway": {"host": "127.0.0.1", "port": 0, "served_model_name": "demo"},
        "engine": {"max_num_seqs": 16},
        "router": {"local_prefill_tokens": 0},
    }
    return parse_config(with_flags(base, PoolFlags(), local=True))


def ask(console: Console, url: str, max_tokens: int, seed: int) -> list[Served]:
    """Send each prompt, print the answer as it comes, and keep what it met with."""
    with Client(url, timeouts=Timeouts(read_s=120.0)) as client:
        sampling: SamplingOptions = {"max_tokens": max_tokens, "temperature": 0.8, "seed": seed, "ignore_eos": True}
        served = []
        for number, prompt in enumerate(PROMPTS, 1):
            console.print(f"\n[bold]> {prompt.strip()}[/bold]", soft_wrap=True)
            begin = partial(client.stream_completions, prompt, model="demo", trace=True, **sampling)
            served.append(_follow(console, f"text {number}", begin))
        console.print(f"\n[bold]> {CHAT[-1]['content']}[/bold]", soft_wrap=True)
        begin = partial(client.stream_chat, CHAT, model="demo", trace=True, **sampling)
        served.append(_follow(console, "chat", begin))
        return served


def served_table(served: Sequence[Served]) -> Table:
    """One row per prompt. Latencies are this client's own."""
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
            _milliseconds(item.ttft_s),
            _milliseconds(item.tpot_s),
            str(item.tokens),
        )
    return table


def size(count: int) -> str:
    """`1.5 MB`: bytes in decimal units."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


# --- inside -----------------------------------------------------------------------------------------------------------


def _model(console: Console, model: Path | None, folder: Path) -> Path:
    if model is not None:
        return model
    made = folder / f"llama-{SIZE}"
    done = made / MADE_HERE
    if not done.exists():
        began_s = time.monotonic()
        from transformers.utils.logging import disable_progress_bar

        from tooling.model_factory import make_model

        disable_progress_bar()
        make_model(made, "llama", size=SIZE, dtype="float32", seed=0)
        done.touch()
        console.print(f"Made a random {SIZE} Llama in {made} ({time.monotonic() - began_s:.1f} s).")
    return made


def _follow(console: Console, name: str, begin: Callable[[], Stream]) -> Served:
    """Print one answer as it arrives, and say what it met with."""
    began_s = time.perf_counter()
    stamps: list[float] = []
    usage, trace = None, None
    try:
        with begin() as stream:
            for chunk in stream:
                if chunk.text:
                    stamps.append(time.perf_counter())
                    console.print(Text(printable(chunk.text)), end="", soft_wrap=True)
                usage, trace = chunk.usage or usage, chunk.trace or trace
    except APIError as error:
        return Served(name, error=f"{type(error).__name__}: {error}")
    finally:
        console.print()
    if usage is None or trace is None or not stamps:
        return Served(name, error="the answer carried no text, no usage or no trace")
    steps = usage.completion_tokens - 1
    return Served(
        name=name,
        prompt_tokens=usage.prompt_tokens,
        tokens=usage.completion_tokens,
        ttft_s=stamps[0] - began_s,
        tpot_s=(stamps[-1] - stamps[0]) / steps if steps else None,
        trace=trace,
        error=None if trace.disaggregated else f"not disaggregated: {trace.prefill} and {trace.decode}, {trace.kv_bytes} bytes",
    )


def printable(text: str) -> str:
    """Random weights draw control characters too; a terminal should not obey them."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.1f} ms"


def _children() -> list[psutil.Process]:
    import psutil

    return psutil.Process().children(recursive=True)


def _left_over(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Which of these still run, after a short time to end in; and any that came later."""
    import psutil

    _, alive = psutil.wait_procs({*processes, *_children()}, timeout=GONE_WITHIN_S)
    return [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
