"""Layers with sliding windows: what goes over is what is needed, from and to blocks that other groups have used or will use."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import TransferError
from core.groups import NO_BLOCK
from core.layout import KVLayout, LayerShape, Span, needed
from kv_transfer.byte_store import ByteStore
from kv_transfer.events import Delivered, Received, SendFailed
from kv_transfer.terms import Terms
from tests.kv_transfer.conformance.ways import Way, over_all_ways, over_quick_ways
from tests.kv_transfer.rig import POISON, layout, poisoned

MODELS: dict[str, list[int | None]] = {
    "one full layer in six": [5, 5, 5, 5, 5, None],
    "every other layer": [8, None, 8, None],
    "all sliding": [6, 6, 6],
    "two windows": [3, None, 9],
    "a window of one token": [1, None],
    "groups of unlike size": [4, 4, 4, None, None],
}
BLOCKS = 256


def model(name: str, block_size: int) -> KVLayout:
    return layout(block_size, shapes=[LayerShape(2, 3, 2, window) for window in MODELS[name]])


def contents(kind: KVLayout, tokens: int, seed: int) -> list[list[np.ndarray]]:
    """For each layer its key and its value rows."""
    dice = np.random.default_rng(seed)
    return [
        [dice.integers(0, 256, (tokens, heads * dim * 2), dtype=np.uint8) for dim in (shape.key_dim, shape.value_dim)]
        for shape in kind.layers
        for heads in [shape.kv_heads]
    ]


def place(store: ByteStore, layer: int, table: Sequence[int], tokens: range, rows: list[np.ndarray]) -> None:
    size = store.layout.block_size
    for token in tokens:
        assert table[token // size] != NO_BLOCK
        for page, values in zip(store.pages[layer], rows, strict=True):
            page[table[token // size], token % size] = values[token]


class Reader:
    """Reads a prompt into a store as an engine does: each group gives back the blocks that its window has left, and whoever gets
    them next writes what it likes."""

    def __init__(self, kind: KVLayout, written: list[list[np.ndarray]], dice: random.Random) -> None:
        self.store = poisoned(kind, BLOCKS)
        self.tables: list[list[int]] = [[] for _ in self.store.groups.groups]
        self._written = written
        self._free = dice.sample(range(BLOCKS), BLOCKS)

    def read(self, tokens: range) -> None:
        size = self.store.layout.block_size
        for group, table in zip(self.store.groups.groups, self.tables, strict=True):
            while len(table) * size < tokens.stop:
                table.append(self._free.pop(0))
            for layer in group.layers:
                place(self.store, layer, table, tokens, self._written[layer])

    def slide(self, done: int) -> None:
        size = self.store.layout.block_size
        for group, table in zip(self.store.groups.groups, self.tables, strict=True):
            for index in range(min(group.first_seen(done) // size, len(table))):
                if table[index] != NO_BLOCK:
                    for page in (page for pair in self.store.pages for page in pair):
                        page[table[index]] = 0xEE
                    self._free.insert(0, table[index])
                    table[index] = NO_BLOCK


def tables_of(store: ByteStore, stop: int, dice: random.Random) -> list[list[int]]:
    """Blocks for what each group sees behind `stop` tokens."""
    free, size = dice.sample(range(BLOCKS), BLOCKS), store.layout.block_size
    tables = []
    for group in store.groups.groups:
        left = min(group.first_seen(stop), stop) // size
        tables.append([NO_BLOCK] * left + [free.pop() for _ in range(store.layout.blocks_for(stop) - left)])
    return tables


def hand_over(way: Way, reader: Reader, target: ByteStore, tables: list[list[int]], first: int, chunks: list[range]) -> int:
    """Read and push chunk by chunk; returns how many bytes went over."""
    terms = Terms(1, "a", first, chunks[-1].stop, 30.0, windowed=True)
    with way.connected(reader.store, target) as pair:
        pair.receiver.open(terms, tables)
        session = None
        for chunk in chunks:
            reader.read(chunk)
            session = session or pair.sender.begin(terms, [pair.receiver.endpoint], reader.tables)
            for layer in range(len(target.layout.layers)):
                session.push(layer, chunk.start, len(chunk))
            reader.slide(chunk.stop)
        assert session is not None
        session.finish(b"")
        (received,), (delivered,) = pair.received.expect(Received), pair.sent.expect(Delivered)
    assert received.kv_bytes == delivered.kv_bytes
    return received.kv_bytes


def check(way: Way, name: str, sizes: tuple[int, int], first: int, stop: int, cuts: Sequence[int], dice: random.Random) -> None:
    source, target = model(name, sizes[0]), poisoned(model(name, sizes[1]), BLOCKS)
    written, tables = contents(source, stop, seed=3), tables_of(target, stop, dice)
    edges = sorted({0, stop, *(cut for cut in cuts if cut < stop)})
    moved = hand_over(way, Reader(source, written, dice), target, tables, first, [range(*edge) for edge in pairwise(edges)])
    regions = needed(source, Span(first, stop), windowed=True)
    assert moved == sum(each.tokens.size * source.layer_bytes_per_token(each.layers.start) for each in regions)
    expected = poisoned(target.layout, BLOCKS)
    for region in regions:
        layer, tokens = region.layers.start, range(region.tokens.start, region.tokens.stop)
        place(expected, layer, tables[expected.groups.group_of(layer)], tokens, written[layer])
    for got, wanted in zip(target.pages, expected.pages, strict=True):
        assert all(map(np.array_equal, got, wanted))


@over_quick_ways
@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(sorted(MODELS)),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.integers(0, 40),
    st.integers(1, 40),
    st.lists(st.integers(1, 39), max_size=6),
    st.randoms(use_true_random=False),
)
def test_each_layer_gets_what_its_window_sees_while_blocks_are_given_back(
    way: Way, name: str, sizes: tuple[int, int], one: int, other: int, cuts: list[int], dice: random.Random
) -> None:
    first, stop = sorted((one, other))
    check(way, name, sizes, first, stop, cuts, dice)


@over_all_ways
@pytest.mark.parametrize("name", sorted(MODELS))
def test_prompts_of_several_windows_in_chunks_between_unlike_blocks(way: Way, name: str) -> None:
    check(way, name, (4, 3), 2, 40, [7, 8, 20, 33], random.Random(1))


@over_all_ways
def test_a_side_that_keeps_only_windows_refuses_to_send_all(way: Way) -> None:
    """Alone: the next session is served."""
    kind, dice = model("every other layer", 4), random.Random(2)
    reader, target = Reader(kind, contents(kind, 12, seed=3), dice), poisoned(kind, BLOCKS)
    reader.read(range(12))
    whole = [dice.sample(range(30), 3), dice.sample(range(30, 60), 3)]
    with way.connected(reader.store, target) as pair:
        pair.receiver.open(Terms(1, "all", 0, 12, 30.0), whole)
        refused = pair.sender.begin(Terms(1, "all", 0, 12, 30.0), [pair.receiver.endpoint], reader.tables)
        (failed,) = pair.sent.expect(SendFailed)
        assert (failed.attempt, failed.error.code, refused.ended) == ("all", TransferError.code, True)
        assert "sliding windows" in str(failed.error)
        terms = Terms(2, "windows", 0, 12, 30.0, windowed=True)
        pair.receiver.open(terms, whole)
        session = pair.sender.begin(terms, [pair.receiver.endpoint], reader.tables)
        for layer in range(4):
            session.push(layer, 0, 12)
        session.finish(b"")
        assert pair.sent.expect(Delivered)[0].attempt == "windows"


@over_all_ways
def test_a_push_from_what_the_window_has_left_fails_its_session_and_reads_nothing(way: Way) -> None:
    kind, dice = model("all sliding", 4), random.Random(2)
    reader, target = Reader(kind, contents(kind, 40, seed=3), dice), poisoned(kind, BLOCKS)
    reader.read(range(40))
    reader.slide(40)
    terms = Terms(1, "a", 0, 20, 30.0, windowed=True)
    with way.connected(reader.store, target) as pair:
        pair.receiver.open(terms, tables_of(target, 20, dice))
        session = pair.sender.begin(terms, [pair.receiver.endpoint], reader.tables)
        session.push(0, 0, 20)
        (failed,) = pair.sent.expect(SendFailed)
        assert "given back" in str(failed.error)
    assert all(bool((page == POISON).all()) for pages in target.pages for page in pages)


def test_a_grant_of_blocks_that_were_given_back_cannot_be_opened() -> None:
    store = poisoned(model("every other layer", 4), BLOCKS)
    terms = Terms(1, "a", 0, 24, 30.0, windowed=True)
    full, sliding = list(range(6)), [NO_BLOCK] * 4 + [10, 11]
    way = Way("inproc")
    with way.connected(target=store) as pair:
        for tables, why in (
            ([sliding, [NO_BLOCK, *full[1:]]], "given back"),
            ([[NO_BLOCK] * 5 + [11], full], "given back"),
            ([sliding, full[:5]], "within 5 blocks"),
            ([full], "one for each of 2 groups"),
        ):
            with pytest.raises(ValueError, match=why):
                pair.receiver.open(terms, tables)
        with pytest.raises(ValueError, match="given back"):
            pair.receiver.open(Terms(1, "a", 0, 24, 30.0), [sliding, full])
        pair.receiver.open(terms, [sliding, full])
