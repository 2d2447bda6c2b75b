"""One generation inside an engine: its tokens, how far its KV is computed, and which blocks hold it.

WAITING ──▶ RUNNING ──▶ FINISHED
   ▲           │ │
   │ preempted │ └──▶ HELD   (prefill role: first token drawn, KV kept until `Engine.cancel`)
   └───────────┴────────┘    (from HELD only while the other engine has no room for it: `Engine.pin`)

WAITING ──▶ RESERVED ──▶ READY ──▶ RUNNING   (decode role: KV comes in, is here, is read)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import msgspec

from core.request import FinishReason
from core.sampling import SamplingParams
from engine.plan import Drawn
from engine.results import TokenLogprobs


class Status(Enum):
    WAITING = "waiting"
    RESERVED = "reserved"
    READY = "ready"
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
        launched_tokens: tokens whose KV is in the cache or will be, once all launched steps are done.
        pending_tokens: tokens that launched steps draw, not known yet. They follow `tokens`.
        last_step: number of the last launched step that computes something of it; 0 if there was none.
        tenancy: goes up whenever its blocks are freed. What a step computes for an earlier tenancy is void.
        tables: block ids in order of position, one list per group of layers (`core.groups`), each long enough for
            `launched_tokens`; `NO_BLOCK` where nothing is kept. No lists at all while it owns nothing.
        matched_blocks: how many of them in each table, from the first, the prefix cache supplied.
        hold: keep KV after the first drawn token instead of decoding on (prefill role).
        ticket: age of the request among all of the cluster, smaller is older; 0 where nobody gave it one.
        incoming: its KV comes from elsewhere. A claim on blocks and nothing else, until they are filled.
        pinned: with `hold`, that the other engine has room for it, so that it keeps its blocks to its end.
        first: with `hold`, what was drawn; kept when the blocks are lost, because the token was emitted.
        cached_tokens: how many prompt tokens the prefix cache supplied at first admission.
    """

    sequence_id: str
    tokens: list[int]
    prompt_tokens: int
    sampling: SamplingParams
    salt: bytes = b""
    hold: bool = False
    ticket: int = 0
    arrived_s: float = 0.0
    started_s: float | None = None
    first_token_s: float | None = None
    status: Status = Status.WAITING
    computed_tokens: int = 0
    launched_tokens: int = 0
    pending_tokens: int = 0
    last_step: int = 0
    tenancy: int = 0
    cached_tokens: int = 0
    tables: list[list[int]] = field(default_factory=list)
    matched_blocks: int = 0
    block_hashes: list[bytes] = field(default_factory=list)
    preemptions: int = 0
    incoming: bool = False
    pinned: bool = False
    first: Drawn | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.prompt_tokens <= len(self.tokens):
            raise ValueError(f"Got {self.prompt_tokens = } but expected 1 to {len(self.tokens)}")

    @property
    def output_tokens(self) -> int:
        """How many output tokens there are, which is also the output position of the next one."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def total_tokens(self) -> int:
        """How many tokens there will be, once all launched steps are done."""
        return len(self.tokens) + self.pending_tokens

    @property
    def most_tokens(self) -> int:
        """Of how many tokens there can ever be KV here: the last that is drawn is never computed."""
        if self.hold:
            return len(self.tokens)
        return max(len(self.tokens), self.prompt_tokens + self.sampling.max_tokens - 1)

    @property
    def unlaunched_tokens(self) -> int:
        """How many of those have yet to be computed, by steps to come. One in a sequence that decodes."""
        return len(self.tokens) + self.pending_tokens - self.launched_tokens

    @property
    def drawn_out(self) -> bool:
        """Whether a launched step draws its last token here: the first with `hold`, else that which reaches `max_tokens`."""
        if self.pending_tokens == 0:
            return False
        return self.hold or self.total_tokens - self.prompt_tokens >= self.sampling.max_tokens


class NewToken(msgspec.Struct, frozen=True, eq=False, gc=False):
    """One drawn token. `finish` is set on the last of a generation; `stop_token` when a stop id ended it."""

    sequence: Sequence
    token: int
    position: int
    logprobs: TokenLogprobs | None = None
    finish: FinishReason | None = None
    stop_token: int | None = None
