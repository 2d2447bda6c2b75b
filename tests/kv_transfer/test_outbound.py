"""The sending queue: what is pushed leaves once, in few pieces, from the blocks it was pushed from."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.groups import layer_groups
from core.layout import LayerShape, Region, Span
from kv_transfer.frames import HEADER_BYTES, JOINED_BYTES, PIECE_BYTES, Kind, parse_header
from kv_transfer.outbound import Outbound
from kv_transfer.terms import Terms
from tests.kv_transfer.rig import layout

LAYERS, SEED = 3, 7
SHAPE = layout(4, shapes=[LayerShape(2, 4, 4)] * LAYERS)
HEADS = SHAPE.heads_of(0)


def drain(outbound: Outbound) -> list[tuple[int, int, int]]:
    """What leaves of each layer, in order."""
    return [
        (layer, region.tokens.start, region.tokens.stop)
        for region in regions(outbound)
        for layer in range(region.layers.start, region.layers.stop)
    ]


def regions(outbound: Outbound) -> list[Region]:
    left = []
    outbound.take_begin(SEED)
    while region := outbound.take_region():
        left.append(region)
    return left


def make(first: int = 0, stop: int = 16, blocks: list[int] | None = None) -> Outbound:
    table = [4, 3, 2, 1] if blocks is None else blocks
    return Outbound(SHAPE, layer_groups(SHAPE), Terms(1, "attempt", first, stop, 30.0), [table])


@given(
    st.lists(st.tuples(st.integers(0, LAYERS - 1), st.integers(0, 16), st.integers(0, 16), st.booleans()), max_size=30),
    st.integers(0, 16),
    st.integers(0, 16),
)
def test_each_pushed_token_of_the_grant_leaves_exactly_once(
    pushes: list[tuple[int, int, int, bool]], one: int, other: int
) -> None:
    first, stop = sorted((one, other))
    outbound, left, wanted = make(first, stop), [], set()
    for layer, start, count, drains in pushes:
        count = min(count, 16 - start)
        outbound.push(layer, start, count, None)
        wanted |= {(layer, token) for token in range(max(start, first), min(start + count, stop))}
        if drains:
            left += drain(outbound)
    left += drain(outbound)
    tokens = [(layer, token) for layer, low, high in left for token in range(low, high)]
    assert len(tokens) == len(set(tokens))
    assert set(tokens) == wanted


def test_adjacent_pushes_that_wait_leave_as_one_region() -> None:
    outbound = make()
    for start in range(0, 16, 2):
        for layer in range(LAYERS):
            outbound.push(layer, start, 2, None)
    assert regions(outbound) == [Region(Span(0, LAYERS), HEADS, Span(0, 16))]


def test_layers_join_only_where_they_are_adjacent_and_the_same_tokens_of_them_wait() -> None:
    outbound = make(0, 8)
    outbound.push(2, 0, 8, None)
    outbound.push(0, 0, 8, None)
    assert regions(outbound) == [Region(Span(2, 3), HEADS, Span(0, 8)), Region(Span(0, 1), HEADS, Span(0, 8))]
    outbound = make(0, 8)
    for layer, start, count in ((0, 0, 4), (1, 0, 8), (2, 0, 8)):
        outbound.push(layer, start, count, None)
    assert regions(outbound) == [Region(Span(0, 1), HEADS, Span(0, 4)), Region(Span(1, 3), HEADS, Span(0, 8))]


def test_layers_join_only_once_they_are_written() -> None:
    outbound, late = make(0, 8), Flag()
    for layer, fence in ((0, None), (1, None), (2, late)):
        outbound.push(layer, 0, 8, fence)
    assert regions(outbound) == [Region(Span(0, 2), HEADS, Span(0, 8))]
    late.open = True
    assert regions(outbound) == [Region(Span(2, 3), HEADS, Span(0, 8))]


def test_layers_of_other_heads_do_not_join() -> None:
    shape = layout(4, shapes=[LayerShape(2, 4, 4), LayerShape(2, 8, 8), LayerShape(1, 4, 4)])
    outbound = Outbound(shape, layer_groups(shape), Terms(1, "attempt", 0, 4, 30.0), [[0]])
    for layer in range(3):
        outbound.push(layer, 0, 4, None)
    assert regions(outbound) == [
        Region(Span(0, 2), Span(0, 2), Span(0, 4)),
        Region(Span(2, 3), Span(0, 1), Span(0, 4)),
    ]


def test_joined_layers_stay_within_their_limit_and_within_the_room_left() -> None:
    shape = layout(16, shapes=[LayerShape(8, 128, 128)] * 8)
    tokens = JOINED_BYTES // 4 // shape.layer_bytes_per_token(0)

    def pushed() -> Outbound:
        outbound = Outbound(shape, layer_groups(shape), Terms(1, "attempt", 0, tokens, 30.0), [list(range(100))])
        outbound.take_begin(SEED)
        for layer in range(8):
            outbound.push(layer, 0, tokens, None)
        return outbound

    assert [region.layers for region in regions(pushed())] == [Span(0, 4), Span(4, 8)]
    first = pushed().take_region(JOINED_BYTES // 2 + 1)
    assert first is not None
    assert first.layers == Span(0, 2)


def test_large_pushes_leave_in_pieces() -> None:
    shape = layout(16, shapes=[LayerShape(8, 128, 128)])
    outbound = Outbound(shape, layer_groups(shape), Terms(1, "attempt", 0, 1000, 30.0), [list(range(100))])
    outbound.push(0, 0, 1000, None)
    pieces = drain(outbound)
    most = PIECE_BYTES // shape.layer_bytes_per_token(0)
    assert pieces == [(0, at, min(at + most, 1000)) for at in range(0, 1000, most)]


def test_only_what_fits_whole_is_taken_behind_another_piece() -> None:
    outbound, row_bytes = make(0, 8), SHAPE.layer_bytes_per_token(0)
    outbound.push(0, 0, 4, None)
    outbound.push(0, 4, 2, Flag(opened=True))
    outbound.push(0, 6, 2, None)
    outbound.take_begin(SEED)
    assert outbound.take_region(4 * row_bytes - 1) is None
    region = outbound.take_region(7 * row_bytes)  # what is beside it is cut to what fits
    assert region == Region(Span(0, 1), HEADS, Span(0, 7))
    assert drain(outbound) == [(0, 7, 8)]


def test_begin_is_first_and_finish_last_and_each_leaves_once() -> None:
    outbound = make(0, 4)
    for layer in range(LAYERS):
        outbound.push(layer, 0, 4, None)
    outbound.finish(b"")
    assert outbound.take_finish(SEED) is None
    begin = outbound.take_begin(SEED)
    assert begin is not None
    assert outbound.take_begin(SEED) is None
    headers = [parse_header(begin[:HEADER_BYTES], SEED)]
    while region := outbound.take_region():
        assert outbound.take_finish(SEED) is None  # a region is not stamped yet
        headers.append(parse_header(outbound.stamp_region(region, 4, 5, SEED), SEED))
        assert headers[-1].region == region
    finish = outbound.take_finish(SEED)
    assert finish is not None
    assert outbound.take_finish(SEED) is None
    headers.append(parse_header(finish[:HEADER_BYTES], SEED))
    assert [header.kind for header in headers] == [Kind.BEGIN, Kind.DATA, Kind.FINISH]
    assert [header.sequence for header in headers] == list(range(3))
    assert not outbound.pending()


class Flag:
    """A fence that passes when told."""

    def __init__(self, opened: bool = False) -> None:
        self.open, self.asked = opened, 0

    def passed(self) -> bool:
        self.asked += 1
        return self.open


def test_a_piece_waits_for_its_own_fence_however_it_is_joined() -> None:
    """What was pushed first may be written while what is next to it is not: neither takes the other's fence."""
    outbound, older, newer = make(0, 8), Flag(), Flag()
    outbound.push(0, 0, 4, older)
    outbound.push(0, 4, 4, newer)
    outbound.take_begin(SEED)
    assert not outbound.sendable()
    assert outbound.pending()
    older.open = True
    assert drain(outbound) == [(0, 0, 4)]
    assert not outbound.sendable()
    newer.open = True
    assert drain(outbound) == [(0, 4, 8)]


def test_pieces_side_by_side_leave_as_one_once_both_are_written() -> None:
    outbound, older, newer = make(0, 8), Flag(), Flag()
    outbound.push(0, 0, 4, older)
    outbound.push(0, 4, 4, newer)
    older.open = newer.open = True
    assert drain(outbound) == [(0, 0, 8)]


def test_a_layer_that_is_written_passes_one_that_is_not() -> None:
    outbound, late = make(0, 4), Flag()
    outbound.push(0, 0, 4, late)
    outbound.push(1, 0, 4, None)
    assert drain(outbound) == [(1, 0, 4)]
    late.open = True
    assert drain(outbound) == [(0, 0, 4)]


def test_a_fence_that_has_passed_is_not_asked_again() -> None:
    outbound, fence = make(0, 4), Flag()
    outbound.push(0, 0, 4, fence)
    outbound.take_begin(SEED)
    fence.open = True
    assert outbound.sendable()
    assert outbound.sendable()
    assert drain(outbound) == [(0, 0, 4)]
    assert fence.asked == 1


def test_blocks_that_come_later_are_taken_over_at_the_push_that_needs_them() -> None:
    blocks = [9]
    outbound = make(0, 16, blocks)
    outbound.push(0, 0, 4, None)
    with pytest.raises(ValueError, match="within 1 blocks"):
        outbound.push(0, 4, 4, None)
    blocks.append(7)
    outbound.push(0, 4, 4, None)
    assert outbound.tables == [[9, 7]]


def test_a_push_from_blocks_that_changed_is_refused_even_if_its_tokens_were_pushed() -> None:
    blocks = [9, 7]
    outbound = make(0, 8, blocks)
    outbound.push(0, 0, 8, None)
    blocks[:] = [3, 7]
    with pytest.raises(ValueError, match="changed"):
        outbound.push(0, 0, 8, None)


def test_finish_needs_every_token_once_and_comes_once() -> None:
    outbound = make(0, 4)
    outbound.push(0, 0, 4, None)
    with pytest.raises(ValueError, match="16 rows were not pushed"):
        outbound.finish(b"")
    for layer in range(LAYERS):
        outbound.push(layer, 0, 4, None)
    with pytest.raises(ValueError, match="tail"):
        outbound.finish(bytes(100_000))
    outbound.finish(b"")
    with pytest.raises(ValueError, match="second"):
        outbound.finish(b"")
    outbound.push(0, 0, 4, None)  # harmless: it is on its way already


@pytest.mark.parametrize(("layer", "start", "count"), [(-1, 0, 1), (LAYERS, 0, 1), (0, -1, 2), (0, 0, -1)])
def test_impossible_pushes_are_refused(layer: int, start: int, count: int) -> None:
    with pytest.raises(ValueError, match="expected one of"):
        make().push(layer, start, count, None)
