"""What an engine says of its work, in its own words. Whoever puts it on a wire translates (the two roles, `instance.loop`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability of a drawn token and the most likely alternatives, best first: `(token, logprob)`."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy an engine is.

    Attributes:
        waiting, waiting_tokens: what is queued for blocks.
        running: sequences that run, or could but for the size of the batch.
        context_tokens: tokens of those.
        free_blocks: blocks that nobody owns.
        held_blocks: blocks kept for transfers; a shared block counts once for each sequence that keeps it.
        steps: steps completed since the start.
    """

    waiting: int = 0
    waiting_tokens: int = 0
    running: int = 0
    context_tokens: int = 0
    free_blocks: int = 0
    held_blocks: int = 0
    steps: int = 0
