"""Layouts: what a model defines, what a rank holds of it, and what must cross."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.layout import DTYPE_BYTES, KVLayout, LayerShape, ModelKV, Region, Shard, Span, needed

SHAPES = (LayerShape(8, 4, 2), LayerShape(2, 4, 4, 5), LayerShape(8, 4, 2))
MODEL = ModelKV(layers=SHAPES, dtype="bfloat16")


def rank(layers: Span, heads: Span, block_size: int = 16) -> KVLayout:
    return KVLayout(model=MODEL, shard=Shard(layers, heads), block_size=block_size)


WHOLE = KVLayout.whole(layers=SHAPES, dtype="bfloat16", block_size=16)


def test_a_whole_rank_holds_all_layers_and_heads() -> None:
    assert WHOLE.shard == Shard(Span(0, 3), Span(0, 8))
    assert WHOLE.layers == SHAPES
    assert [WHOLE.heads_of(layer) for layer in range(3)] == [Span(0, 8), Span(0, 2), Span(0, 8)]
    assert WHOLE.bytes_per_token == 2 * (8 * 6 + 2 * 8 + 8 * 6)
    assert WHOLE.region(Span(3, 9)) == Region(Span(0, 3), Span(0, 8), Span(3, 9))


def test_a_rank_holds_its_layers_and_its_heads_of_each() -> None:
    part = rank(Span(1, 3), Span(1, 5))
    assert part.layers == (LayerShape(1, 4, 4, 5), LayerShape(4, 4, 2))
    assert (part.heads_of(1), part.heads_of(2)) == (Span(1, 2), Span(1, 5))
    assert [part.holds(layer) for layer in range(-1, 4)] == [False, False, True, True, False]
    assert part.layer_bytes_per_token(2) == 2 * 4 * 6
    assert part.bytes_per_token == 2 * (8 + 24)


@given(st.integers(1, 7), st.integers(1, 2))
def test_ranks_that_tile_a_model_add_up_to_it(head: int, layer: int) -> None:
    parts = [rank(layers, heads) for layers in (Span(0, layer), Span(layer, 3)) for heads in (Span(0, head), Span(head, 8))]
    assert sum(part.bytes_per_token for part in parts) == WHOLE.bytes_per_token


@pytest.mark.parametrize(
    ("layers", "heads"), [(Span(0, 4), Span(0, 8)), (Span(-1, 2), Span(0, 8)), (Span(1, 1), Span(0, 8)), (Span(0, 3), Span(4, 9))]
)
def test_a_part_that_the_model_does_not_have_is_refused(layers: Span, heads: Span) -> None:
    with pytest.raises(ValueError, match="shard"):
        rank(layers, heads)


def test_a_layout_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype"):
        KVLayout.whole(layers=SHAPES, dtype="int3", block_size=16)
    with pytest.raises(ValueError, match="block_size"):
        KVLayout.whole(layers=SHAPES, dtype="float32", block_size=0)
    with pytest.raises(ValueError, match="layers"):
        ModelKV(layers=(), dtype="float32")


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("dtype", KVLayout.whole(layers=SHAPES, dtype="float16", block_size=16)),
        ("layers", KVLayout.whole(layers=SHAPES[:2], dtype="bfloat16", block_size=16)),
        ("kv_heads", KVLayout.whole(layers=(*SHAPES[:2], LayerShape(4, 4, 2)), dtype="bfloat16", block_size=16)),
        ("sliding_window", KVLayout.whole(layers=(*SHAPES[:2], LayerShape(8, 4, 2, 3)), dtype="bfloat16", block_size=16)),
        ("shard", rank(Span(0, 2), Span(0, 8))),
        ("shard", rank(Span(0, 3), Span(0, 4))),
        (None, rank(Span(0, 3), Span(0, 8), block_size=64)),
    ],
)
def test_a_mismatch_names_its_field(field: str | None, other: KVLayout) -> None:
    assert WHOLE.mismatch(other) == other.mismatch(WHOLE) == field


def test_without_windows_every_layer_needs_every_token() -> None:
    assert [region.tokens for region in needed(WHOLE, Span(3, 40), windowed=False)] == [Span(3, 40)] * 3


@pytest.mark.parametrize(
    ("first", "stop", "start"),
    [(0, 40, 36), (38, 40, 38), (40, 40, 40), (0, 4, 0), (0, 5, 1)],  # a window of 5: itself and the four before it
)
def test_a_windowed_layer_needs_only_what_the_next_token_sees(first: int, stop: int, start: int) -> None:
    regions = needed(WHOLE, Span(first, stop), windowed=True)
    assert [region.layers for region in regions] == [Span(0, 1), Span(1, 2), Span(2, 3)]
    assert [region.heads for region in regions] == [Span(0, 8), Span(0, 2), Span(0, 8)]
    assert [region.tokens for region in regions] == [Span(first, stop), Span(start, stop), Span(first, stop)]


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 60))
def test_what_a_window_needs_is_what_attention_would_read(one: int, other: int, window: int) -> None:
    first, stop = sorted((one, other))
    layout = KVLayout.whole(layers=[LayerShape(1, 1, 1, window)], dtype="float32", block_size=4)
    (region,) = needed(layout, Span(first, stop), windowed=True)
    seen = [token for token in range(first, stop) if token > stop - window]
    assert list(range(region.tokens.start, region.tokens.stop)) == seen


@pytest.mark.parametrize("tokens", [Span(-1, 4), Span(5, 4)])
@pytest.mark.parametrize("windowed", [False, True])
def test_tokens_that_are_no_range_are_refused(tokens: Span, windowed: bool) -> None:
    with pytest.raises(ValueError, match="first_token"):
        needed(WHOLE, tokens, windowed)


def test_a_rank_needs_only_what_it_holds() -> None:
    regions = needed(rank(Span(1, 3), Span(1, 5)), Span(0, 9), windowed=False)
    assert [(region.layers.start, region.heads) for region in regions] == [(1, Span(1, 2)), (2, Span(1, 5))]


def test_element_sizes_are_torchs() -> None:
    assert {name: getattr(torch, name).itemsize for name in DTYPE_BYTES} == DTYPE_BYTES
