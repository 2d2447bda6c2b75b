"""Batches against a token-by-token construction, over steps in which sequences grow, stop and move to other blocks."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.sampling import SamplingParams
from engine.batch import BatchBuilder
from engine.plan import Scheduled, StepPlan
from engine.sequence import Sequence

BLOCK = 4
CPU = torch.device("cpu")


def make(name: str, tokens: int, blocks: list[int]) -> Sequence:
    return Sequence(name, [100 * len(name) + i for i in range(tokens)], 1, SamplingParams(), blocks=blocks)


def check(builder: BatchBuilder, *scheduled: Scheduled) -> None:
    batch = builder.build(StepPlan(tuple(scheduled)))
    ids, positions, slots, rows, starts = [], [], [], [], [0]
    for item in scheduled:
        for position in range(item.start, item.start + item.count):
            ids.append(item.sequence.tokens[position])
            positions.append(position)
            slots.append(item.sequence.blocks[position // BLOCK] * BLOCK + position % BLOCK)
        starts.append(len(ids))
        if item.samples:
            rows.append(len(ids) - 1)
    attention = batch.attention
    assert batch.input_ids.tolist() == [ids]
    assert batch.position_ids.tolist() == [positions]
    assert batch.sample_rows.tolist() == rows
    assert attention.slots.tolist() == slots
    assert attention.query_start.tolist() == starts
    assert attention.context_lens.tolist() == [item.start + item.count for item in scheduled]
    assert attention.max_query_len == max(item.count for item in scheduled)
    assert attention.max_context_len == max(item.start + item.count for item in scheduled)
    for item, table in zip(scheduled, attention.block_tables.tolist(), strict=True):
        assert table == item.sequence.blocks + [0] * (len(table) - len(item.sequence.blocks))
    types = [attention.query_start, attention.context_lens, attention.block_tables]
    assert {tensor.dtype for tensor in types} == {torch.int32}
    assert attention.slots.dtype == batch.input_ids.dtype == torch.int64


def test_chunks_and_decodes_share_a_step():
    builder = BatchBuilder(BLOCK, CPU)
    check(
        builder,
        Scheduled(make("a", 9, [7, 3, 5]), 2, 6, samples=False),
        Scheduled(make("bb", 5, [2, 9]), 4, 1, samples=True),
        Scheduled(make("ccc", 3, [1]), 0, 3, samples=True),
    )


def test_a_sequence_that_grows_brings_its_new_blocks_along():
    builder = BatchBuilder(BLOCK, CPU)
    sequence = make("a", 80, [50])
    for position in range(80):
        if position and position % BLOCK == 0:
            sequence.blocks.append(50 + position)
        check(builder, Scheduled(sequence, position, 1, samples=True))


def test_a_preempted_sequence_uses_its_new_blocks_even_where_the_last_one_is_the_same():
    builder = BatchBuilder(BLOCK, CPU)
    sequence = make("a", 8, [4, 5])
    check(builder, Scheduled(sequence, 7, 1, samples=True))
    sequence.blocks, sequence.preemptions = [9, 5], 1
    check(builder, Scheduled(sequence, 0, 8, samples=True))


def test_equal_ids_do_not_share_a_remembered_table():
    builder = BatchBuilder(BLOCK, CPU)
    check(builder, Scheduled(make("a", 4, [1]), 3, 1, samples=True))
    check(builder, Scheduled(make("a", 4, [2]), 3, 1, samples=True))


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_plan_over_any_steps_matches_the_slow_construction(data):
    builder, free = BatchBuilder(BLOCK, CPU), iter(range(1, 10_000))
    sequences = [make("x" * (i + 1), 60, []) for i in range(3)]
    for _ in range(data.draw(st.integers(1, 6))):
        scheduled = []
        for sequence in data.draw(st.lists(st.sampled_from(sequences), min_size=1, unique=True)):
            if data.draw(st.booleans()):
                sequence.blocks, sequence.preemptions = [], sequence.preemptions + 1
            start = data.draw(st.integers(0, 59))
            count = data.draw(st.integers(1, 60 - start))
            while len(sequence.blocks) * BLOCK < start + count:
                sequence.blocks.append(next(free))
            scheduled.append(Scheduled(sequence, start, count, data.draw(st.booleans())))
        check(builder, *scheduled)
