"""What a KV cache looks like, in words that any two engines can compare.

    ModelKV   what the model defines: one shape per attention layer, and the element type
    Shard     which of it one rank holds: a range of layers, and a range of KV heads of each
    KVLayout  one rank's cache: model, shard, and its own block size
    Region    a box of KV on the wire: layers x heads x tokens

That is all that `engine` and `kv_transfer` share. Block sizes are each engine's own, because the wire speaks in token ranges,
never in blocks. Layers, heads and tokens are numbered as the model numbers them, on every rank and on the wire.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Span(msgspec.Struct, frozen=True, array_like=True):
    """The integers `[start, stop)`."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def within(self, other: Span) -> bool:
        return other.start <= self.start and self.stop <= other.stop


class Region(msgspec.Struct, frozen=True, array_like=True):
    """KV of `tokens`, of those of `heads` that each of `layers` has."""

    layers: Span
    heads: Span
    tokens: Span


class LayerShape(msgspec.Struct, frozen=True):
    """One layer's cache per token: `kv_heads * key_dim` and `kv_heads * value_dim` elements.

    `sliding_window`: a token sees itself and the `sliding_window - 1` before it; None: all before it.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    sliding_window: int | None = None


class ModelKV(msgspec.Struct, frozen=True, kw_only=True):
    """What the model defines: `layers`, one shape per attention layer in order of `layer_idx`, and `dtype`, the name of the
    stored element type, a key of `DTYPE_BYTES`."""

    layers: tuple[LayerShape, ...]
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"Got {self.dtype = } but expected one of {sorted(DTYPE_BYTES)}")
        if not self.layers:
            raise ValueError("Got no layers but expected at least one")

    @property
    def element_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    def mismatch(self, other: ModelKV) -> str | None:
        """The first field on which the two differ, or None: `dtype`, `layers` (their number), or a field of a layer."""
        if self.dtype != other.dtype:
            return "dtype"
        if len(self.layers) != len(other.layers):
            return "layers"
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            for field in LayerShape.__struct_fields__:
                if getattr(mine, field) != getattr(theirs, field):
                    return field
        return None


class Shard(msgspec.Struct, frozen=True):
    """The part of a model's KV that one rank holds: `heads`, cut to what each layer has, of each of `layers`.

    Models whose layers differ in their number of heads can so be sharded by layers, but not evenly by heads.
    """

    layers: Span
    heads: Span

    @classmethod
    def whole(cls, model: ModelKV) -> Shard:
        return cls(Span(0, len(model.layers)), Span(0, max(shape.kv_heads for shape in model.layers)))


class KVLayout(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's cache: `shard` of `model`, in blocks of `block_size` tokens. Two peers may differ in the last."""

    model: ModelKV
    shard: Shard
    block_size: int

    @classmethod
    def whole(cls, *, layers: Iterable[LayerShape], dtype: str, block_size: int) -> KVLayout:
        """The layout of a rank that holds everything."""
        model = ModelKV(layers=tuple(layers), dtype=dtype)
        return cls(model=model, shard=Shard.whole(model), block_size=block_size)

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"Got {self.block_size = } but expected at least 1")
        everything, shard = Shard.whole(self.model), self.shard
        for name, part, all_of_it in (
            ("layers", shard.layers, everything.layers),
            ("heads", shard.heads, everything.heads),
        ):
            if part.size < 1 or not part.within(all_of_it):
                raise ValueError(f"Got a shard of {name} {part} but expected some of {all_of_it}")

    @property
    def dtype(self) -> str:
        return self.model.dtype

    @property
    def layers(self) -> tuple[LayerShape, ...]:
        """The shapes that this rank holds, one per layer of the shard, with as many heads as it holds of it."""
        held = self.model.layers[self.shard.layers.start : self.shard.layers.stop]
        if self.shard.heads == Shard.whole(self.model).heads:
            return held
        first = self.shard.layers.start
        return tuple(
            LayerShape(self.heads_of(first + at).size, shape.key_dim, shape.value_dim, shape.sliding_window)
            for at, shape in enumerate(held)
        )

    def holds(self, layer: int) -> bool:
        return self.shard.layers.start <= layer < self.shard.layers.stop

    def heads_of(self, layer: int) -> Span:
        """Which heads of the model's layer `layer` this rank holds."""
        most, heads = self.model.layers[layer].kv_heads, self.shard.heads
        return Span(min(heads.start, most), min(heads.stop, most))

    def holds_all(self, region: Region) -> bool:
        """Whether a region is of one layer at least, and its heads are those that this rank holds of each of its layers."""
        layers = region.layers
        return (
            layers.size > 0
            and layers.within(self.shard.layers)
            and all(region.heads == self.heads_of(layer) for layer in range(layers.start, layers.stop))
        )

    def layer_bytes_per_token(self, layer: int) -> int:
        """Of what this rank holds of the model's layer `layer`."""
        shape = self.model.layers[layer]
        return self.heads_of(layer).size * (shape.key_dim + shape.value_dim) * self.model.element_bytes

    def region_bytes(self, region: Region) -> int:
        """Of a region whose heads are those that this rank holds of each of its layers."""
        layers = range(region.layers.start, region.layers.stop)
        return region.tokens.size * sum(self.layer_bytes_per_token(layer) for layer in layers)

    @property
    def bytes_per_token(self) -> int:
        """Over all that this rank holds."""
        return sum(self.layer_bytes_per_token(layer) for layer in range(self.shard.layers.start, self.shard.layers.stop))

    def blocks_for(self, tokens: int) -> int:
        """Blocks that `tokens` tokens need."""
        return -(-tokens // self.block_size)

    def region(self, tokens: Span) -> Region:
        """All that this rank holds of `tokens`."""
        return Region(self.shard.layers, self.shard.heads, tokens)

    def mismatch(self, other: KVLayout) -> str | None:
        """The first field on which a transfer between the two would be wrong, or None. Block sizes may differ. Ranks that
        hold different parts do not exchange KV (yet): that is a mismatch of `shard`."""
        return self.model.mismatch(other.model) or ("shard" if self.shard != other.shard else None)


def first_seen(sliding_window: int | None, position: int) -> int:
    """The first token that the token at `position` sees through such a window."""
    return 0 if sliding_window is None else max(0, position - sliding_window + 1)


def needed(layout: KVLayout, tokens: Span, windowed: bool) -> tuple[Region, ...]:
    """What a rank must be given of `tokens` so that the sequence can go on behind them: one region per layer it holds.

    With `windowed`, a layer needs only what the token at `tokens.stop` still sees of it; else it needs all. Sender and
    receiver both ask this function, so that neither has to believe the other.

    Raises:
        ValueError: `tokens` is no range from 0 on.
    """
    if not 0 <= tokens.start <= tokens.stop:
        raise ValueError(f"Got first_token = {tokens.start} but expected it within [0, {tokens.stop}]")
    regions = []
    for layer in range(layout.shard.layers.start, layout.shard.layers.stop):
        first = first_seen(layout.model.layers[layer].sliding_window, tokens.stop) if windowed else tokens.start
        span = Span(min(max(tokens.start, first), tokens.stop), tokens.stop)
        regions.append(Region(Span(layer, layer + 1), layout.heads_of(layer), span))
    return tuple(regions)
