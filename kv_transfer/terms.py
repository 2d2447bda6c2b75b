"""What a grant may say, checked alike by both sides, and by the fakes that stand in for them in tests. Pure."""

from __future__ import annotations

import math

from core.layout import KVLayout

GRANT_BITS = 64
MAX_TAIL_BYTES = 32 * 1024


def check_terms(grant: int, first_token: int, num_tokens: int, lease_s: float) -> None:
    """Raises ValueError unless a transfer of tokens `[first_token, num_tokens)` under this number and lease can be."""
    if not 0 <= grant < 1 << GRANT_BITS:
        raise ValueError(f"Got {grant = } but expected {GRANT_BITS} bits")
    if not 0 <= first_token <= num_tokens:
        raise ValueError(f"Got {first_token = } but expected it within [0, {num_tokens}]")
    if not (lease_s > 0 and math.isfinite(lease_s)):
        raise ValueError(f"Got {lease_s = } but expected a positive number of seconds")


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
