"""What a client asked for, as the router and the journal see it: tokens, sampling, targets. No text, no HTTP."""

from __future__ import annotations

from enum import Enum

import msgspec

from core.sampling import SamplingParams
from core.slo import SLO


class FinishReason(Enum):
    """Why a generation ended, with OpenAI's spelling."""

    STOP = "stop"
    LENGTH = "length"


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One generation to serve. A client's `n = 4` is four of these.

    `request_id` is made by the server. `salt` separates tenants in every prefix cache.
    """

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    slo: SLO = SLO()
    salt: bytes = b""
    arrived_s: float = 0.0

    @property
    def max_context_tokens(self) -> int:
        return len(self.prompt) + self.sampling.max_tokens
