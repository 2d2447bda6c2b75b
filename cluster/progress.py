"""What a person sees while the cluster starts, and the table of where the time went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from cluster.controller import MemberView
from cluster.reconciler import Phase

STYLES = {Phase.ABSENT: "dim", Phase.STARTING: "yellow", Phase.READY: "green", Phase.GIVEN_UP: "red"}


class Progress:
    """Shows members as they come up: a live table on a terminal, one line per change anywhere else."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, transient=True, refresh_per_second=8) if console.is_terminal else None
        self._shown: dict[str, tuple[int, Phase]] = {}

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def note(self, text: str) -> None:
        """One line about what is going on."""
        if self._live is not None:
            self._live.update(Spinner("dots", text))
        else:
            self._console.print(text)

    def show(self, members: Sequence[MemberView], now_s: float) -> None:
        if self._live is not None:
            self._live.update(_members_table(members, now_s))
            return
        for member in members:
            state = (member.incarnation, member.phase)
            if self._shown.get(member.name) != state:
                self._shown[member.name] = state
                if member.phase is not Phase.ABSENT:
                    self._console.print(_line(member), highlight=False, soft_wrap=True)


def _line(member: MemberView) -> str:
    where = f" on {member.node} ({member.accelerator})" if member.node else ""
    took = f" after {sum(member.seconds.values()):.1f} s" if member.phase is Phase.READY else ""
    why = f": {member.reason}" if member.phase is Phase.GIVEN_UP else ""
    return f"{member.name}{where}: {member.phase.value}{took}{why}"


def _members_table(members: Sequence[MemberView], now_s: float) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("member", "node", "accelerator", "state", "seconds"):
        table.add_column(heading, justify="right" if heading == "seconds" else "left")
    for member in members:
        took_s = sum(member.seconds.values()) if member.phase is Phase.READY else now_s - member.since_s
        state = Text(member.phase.value, style=STYLES[member.phase])
        table.add_row(member.name, member.node, member.accelerator, state, f"{took_s:.1f}")
    return table


def breakdown(stages: Mapping[str, float], members: Sequence[MemberView], total_s: float) -> Table:
    """Seconds by stage: what the launcher did itself, then a row per member. Members start side by side."""
    own = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in stages.items())
    table = Table(title=f"Started in {total_s:.1f} s ({own}; members side by side)", title_justify="left")
    columns = list(dict.fromkeys(stage for member in members for stage in member.seconds))
    table.add_column("member")
    table.add_column("node")
    table.add_column("accelerator")
    for column in columns:
        table.add_column(column, justify="right")
    table.add_column("total s", justify="right")
    for member in members:
        cells = [f"{member.seconds[column]:.2f}" if column in member.seconds else "" for column in columns]
        table.add_row(member.name, member.node, member.accelerator, *cells, f"{sum(member.seconds.values()):.2f}")
    return table
