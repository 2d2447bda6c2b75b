"""What the life cycle of generations has decided, to be carried out in order."""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import HetServeError
from gateway.serving.generation import Attempt, Generation
from gateway.text.token_reader import Delta


@dataclass(frozen=True, slots=True)
class Launch:
    """Listen for the attempt, and submit it to its workers."""

    generation: Generation
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Stop:
    """Tell the attempt's workers to end it."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Fence:
    """Take no more of the attempt, and say when that is so (`Fenced`). It failed with `error`; another one will follow."""

    attempt: Attempt
    error: HetServeError


@dataclass(frozen=True, slots=True)
class Close:
    """Take no more of the attempt."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Deliver:
    """Give `delta` to the client; its tokens came `gap_s` after the last ones, None for the first."""

    generation: Generation
    delta: Delta
    gap_s: float | None


@dataclass(frozen=True, slots=True)
class End:
    """The generation is over, as its entry says; `error` is what the client is told if it failed."""

    generation: Generation
    error: HetServeError | None


Action = Launch | Stop | Fence | Close | Deliver | End
