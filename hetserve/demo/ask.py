"""Asks, and follows the answers as they stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from rich.console import Console

from hetserve.client import Client
from hetserve.demo.report import Served, problem_of
from hetserve.demo.script import Scene
from hetserve.demo.typist import Typist
from hetserve.errors import APIError
from hetserve.streams import Stream
from hetserve.types import Message, Trace, Usage

OnPiece = Callable[[Stream, int, Typist], None]
"""Called after each piece of an answer with its stream, the tokens received so far, and who writes it."""


def ask_all(console: Console, client: Client, scenes: Sequence[Scene]) -> list[Served]:
    """Ask one after the other. A conversation that goes on keeps what was said."""
    served: list[Served] = []
    said: tuple[Message, ...] = ()
    for scene in scenes:
        messages = scene.messages(said)
        served.append(ask(console, client, scene, messages))
        said = (*messages, {"role": "assistant", "content": served[-1].text}) if scene.chat else ()
    return served


def ask(
    console: Console, client: Client, scene: Scene, messages: Sequence[Message] = (), on_piece: OnPiece | None = None
) -> Served:
    """Ask, print the answer as it comes, and say what it met with. An error of the server is part of that."""
    console.print(f"\n[bold]> {scene.prompt.strip()}[/bold]")
    typist = Typist(console)
    try:
        return _follow(_begin(client, scene, messages), scene.name, typist, on_piece)
    except APIError as error:
        return Served(scene.name, error=f"{type(error).__name__}: {error}")
    finally:
        typist.end()


def _begin(client: Client, scene: Scene, messages: Sequence[Message]) -> Callable[[], Stream]:
    if scene.chat:
        asked = messages or scene.messages(())
        return lambda: client.stream_chat(asked, model="demo", trace=True, **scene.sampling)
    return lambda: client.stream_completions(scene.prompt, model="demo", trace=True, **scene.sampling)


def _follow(begin: Callable[[], Stream], name: str, typist: Typist, on_piece: OnPiece | None) -> Served:
    began_s = time.monotonic()
    pieces: list[str] = []
    ids: list[int] = []
    stamps: list[float] = []
    usage: Usage | None = None
    trace: Trace | None = None
    with begin() as stream:
        for chunk in stream:
            for choice in chunk.choices[:1]:
                ids += choice.token_ids or ()
            if chunk.text:
                stamps.append(time.monotonic())
                pieces.append(chunk.text)
                typist.write(chunk.text)
                if on_piece is not None:
                    on_piece(stream, len(ids), typist)
            usage, trace = chunk.usage or usage, chunk.trace or trace
    text = "".join(pieces)
    return Served(
        name=name,
        text=text,
        token_ids=tuple(ids),
        prompt_tokens=usage.prompt_tokens if usage else 0,
        ttft_s=stamps[0] - began_s if stamps else None,
        stamps=tuple(stamps),
        trace=trace,
        error=problem_of(trace, text, len(ids)),
    )
