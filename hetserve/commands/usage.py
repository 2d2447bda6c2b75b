"""What several commands share: the options that name a server, where output goes, the error of using a command wrongly."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from hetserve.client import Client
from hetserve.exchange import DEFAULT_URL, Timeouts
from hetserve.retries import Retries

Url = Annotated[str | None, typer.Option("--url", envvar="HETSERVE_URL", help=f"The server; {DEFAULT_URL} if not given.")]
ApiKey = Annotated[str | None, typer.Option("--api-key", envvar="HETSERVE_API_KEY", help="The server's key, where it has one.")]


PIPED_WIDTH = 140


def console() -> Console:
    """Standard output. Where that is no terminal there is nothing to fit into, and names stay whole."""
    found = Console()
    return found if found.is_terminal else Console(width=PIPED_WIDTH)


class UsageError(Exception):
    """The command line cannot mean anything; says what to change."""


def connect(url: str | None, api_key: str | None, read_s: float = 10.0) -> Client:
    """A client for a command that a person waits for. Raises UsageError on a URL that is none."""
    try:
        return Client(url, api_key=api_key, timeouts=Timeouts(connect_s=3.0, read_s=read_s), retries=Retries(limit=1))
    except ValueError as error:
        raise UsageError(f"--url: {error}") from error
