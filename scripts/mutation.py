"""Breaks one line at a time and asks whether a test notices: mutation testing of the files that `mutation.toml` names.

    pip install cosmic-ray
    python scripts/mutation.py --sample 300 --seed 1 --json mutants.json

Cosmic Ray makes the mutants; this draws a sample of places, evenly over all files, and one mutant at each, so that an operator
with many variants counts no more than others. Type annotations are left out: nothing evaluates them. Each job works on a copy
of the tree. Exits with 1 if fewer than `--least` of the sample were noticed.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shlex
import shutil
import sys
import tempfile
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis", "dist")


@dataclass(frozen=True)
class Mutant:
    """One change to one line. `tests` are the paths that should notice it."""

    module: str
    operator: str
    occurrence: int
    line: int
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """`outcome` is `killed`, `survived`, `incompetent` (it does not even import), or `broken` when the tool itself failed."""

    mutant: Mutant
    outcome: str
    diff: str


def main() -> int:
    options = _options()
    console = Console()
    targets = tomllib.loads((ROOT / options.config).read_text(encoding="utf-8"))["target"]
    sample = draw_sample(targets, options.sample, options.seed)
    with tempfile.TemporaryDirectory() as scratch, Progress(*Progress.get_default_columns()[:-1], MofNCompleteColumn(),
                                                            TimeRemainingColumn(), console=console) as progress:  # fmt: skip
        task = progress.add_task("mutants", total=len(sample))
        verdicts = []
        with ProcessPoolExecutor(options.jobs, initializer=_move_into_copy, initargs=(scratch,)) as pool:
            for done in as_completed([pool.submit(_try, mutant, options.timeout_s) for mutant in sample]):
                verdicts.append(done.result())
                progress.advance(task)
    verdicts.sort(key=lambda verdict: (verdict.mutant.module, verdict.mutant.line))
    console.print(_table(verdicts, options))
    for verdict in verdicts:
        if verdict.outcome != "killed" and verdict.outcome != "incompetent":
            console.print(f"[bold]{verdict.mutant.module}:{verdict.mutant.line}[/] {verdict.outcome}", highlight=False)
            console.print(verdict.diff, markup=False, highlight=False)
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(verdict) for verdict in verdicts], indent=1) + "\n", encoding="utf-8")
    return 0 if _share(verdicts) >= options.least else 1


def draw_sample(targets: list[dict[str, list[str]]], count: int, seed: int) -> list[Mutant]:
    """`count` mutants, one at each of as many places, the same for the same seed and sources."""
    places: defaultdict[tuple[str, int, int], list[Mutant]] = defaultdict(list)
    for target in targets:
        for module in target["modules"]:
            for column, mutant in _mutants_of(module, tuple(target["tests"])):
                places[module, mutant.line, column].append(mutant)
    dice = random.Random(seed)
    chosen = dice.sample(sorted(places), min(count, len(places)))
    return [dice.choice(places[place]) for place in chosen]


def _mutants_of(module: str, tests: tuple[str, ...]) -> Iterator[tuple[int, Mutant]]:
    try:
        from cosmic_ray.commands.init import init
        from cosmic_ray.work_db import WorkDB
    except ImportError:
        raise SystemExit("mutation testing needs Cosmic Ray: pip install cosmic-ray") from None
    annotations = _annotation_lines(ROOT / module)
    with tempfile.TemporaryDirectory() as scratch:
        session = WorkDB(Path(scratch) / "session.sqlite", WorkDB.Mode.create)
        init([ROOT / module], session, {})
        for item in session.work_items:
            spec = item.mutations[0]
            (line, column), end = spec.start_pos, spec.end_pos
            if not any(start <= (line, column) and end <= stop for start, stop in annotations):
                yield column, Mutant(module, spec.operator_name, spec.occurrence, line, tests)
        session.close()


def _annotation_lines(path: Path) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where the type annotations of a file stand."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for name in ("annotation", "returns"):
            part = getattr(node, name, None)
            if isinstance(part, ast.expr) and part.end_lineno is not None and part.end_col_offset is not None:
                found.append(((part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)))
    return found


def _move_into_copy(scratch: str) -> None:
    copy = Path(scratch) / str(os.getpid())
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    os.chdir(copy)


def _try(mutant: Mutant, timeout_s: float) -> Verdict:
    """Run the mutant's tests in this job's copy."""
    from cosmic_ray.mutating import mutate_and_test
    from cosmic_ray.work_item import MutationSpec

    spec = MutationSpec(Path(mutant.module), mutant.operator, mutant.occurrence, (1, 0), (2, 0))
    tests = " ".join(map(shlex.quote, mutant.tests))
    command = f"env PYTHONPATH={shlex.quote(os.getcwd())} OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1"
    result = mutate_and_test([spec], f"{command} {sys.executable} -m pytest -x -q -p no:cacheprovider {tests}", timeout_s)
    outcome = "broken" if result.test_outcome is None else result.test_outcome.value
    return Verdict(mutant, outcome, result.diff or result.output or "")


def _share(verdicts: list[Verdict]) -> float:
    return sum(verdict.outcome in ("killed", "incompetent") for verdict in verdicts) / max(1, len(verdicts))


def _table(verdicts: list[Verdict], options: argparse.Namespace) -> Table:
    table = Table(title=f"{len(verdicts)} mutants, seed {options.seed}: {_share(verdicts):.0%} noticed", title_justify="left")
    table.add_column("file")
    for column in ("mutants", "noticed", "survived", "broken"):
        table.add_column(column, justify="right")
    by_module: defaultdict[str, list[str]] = defaultdict(list)
    for verdict in verdicts:
        by_module[verdict.mutant.module].append(verdict.outcome)
    for module, outcomes in by_module.items():
        noticed = sum(outcome in ("killed", "incompetent") for outcome in outcomes)
        table.add_row(module, *map(str, (len(outcomes), noticed, outcomes.count("survived"), outcomes.count("broken"))))
    return table


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout-s", type=float, default=300.0, help="a mutant that runs longer counts as noticed")
    parser.add_argument("--least", type=float, default=0.85, help="share that must be noticed")
    parser.add_argument("--config", default="mutation.toml")
    parser.add_argument("--json", default=None, help="also write every verdict to this file")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
