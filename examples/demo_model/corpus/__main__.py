"""`python -m examples.demo_model.corpus`: print some of what the model reads."""

from __future__ import annotations

from itertools import islice
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from examples.demo_model.corpus import KINDS, Document, Split, documents, of_kind

_STYLES = {"system": "magenta", "user": "cyan", "assistant": ""}


def show(
    seed: Annotated[int, typer.Option(help="Another seed, other documents.")] = 0,
    kind: Annotated[
        str | None, typer.Option(help="One of " + ", ".join(kind.name for kind in KINDS) + "; all mixed if not given.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many.")] = 3,
    held_out: Annotated[bool, typer.Option("--held-out", help="Those that a model never reads in training.")] = False,
) -> None:
    """Print documents of the corpus."""
    split = Split.HELD_OUT if held_out else Split.TRAIN
    if kind is not None and kind not in {known.name for known in KINDS}:
        raise typer.BadParameter(f"expected one of {', '.join(known.name for known in KINDS)}", param_hint="--kind")
    console = Console(highlight=False, soft_wrap=True)
    for document in islice(documents(seed, split) if kind is None else of_kind(kind, seed, split), count):
        console.rule(Text(document.kind, style="dim"), style="dim")
        console.print(_shown(document))


def _shown(document: Document) -> Text:
    if not document.messages:
        return Text(document.text)
    lines = [
        Text.assemble((f"{message.role}: ", "dim"), (message.content, _STYLES[message.role])) for message in document.messages
    ]
    return Text("\n").join(lines)


if __name__ == "__main__":
    typer.run(show)
