"""One thing that is true of HetServe, the ways to ask for it and the ways to say it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """`term`: what it defines, as it is said within a question ("prefill", "a KV cache"); empty where it defines nothing.
    `asked`: further questions, the likeliest first. `answers`: the first one is a single sentence."""

    name: str
    term: str
    asked: tuple[str, ...]
    answers: tuple[str, ...]
