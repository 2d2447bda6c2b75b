"""Coverage against a set of (layer, token)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.coverage import Coverage

FIRST, STOP, LAYERS = 3, 20, 2
PIECES = st.lists(st.tuples(st.integers(-1, LAYERS), st.integers(0, 22), st.integers(0, 22)), max_size=40)


@given(PIECES)
def test_every_token_is_taken_at_most_once_and_only_within_bounds(pieces: list[tuple[int, int, int]]) -> None:
    coverage, there = Coverage(LAYERS, FIRST, STOP), set()
    for layer, start, stop in pieces:
        new = {(layer, token) for token in range(start, stop)}
        fits = bool(new) and 0 <= layer < LAYERS and start >= FIRST and stop <= STOP and not new & there
        if fits:
            coverage.add(layer, start, stop)
            there |= new
        else:
            with pytest.raises(ValueError, match="tokens"):
                coverage.add(layer, start, stop)
        assert coverage.remaining == LAYERS * (STOP - FIRST) - len(there)
        assert coverage.complete == (coverage.remaining == 0)
    for layer in range(LAYERS):
        missing = [token for low, high in coverage.missing(layer, 0, 100) for token in range(low, high)]
        assert missing == [token for token in range(FIRST, STOP) if (layer, token) not in there]


@given(st.permutations(range(FIRST, STOP)))
def test_single_tokens_in_any_order_complete_it(order: list[int]) -> None:
    coverage = Coverage(1, FIRST, STOP)
    for token in order:
        assert not coverage.complete
        coverage.add(0, token, token + 1)
    assert coverage.complete
    assert coverage.missing(0, 0, 100) == []


def test_an_empty_range_is_complete_at_once() -> None:
    assert Coverage(4, 7, 7).complete


def test_a_range_that_ends_before_it_starts_is_refused() -> None:
    with pytest.raises(ValueError, match="first_token"):
        Coverage(1, 8, 7)
