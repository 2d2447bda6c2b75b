"""What the two sides of a session agree on, checked alike by both, and by the fakes that stand in for them in tests. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from core.layout import KVLayout, Region, Span, needed

GRANT_BITS = 64
MAX_TAIL_BYTES = 32 * 1024


@dataclass(frozen=True, slots=True)
class Terms:
    """Which KV goes over in one session, and under what conditions. The receiving side makes them; the sending side learns them
    from a peer, and so may hold any: `check` them.

    Attributes:
        grant: the fencing number of the receiving side's room for it.
        attempt: whose KV it is.
        first_token, num_tokens: tokens `[first_token, num_tokens)` of its sequence go over. Those before are there already.
        lease_s: how long a side waits for a sign of life of the other.
        windowed: of each layer only what its sliding window still sees behind `num_tokens`.
    """

    grant: int
    attempt: str
    first_token: int
    num_tokens: int
    lease_s: float
    windowed: bool = False

    @property
    def tokens(self) -> Span:
        return Span(self.first_token, self.num_tokens)

    def needed(self, layout: KVLayout) -> tuple[Region, ...]:
        """What of it a rank of this layout must be given: see `core.layout.needed`."""
        return needed(layout, self.tokens, self.windowed)

    def check(self) -> None:
        """Raises ValueError unless there can be such a session."""
        if not 0 <= self.grant < 1 << GRANT_BITS:
            raise ValueError(f"Got grant = {self.grant} but expected {GRANT_BITS} bits")
        if not 0 <= self.first_token <= self.num_tokens:
            raise ValueError(f"Got first_token = {self.first_token} but expected it within [0, {self.num_tokens}]")
        if not (self.lease_s > 0 and math.isfinite(self.lease_s)):
            raise ValueError(f"Got lease_s = {self.lease_s} but expected a positive number of seconds")


def check_endpoints(endpoints: Sequence[str]) -> str:
    """Where the only rank of the receiving side listens. Raises ValueError if it has another number of them: this side would have
    to know which part of the KV goes where."""
    if len(endpoints) != 1:
        raise ValueError(f"Got {len(endpoints)} endpoints but expected that of one rank")
    return endpoints[0]


def check_room(layout: KVLayout, blocks: int, num_tokens: int) -> None:
    """Raises ValueError unless `num_tokens` tokens fit so many blocks."""
    if blocks < layout.blocks_for(num_tokens):
        raise ValueError(f"Got {num_tokens} tokens but expected them within {blocks} blocks")


def check_push(layout: KVLayout, layer: int, start: int, count: int) -> None:
    """Raises ValueError unless the layer is one of this rank's and the tokens can be a range."""
    if not layout.holds(layer) or start < 0 or count < 0:
        layers = layout.shard.layers
        raise ValueError(f"Got {layer = }, {start = }, {count = } but expected one of layers [{layers.start}, {layers.stop})")


def check_tail(tail: bytes) -> None:
    """Raises ValueError if the workers' tail is too long for a frame."""
    if len(tail) > MAX_TAIL_BYTES:
        raise ValueError(f"Got a tail of {len(tail)} bytes but expected at most {MAX_TAIL_BYTES}")
