from __future__ import annotations

import io

from rich.console import Console

from cluster.controller import MemberView
from cluster.progress import Progress, breakdown
from cluster.reconciler import Phase


def view(phase: Phase, **more: object) -> MemberView:
    return MemberView("decode-0", "decode", 1, phase, 0.0, "nodeA", "L40S", **more)


def test_without_a_terminal_each_change_is_one_line() -> None:
    out = io.StringIO()
    with Progress(Console(file=out, width=200)) as progress:
        progress.show([view(Phase.STARTING)], 0.0)
        progress.show([view(Phase.STARTING)], 1.0)
        progress.show([view(Phase.READY, seconds={"process": 1.0, "load": 2.0})], 3.0)
        progress.show([view(Phase.GIVEN_UP, reason="no memory")], 4.0)
    assert out.getvalue().splitlines() == [
        "decode-0 on nodeA (L40S): starting",
        "decode-0 on nodeA (L40S): ready after 3.0 s",
        "decode-0 on nodeA (L40S): given up: no memory",
    ]


def test_a_terminal_gets_a_table_that_is_gone_afterwards() -> None:
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True)
    with Progress(console) as progress:
        progress.note("Starting Ray")
        progress.show([view(Phase.STARTING)], 2.5)
    assert "decode-0" in out.getvalue()
    assert out.getvalue().rstrip().endswith("\x1b[2K"), "the live table must erase itself"


def test_the_breakdown_has_a_column_for_every_stage_of_anybody() -> None:
    out = io.StringIO()
    members = [
        view(Phase.READY, seconds={"process": 1.25, "imports": 0.5}),
        MemberView("gateway", "gateway", 1, Phase.READY, 0.0, seconds={"process": 1.0, "tokenizer": 2.0}),
    ]
    Console(file=out, width=200).print(breakdown({"start ray": 3.0}, members, 6.5))
    text = out.getvalue()
    assert "Started in 6.5 s (start ray 3.0" in text
    for heading in ("process", "imports", "tokenizer", "total s"):
        assert heading in text
    assert "1.25" in text
    assert "3.00" in text
