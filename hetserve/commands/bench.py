"""`hetserve bench`: load a server as its users would, and say what they met with."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from hetserve.async_client import AsyncClient
from hetserve.bench.measure import Outcome, run_open_loop
from hetserve.bench.report import Report, Spread, Targets, report
from hetserve.bench.workload import Arrival, Arrivals, PromptMaker, arrival_times, read_trace, synthetic
from hetserve.commands.usage import ApiKey, Url, UsageError, connect, console
from hetserve.exchange import Timeouts
from hetserve.retries import Retries

PASSAGE = (
    "In the beginning a small ship left the harbour for the far side of the world, and nobody on the shore knew when it would "
    "be seen again. Some said two years, others five; a few, who had read the charts more closely, kept quiet and went home."
)
LATE_S = 0.02


def bench(
    url: Url = None,
    api_key: ApiKey = None,
    model: Annotated[str | None, typer.Option(help="The first that the server lists, if not given.")] = None,
    rate: Annotated[float, typer.Option(help="Mean requests a second.")] = 4.0,
    requests: Annotated[int | None, typer.Option(min=1, help="How many; 100, or all of a trace, if not given.")] = None,
    arrivals: Annotated[Arrivals, typer.Option(help="How requests are spaced.")] = Arrivals.POISSON,
    burst_size: Annotated[int, typer.Option(min=1, help="Requests per burst.")] = 8,
    input_tokens: Annotated[int, typer.Option(min=1)] = 256,
    output_tokens: Annotated[int, typer.Option(min=1)] = 64,
    trace: Annotated[
        Path | None, typer.Option(help="CSV with TIMESTAMP, ContextTokens, GeneratedTokens, in place of a rate and sizes.")
    ] = None,
    time_scale: Annotated[float, typer.Option(help="Multiplies a trace's gaps: 0.5 is twice as fast.")] = 1.0,
    ttft_ms: Annotated[float | None, typer.Option(help="Target: time to first token.")] = None,
    tpot_ms: Annotated[float | None, typer.Option(help="Target: time per output token after it.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Give a request up after this many seconds.")] = 600.0,
    vocabulary: Annotated[
        int | None, typer.Option(help="Draw prompts from token ids below this; from a tokenized text if not given.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write the report there.", dir_okay=False)] = None,
) -> None:
    """Send requests at given times, whether or not earlier ones were answered, and report latency and goodput.

    Times are measured here, tokens are counted by the server, prompts are random token ids.
    """
    for flag, value in (("--rate", rate), ("--time-scale", time_scale), ("--ttft-ms", ttft_ms), ("--tpot-ms", tpot_ms)):
        if value is not None and not value > 0:
            raise UsageError(f"{flag}: got {value}, expected a positive number")
    if trace is not None:
        plan = read_trace(trace, time_scale, requests)
    else:
        times_s = arrival_times(arrivals, rate, requests or 100, random.Random(seed), burst_size)
        plan = synthetic(times_s, input_tokens, output_tokens)
    with connect(url, api_key) as client:
        name = model or client.models()[0].id
        words = (
            range(vocabulary)
            if vocabulary
            else sorted(set(client.tokenize(PASSAGE, model=name, add_special_tokens=False).tokens))
        )
    prompts = PromptMaker(words, seed)
    outcomes = asyncio.run(_run(url, api_key, name, plan, prompts, temperature, timeout_s))
    targets = Targets(None if ttft_ms is None else ttft_ms / 1e3, None if tpot_ms is None else tpot_ms / 1e3)
    result = report(outcomes, targets)
    out = console()
    out.print(summary_table(result))
    if result.spreads:
        out.print(latency_table(result))
    if result.lag.p99 > LATE_S:
        out.print(f"This machine sent requests up to {result.lag.max * 1e3:.0f} ms late: too busy for exact figures.")
    if json_out is not None:
        json_out.write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
    if not result.completed:
        raise typer.Exit(1)


async def _run(
    url: str | None,
    api_key: str | None,
    model: str,
    plan: list[Arrival],
    prompts: PromptMaker,
    temperature: float,
    timeout_s: float,
) -> list[Outcome]:
    timeouts = Timeouts(connect_s=min(30.0, timeout_s), read_s=timeout_s, total_s=timeout_s)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    errors = Console(stderr=True)
    with Progress(*columns, console=errors, disable=not errors.is_terminal) as progress:
        bar = progress.add_task("requests", total=len(plan))
        async with AsyncClient(url, api_key=api_key, timeouts=timeouts, retries=Retries(limit=0)) as client:
            return await run_open_loop(
                client, plan, prompts, model=model, temperature=temperature, on_done=lambda outcome: progress.advance(bar)
            )


def summary_table(result: Report) -> Table:
    """Rates, shares and errors."""
    table = Table(title=f"{result.requests} requests in {result.duration_s:.1f} s", title_justify="left", show_header=False)
    table.add_column("figure")
    table.add_column("value", justify="right")
    limits = (("TTFT", result.targets.ttft_s), ("TPOT", result.targets.tpot_s))
    set_limits = ", ".join(f"{name} <= {limit_s * 1e3:g} ms" for name, limit_s in limits if limit_s is not None)
    goal = set_limits or "no targets: complete answers"
    table.add_row(f"goodput ({goal})", f"{result.goodput:.2f} req/s")
    table.add_row("attainment", f"{result.attainment:.1%}")
    table.add_row("completed", f"{result.completed} of {result.requests}, {result.requests_per_s:.2f} req/s")
    table.add_row("input tokens", f"{result.input_tokens:,}, {result.input_tokens_per_s:,.0f}/s")
    table.add_row("output tokens", f"{result.output_tokens:,}, {result.output_tokens_per_s:,.0f}/s")
    for name, count in result.errors.items():
        table.add_row(f"error: {name}", str(count))
    return table


def latency_table(result: Report) -> Table:
    """One row per latency, in milliseconds."""
    table = Table(title="Latency (ms)", title_justify="left")
    table.add_column("")
    for heading in ("p50", "p90", "p99", "mean", "max", "samples"):
        table.add_column(heading, justify="right")
    for name, spread in result.spreads.items():
        table.add_row(name.upper(), *_cells(spread))
    return table


def _cells(spread: Spread) -> list[str]:
    values = (spread.p50, spread.p90, spread.p99, spread.mean, spread.max)
    return [*(f"{seconds * 1e3:.1f}" for seconds in values), str(spread.count)]
