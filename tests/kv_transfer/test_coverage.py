"""Coverage against a set of (layer, head, token)."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.layout import Region, Span
from kv_transfer.coverage import Coverage

FIRST, STOP = 3, 20
HEADS = {4: Span(2, 6), 5: Span(0, 3)}
REGIONS = [Region(Span(layer, layer + 1), heads, Span(FIRST, STOP)) for layer, heads in HEADS.items()]
PIECE = st.tuples(st.integers(3, 6), *[st.integers(0, 7)] * 2, *[st.integers(0, 22)] * 2)

Cell = tuple[int, int, int]


def cells(layer: int, heads: Span, tokens: Span) -> set[Cell]:
    return {(layer, head, token) for head in range(heads.start, heads.stop) for token in range(tokens.start, tokens.stop)}


EVERYTHING = set().union(*(cells(layer, heads, Span(FIRST, STOP)) for layer, heads in HEADS.items()))


@given(st.lists(PIECE, max_size=40))
def test_every_token_of_every_head_is_taken_at_most_once_and_only_within_bounds(
    pieces: list[tuple[int, int, int, int, int]],
) -> None:
    coverage = Coverage(REGIONS)
    there: set[Cell] = set()
    for layer, head, last, start, stop in pieces:
        new = cells(layer, Span(head, last), Span(start, stop))
        if new and new <= EVERYTHING - there:
            coverage.add(layer, Span(head, last), Span(start, stop))
            there |= new
        else:
            with pytest.raises(ValueError, match="tokens"):
                coverage.add(layer, Span(head, last), Span(start, stop))
        assert coverage.remaining == len(EVERYTHING - there)
        assert coverage.complete == (coverage.remaining == 0)
    for layer in range(3, 7):
        gaps = [cells(layer, *gap) for gap in coverage.missing(layer, Span(0, 100), Span(0, 100))]
        assert sum(map(len, gaps)) == len(set().union(*gaps))
        assert set().union(*gaps) == {cell for cell in EVERYTHING - there if cell[0] == layer}


@given(st.lists(st.integers(3, 5), max_size=2), st.lists(st.integers(FIRST + 1, STOP - 1), max_size=5), st.randoms())
def test_disjoint_slices_of_heads_and_tokens_in_any_order_complete_a_layer(
    heads: list[int], tokens: list[int], dice: random.Random
) -> None:
    """As several ranks send them, each cutting the tokens where it likes."""
    coverage = Coverage(REGIONS[:1])
    bounds = HEADS[4]
    slices = [Span(*pair) for pair in pairwise(sorted({bounds.start, *heads, bounds.stop}))]
    pieces = []
    for part in slices:
        edges = sorted({FIRST, *dice.sample(tokens, dice.randint(0, len(tokens))), STOP})
        pieces += [(part, Span(*pair)) for pair in pairwise(edges)]
    dice.shuffle(pieces)
    for part, span in pieces:
        assert not coverage.complete
        assert coverage.missing(4, part, span) == [(part, span)]
        coverage.add(4, part, span)
    assert coverage.complete
    assert coverage.missing(4, Span(0, 100), Span(0, 100)) == []


@given(st.permutations(range(FIRST, STOP)))
def test_single_tokens_in_any_order_complete_it(order: list[int]) -> None:
    coverage = Coverage(REGIONS[:1])
    for token in order:
        assert not coverage.complete
        coverage.add(4, HEADS[4], Span(token, token + 1))
    assert coverage.complete


def test_layers_may_want_different_tokens() -> None:
    coverage = Coverage([Region(Span(0, 1), Span(0, 1), Span(0, 4)), Region(Span(1, 2), Span(0, 1), Span(3, 4))])
    assert (coverage.wanted(0), coverage.wanted(1), coverage.wanted(2)) == (Span(0, 4), Span(3, 4), Span(0, 0))
    with pytest.raises(ValueError, match="layer 1"):
        coverage.add(1, Span(0, 1), Span(2, 4))
    coverage.add(1, Span(0, 1), Span(3, 4))
    coverage.add(0, Span(0, 1), Span(0, 4))
    assert coverage.complete


def test_an_empty_range_is_complete_at_once() -> None:
    assert Coverage([Region(Span(0, 4), Span(0, 2), Span(7, 7))]).complete


def test_a_range_that_ends_before_it_starts_is_refused() -> None:
    with pytest.raises(ValueError, match="end before"):
        Coverage([Region(Span(0, 1), Span(0, 1), Span(8, 7))])


def test_a_layer_that_is_named_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        Coverage([REGIONS[0], REGIONS[0]])


def test_a_piece_may_span_heads_that_came_apart_before() -> None:
    coverage = Coverage(REGIONS[:1])
    coverage.add(4, Span(2, 4), Span(3, 5))
    coverage.add(4, Span(4, 6), Span(5, 7))
    coverage.add(4, Span(2, 6), Span(7, 20))
    gaps = coverage.missing(4, Span(0, 100), Span(0, 100))
    assert sorted(gaps, key=lambda gap: gap[0].start) == [(Span(2, 4), Span(5, 7)), (Span(4, 6), Span(3, 5))]
    with pytest.raises(ValueError, match="already"):
        coverage.add(4, Span(5, 6), Span(19, 20))
