"""`hetserve chat`: talk to a model in the terminal, of a running server or of a small cluster started here for it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from hetserve._app_path import use_app
from hetserve.client import Client
from hetserve.commands.interrupts import Interrupts
from hetserve.commands.usage import ApiKey, connect
from hetserve.conversation import Conversation
from hetserve.errors import APIError, StatusError
from hetserve.printable import printable
from hetserve.types import ChatOptions

READ_S = 120.0
DEMO_TEMPERATURE = 0.3
"""The model that comes with HetServe is small: at a server's usual 1.0 it wanders off."""
HINT = "/reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C ends an answer."

ReadLine = Callable[[], str | None]
"""The next line that was typed; None at the end of them."""


def chat(
    url: Annotated[
        str | None,
        typer.Option("--url", envvar="HETSERVE_URL", help="A running server; if not given, a small model is started here."),
    ] = None,
    api_key: ApiKey = None,
    model: Annotated[str | None, typer.Option(help="Which of the server's models.", show_default=False)] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before all else.", show_default=False)] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256,
    temperature: Annotated[
        float | None, typer.Option(min=0, help=f"If not the server's own; {DEMO_TEMPERATURE} without --url.", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The same seed, the same answers.", show_default=False)] = None,
) -> None:
    """Chat with a model, and see its answers as they are written.

    Without --url the small model that comes with HetServe is started here, and stopped at the end. From a pipe every line is a
    question, and the answers alone go to standard output.
    """
    options: ChatOptions = {"max_tokens": max_tokens}
    if temperature is None and url is None:
        temperature = DEMO_TEMPERATURE
    if temperature is not None:
        options["temperature"] = temperature
    if seed is not None:
        options["seed"] = seed
    out = Console(highlight=False)
    notes = Console(stderr=True, highlight=False)
    with Interrupts().installed() as interrupts, _server(url, api_key, notes, interrupts) as client:
        if sys.stdin.isatty():
            notes.print(f"[dim]{HINT}[/dim]")
        Chat(client, Conversation(system), out, notes, interrupts, model, options).run(_typed if sys.stdin.isatty() else _piped)


@dataclass
class Chat:
    """One conversation with one server: answers go to `out`, all else to `notes`."""

    client: Client
    conversation: Conversation
    out: Console
    notes: Console
    interrupts: Interrupts
    model: str | None
    options: ChatOptions

    def run(self, read: ReadLine) -> None:
        """Until there are no more lines, or `/quit`. Raises KeyboardInterrupt on SIGTERM."""
        while True:
            try:
                with self.interrupts.at_once():
                    line = read()
            except KeyboardInterrupt:
                self._go_on()
                self.notes.print(f"\n[dim]{HINT}[/dim]")
                continue
            if line is None or line.strip() == "/quit":
                return
            self._take(line.strip())

    def _take(self, line: str) -> None:
        if not line:
            return
        if line == "/reset":
            self.conversation.reset()
            self.notes.print("[dim]Forgotten.[/dim]")
        elif line.startswith("/") and line[1:].isalpha():
            self.notes.print(f"[dim]No such command. {HINT}[/dim]")
        else:
            self._answer(line)

    def _answer(self, question: str) -> None:
        """Ask, and keep the answer, or what there is of it. A question that got none is not kept."""
        self.conversation.ask(question)
        pieces: list[str] = []
        try:
            with self.interrupts.at_once():
                self._stream(pieces)
        except KeyboardInterrupt:
            self._go_on()
            self.notes.print("\n[dim]Interrupted.[/dim]")
        except APIError as error:
            self._error(error, begun=bool(pieces))
        else:
            self.out.print()
        if pieces:
            self.conversation.answered("".join(pieces))
        else:
            self.conversation.withdraw()

    def _stream(self, pieces: list[str]) -> None:
        """Forgets the oldest turns for as long as the conversation does not fit the model's context."""
        while True:
            try:
                stream = self.client.stream_chat(self.conversation.messages, model=self.model, **self.options)
                break
            except StatusError as error:
                if error.code != "context_length_exceeded" or not self.conversation.forget_oldest():
                    raise
                self.notes.print("[dim]The context is full: the oldest question and its answer are forgotten.[/dim]")
        with stream:
            for chunk in stream:
                if chunk.text:
                    pieces.append(chunk.text)
                    self.out.print(Text(printable(chunk.text)), end="", soft_wrap=True)

    def _error(self, error: APIError, begun: bool) -> None:
        if begun:
            self.out.print()
        self.notes.print(Text(f"{type(error).__name__}: {' '.join(str(error).split())}", "red"), soft_wrap=True)

    def _go_on(self) -> None:
        """After an interrupt: SIGTERM ends the chat, Ctrl-C does not."""
        if self.interrupts.terminated:
            raise KeyboardInterrupt
        self.interrupts.asked.clear()


@contextmanager
def _server(url: str | None, api_key: str | None, notes: Console, interrupts: Interrupts) -> Iterator[Client]:
    """A client of the server that was named, or of one that lives as long as this."""
    if url is not None:
        with connect(url, api_key, READ_S) as client:
            yield client
        return
    use_app()
    from cluster.launch import Cluster, Interrupted
    from hetserve.demo.here import hush, small_cluster

    hush()
    notes.print("[dim]Starting the model that comes with HetServe; --url takes a server that runs already.[/dim]")
    cluster = Cluster(small_cluster(None, decode=1), console=notes)
    try:
        cluster.start(interrupts.asked)
        with connect(cluster.url, None, READ_S) as client:
            yield client
    except Interrupted:
        raise KeyboardInterrupt from None
    finally:
        cluster.stop()


def _typed() -> str | None:
    import readline  # noqa: F401  # gives `input` its editing and its history

    try:
        return input("> ")
    except EOFError:
        print()
        return None


def _piped() -> str | None:
    return sys.stdin.readline() or None
