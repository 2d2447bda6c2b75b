"""What the two sides of a session agree on, checked alike by both, and by the fakes that stand in for them in tests. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from core.groups import NO_BLOCK, LayerGroups, Tables
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


def check_endpoints(endpoints: tuple[str, ...]) -> str:
    """Where the only rank of the receiving side listens. Raises ValueError if it has another number of them: this side would have
    to know which part of the KV goes where."""
    if len(endpoints) != 1:
        raise ValueError(f"Got {len(endpoints)} endpoints but expected that of one rank")
    return endpoints[0]


def check_tables(tables: Tables, groups: LayerGroups) -> None:
    """Raises ValueError unless there is a block table for each group."""
    if len(tables) != len(groups.groups):
        raise ValueError(f"Got {len(tables)} block tables but expected one for each of {len(groups.groups)} groups of layers")


def check_blocks(layout: KVLayout, table: Sequence[int], tokens: Span) -> None:
    """Raises ValueError unless `table` has blocks for all of `tokens`."""
    stop = layout.blocks_for(tokens.stop)
    if len(table) < stop:
        raise ValueError(f"Got {tokens.stop} tokens but expected them within {len(table)} blocks")
    if tokens.size and NO_BLOCK in table[tokens.start // layout.block_size : stop]:
        raise ValueError(f"Got tokens [{tokens.start}, {tokens.stop}) but blocks of some of them were given back")


def check_room(layout: KVLayout, groups: LayerGroups, tables: Tables, terms: Terms) -> None:
    """Raises ValueError unless `tables` have blocks for all that goes over under `terms`."""
    check_tables(tables, groups)
    first = {region.layers.start: region.tokens.start for region in terms.needed(layout)}
    for group, table in zip(groups.groups, tables, strict=True):
        check_blocks(layout, table, Span(min(first[layer] for layer in group.layers), terms.num_tokens))


def check_kept(groups: LayerGroups, terms: Terms) -> None:
    """Raises ValueError if a sender with these groups has given back what it would have to send."""
    if groups.windowed and not terms.windowed:
        raise ValueError("all KV of every layer is wanted but only what sliding windows see is kept here")


def check_push(layout: KVLayout, layer: int, start: int, count: int) -> None:
    """Raises ValueError unless the layer is one of this rank's and the tokens can be a range."""
    if not layout.holds(layer) or start < 0 or count < 0:
        layers = layout.shard.layers
        raise ValueError(f"Got {layer = }, {start = }, {count = } but expected one of layers [{layers.start}, {layers.stop})")


def check_tail(tail: bytes) -> None:
    """Raises ValueError if the workers' tail is too long for a frame."""
    if len(tail) > MAX_TAIL_BYTES:
        raise ValueError(f"Got a tail of {len(tail)} bytes but expected at most {MAX_TAIL_BYTES}")
