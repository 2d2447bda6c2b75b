"""What a KV cache looks like, in words that any two engines can compare.

`KVLayout` is all that `engine` and `kv_transfer` share. It says what the *model* defines (layers, heads, sizes, dtype);
the block size is each engine's own, because the wire speaks in token ranges, never in blocks.
"""

from __future__ import annotations

import msgspec

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class LayerShape(msgspec.Struct, frozen=True):
    """One layer's cache per token: `kv_heads * key_dim` and `kv_heads * value_dim` elements."""

    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def elements(self) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim)


class KVLayout(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of one token's KV over all layers.

    Attributes:
        layers: one shape per attention layer, in order of `layer_idx`.
        dtype: name of the stored element type, a key of `DTYPE_BYTES`.
        block_size: tokens in a block of *this* engine. Two peers may differ in it.
    """

    layers: tuple[LayerShape, ...]
    dtype: str
    block_size: int

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"Got {self.dtype = } but expected one of {sorted(DTYPE_BYTES)}")
        if self.block_size < 1 or not self.layers:
            raise ValueError(f"Got {self.block_size = }, {len(self.layers)} layers but expected at least one of each")

    def layer_bytes_per_token(self, layer: int) -> int:
        return self.layers[layer].elements * DTYPE_BYTES[self.dtype]

    @property
    def bytes_per_token(self) -> int:
        return sum(shape.elements for shape in self.layers) * DTYPE_BYTES[self.dtype]

    @property
    def bytes_per_block(self) -> int:
        return self.bytes_per_token * self.block_size

    def blocks_for(self, tokens: int) -> int:
        """Blocks that `tokens` tokens need."""
        return -(-tokens // self.block_size)

    def mismatch(self, other: KVLayout) -> str | None:
        """The first property on which a transfer between the two would be wrong, or None. Block sizes may differ."""
        if self.dtype != other.dtype:
            return "dtype"
        return "layers" if self.layers != other.layers else None
