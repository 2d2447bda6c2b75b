"""`hetserve status`: the cluster as its gateway sees it, live."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hetserve.commands.usage import ApiKey, Url, connect, console
from hetserve.types import Instance

STYLES = {"ready": "green", "draining": "yellow", "stuck": "red"}


def status(
    url: Url = None,
    api_key: ApiKey = None,
    once: Annotated[bool, typer.Option("--once", help="Print one table and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and end.")] = False,
    interval_s: Annotated[float, typer.Option("--interval", min=0.1, help="Seconds between refreshes.")] = 1.0,
) -> None:
    """Show the instances of a running cluster. Live until interrupted; once where there is no terminal."""
    out = console()
    with connect(url, api_key) as client:
        instances = client.instances()
        if as_json:
            typer.echo(json.dumps([dict(instance.raw) for instance in instances], indent=2))
            return
        if once or not out.is_terminal:
            out.print(instances_table(instances))
            return
        try:
            with Live(instances_table(instances), console=out, auto_refresh=False) as live:
                while True:
                    time.sleep(interval_s)
                    live.update(instances_table(client.instances()), refresh=True)
        except KeyboardInterrupt:
            return


def instances_table(instances: Sequence[Instance]) -> Table:
    """One row per instance, by role and name: sequences that run and wait, prompt tokens that queue, tokens of context held,
    share of the KV cache in use, incarnation, and how long ago it was heard of."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("instance", "role", "on", "state"):
        table.add_column(heading, no_wrap=True)
    for heading in ("run", "wait", "queued", "context", "KV", "inc", "seen"):
        table.add_column(heading, justify="right", no_wrap=True)
    for item in sorted(instances, key=lambda item: (item.role, item.name)):
        table.add_row(
            item.name,
            item.role,
            f"{item.accelerator} {item.node}".strip(),
            Text(item.state, style=STYLES.get(item.state, "")),
            str(item.running),
            str(item.waiting),
            str(item.waiting_tokens),
            str(item.context_tokens),
            f"{item.kv_used:.0%}",
            str(item.incarnation),
            f"{item.last_seen_s:.1f} s",
        )
    return table
