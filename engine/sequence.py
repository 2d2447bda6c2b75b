"""One generation inside an engine: its tokens, how far its KV is computed, and which blocks hold it.

WAITING ──▶ RUNNING ──▶ FINISHED
   ▲           │ │
   └─preempted─┘ └──▶ HELD   (prefill role: first token drawn, KV kept until `Engine.release`)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from core.request import FinishReason
from core.sampling import SamplingParams
from engine.results import TokenLogprobs


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    HELD = "held"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """Mutable state of one generation; owned by one engine thread.

    Attributes:
        sequence_id: the attempt's id.
        tokens: prompt and output, one list.
        prompt_tokens: how many of `tokens` are the prompt; the rest are output, including output that an earlier attempt
            already delivered.
        computed_tokens: tokens whose KV is in the cache, always `<= len(tokens)`. A sequence that decodes has
            `computed_tokens == len(tokens) - 1` before a step: the newest token's KV is not computed yet.
        blocks: block ids, in order of position. Enough for `computed_tokens` plus whatever is scheduled.
        hold: keep KV after the first drawn token instead of decoding on (prefill role).
        cached_tokens: how many prompt tokens the prefix cache supplied at first admission.
    """

    sequence_id: str
    tokens: list[int]
    prompt_tokens: int
    sampling: SamplingParams
    salt: bytes = b""
    hold: bool = False
    arrived_s: float = 0.0
    started_s: float | None = None
    first_token_s: float | None = None
    status: Status = Status.WAITING
    computed_tokens: int = 0
    cached_tokens: int = 0
    blocks: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    preemptions: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.prompt_tokens <= len(self.tokens):
            raise ValueError(f"Got {self.prompt_tokens = } but expected 1 to {len(self.tokens)}")

    @property
    def output_tokens(self) -> int:
        """How many output tokens there are, which is also the output position of the next one."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def uncomputed_tokens(self) -> int:
        return len(self.tokens) - self.computed_tokens


@dataclass(frozen=True)
class NewToken:
    """One drawn token. `finish` is set on the last of a generation; `stop_token` when a stop id ended it."""

    sequence: Sequence
    token: int
    position: int
    logprobs: TokenLogprobs | None = None
    finish: FinishReason | None = None
    stop_token: int | None = None
