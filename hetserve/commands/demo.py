"""`hetserve demo`: the whole thing on one machine in a minute, proved by its own figures."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from hetserve._app_path import use_app
from hetserve.client import Client
from hetserve.commands.interrupts import Interrupts
from hetserve.commands.usage import UsageError
from hetserve.demo.ask import ask, ask_all
from hetserve.demo.here import children, hush, left_over, small_cluster
from hetserve.demo.report import Kill, Served, kill_problem, kill_story, served_table, size
from hetserve.demo.script import Scene, at_random, in_words
from hetserve.exchange import Timeouts

if TYPE_CHECKING:
    import psutil

    from cluster.launch import Cluster

MADE_HERE = ".random"
"""Marks a folder of random weights that is complete: one left half made is made again."""
DECODE_INSTANCES = 2
"""One to be killed, and one that goes on at once: a replacement needs seconds to load."""
TRANSCRIPT_WIDTH = 100
KILL_AT = (0.35, 0.15, 0.0)
"""The share of an answer after which its process is killed; earlier, if the answer was over before that could be done."""


@dataclass
class Outcome:
    """What came of a run. `kill` is None when nobody was killed, `left` are the processes that outlived the stop."""

    served: list[Served] = field(default_factory=list)
    killed: Served | None = None
    kill: Kill | None = None
    left: list[psutil.Process] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """One line each; the demo fails when there are any."""
        found = [f"still running: {process}" for process in self.left]
        found += [f"{item.name}: {item.error}" for item in self.served if item.error is not None]
        if self.killed is None:
            return found or ["nobody was killed"]
        problem = kill_problem(self.kill, self.killed, self.served[0])
        return found if problem is None else [*found, f"{self.killed.name}: {problem}"]


def demo(
    model: Annotated[
        Path | None, typer.Option(help="A model's folder, in place of the one that comes with HetServe.", file_okay=False)
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Random weights of this size, for speed: tiny, 15m, 125m, 1b or 8b.", show_default=False)
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where random weights are made, once.", file_okay=False)] = Path(".demo"),
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Most tokens of an answer, if not what suits it.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    transcript: Annotated[
        Path | None, typer.Option(help="Keep what was shown: a picture where it ends in .svg, else text.", dir_okay=False)
    ] = None,
) -> None:
    """Start a cluster here, ask a model things, show how each answer was served, kill a process in the middle of one, clean up.

    Fails unless every answer was read by one instance and written by another, the one that lost its process is the same to the
    token as without, and nothing is left running.
    """
    if model is not None and size is not None:
        raise UsageError("give --model or --size, not both")
    console = _console(transcript is not None)
    use_app()
    hush()
    chosen = model if size is None else _random_model(console, folder, size)
    scenes = in_words(seed, max_tokens) if chosen is None else at_random(seed, max_tokens)
    with Interrupts().installed() as interrupts:
        outcome = _run(console, chosen, scenes, interrupts)
    _conclude(console, outcome)
    if transcript is not None:
        _keep(console, transcript)
    if outcome.problems:
        raise typer.Exit(1)


def _run(console: Console, model: Path | None, scenes: tuple[Scene, ...], interrupts: Interrupts) -> Outcome:
    """Start, ask, kill, stop. Raises KeyboardInterrupt when told to end, after everything was stopped."""
    from cluster.launch import Cluster, Interrupted

    console.rule(f"1. Start: one prefill and {DECODE_INSTANCES} decode instances on Ray")
    cluster = Cluster(small_cluster(model, DECODE_INSTANCES), console=console)
    outcome = Outcome()
    processes: list[psutil.Process] = []
    try:
        cluster.start(interrupts.asked)
        processes = children()
        console.print(f"Ready in {cluster.total_s:.1f} s at {cluster.url}, with OpenAI's API.")
        with interrupts.at_once(), Client(cluster.url, timeouts=Timeouts(read_s=120.0)) as client:
            _show(console, cluster, client, scenes, outcome, made_here=model is not None and (model / MADE_HERE).exists())
    except Interrupted:
        raise KeyboardInterrupt from None
    finally:
        console.print("Stopping.")
        cluster.stop()
    outcome.left = left_over(processes)
    return outcome


def _show(
    console: Console, cluster: Cluster, client: Client, scenes: tuple[Scene, ...], outcome: Outcome, made_here: bool
) -> None:
    console.rule("2. Ask")
    if made_here:
        console.print("[dim]The weights are random: what follows is gibberish, and so it should be.[/dim]")
    outcome.served = ask_all(console, client, scenes)
    console.rule("3. How it was served")
    console.print(served_table(outcome.served))
    unfailed = outcome.served[0]
    if unfailed.error is not None:
        return
    console.rule("4. A process dies in the middle of an answer")
    console.print("[dim]The first question again. Whoever writes the answer is killed while it does.[/dim]")
    outcome.killed, outcome.kill = _kill_one(console, cluster, client, scenes[0], unfailed)
    if outcome.kill is not None and kill_problem(outcome.kill, outcome.killed, unfailed) is None:
        console.print()
        console.print(kill_story(outcome.kill, outcome.killed))


def _kill_one(console: Console, cluster: Cluster, client: Client, scene: Scene, unfailed: Served) -> tuple[Served, Kill | None]:
    """Ask again what gave the `unfailed` answer, and kill who writes it."""
    from hetserve.demo.drill import Drill

    after = [max(2, round(share * unfailed.tokens)) for share in KILL_AT]
    for tokens in after:
        drill = Drill(client, lambda name: _pid(cluster, name), tokens)
        killed = ask(console, client, scene, on_piece=drill)
        kill = drill.confirm()
        if kill is not None or killed.error is not None:
            break
    return killed, kill


def _console(keeps: bool) -> Console:
    """One that keeps what it shows does without what moves on a terminal."""
    if keeps:
        return Console(highlight=False, record=True, width=TRANSCRIPT_WIDTH, force_terminal=False)
    return Console(highlight=False)


def _pid(cluster: Cluster, name: str) -> int | None:
    return next((member.pid for member in cluster.instances() if member.name == name), None)


def _conclude(console: Console, outcome: Outcome) -> None:
    for problem in outcome.problems:
        console.print(Text(problem, "red"))
    if outcome.problems:
        return
    moved = sum(item.trace.kv_bytes for item in outcome.served if item.trace is not None)
    console.print(
        f"[green]All {len(outcome.served)} answers were prefilled on one instance and decoded on another; {size(moved)} of KV "
        "moved. One instance died in the middle of an answer, and nobody could tell from it. Nothing was left running.[/green]"
    )


def _keep(console: Console, transcript: Path) -> None:
    if transcript.suffix == ".svg":
        console.save_svg(str(transcript), title="hetserve demo")
    else:
        console.save_text(str(transcript))


def _random_model(console: Console, folder: Path, size: str) -> Path:
    made = folder / f"llama-{size}"
    done = made / MADE_HERE
    if not done.exists():
        began_s = time.monotonic()
        from transformers.utils.logging import disable_progress_bar

        from tooling.model_factory import make_model

        disable_progress_bar()
        make_model(made, "llama", size=size, dtype="float32", seed=0)
        done.touch()
        console.print(f"Made a random {size} Llama in {made} ({time.monotonic() - began_s:.1f} s).")
    return made
