"""Batches against a token-by-token construction, over steps in which rows come, grow, draw and go."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.groups import NO_BLOCK
from core.sampling import SamplingParams
from engine.batch import BatchBuilder
from engine.decision import Part
from engine.plan_writer import PlanWriter
from engine.runner_rows import RunnerRows
from engine.sequence import Sequence

BLOCK, WINDOW = 4, 6
CPU = torch.device("cpu")


def make(name: str, tokens: int, *tables: list[int]) -> Sequence:
    return Sequence(name, [100 * len(name) + i for i in range(tokens)], 1, SamplingParams(), tables=list(tables))


class Steps:
    """Plans as an engine writes them, and a batch of each, checked."""

    def __init__(self, groups: int = 1) -> None:
        self.writer = PlanWriter()
        self.rows = RunnerRows(CPU, groups)
        self.builder = BatchBuilder(BLOCK, CPU, self.rows)

    def check(self, *parts: Part) -> None:
        plan = self.writer.write(parts)
        self.rows.apply(plan)
        batch = self.builder.build(plan)
        ids, positions, rows, starts = [], [], [], [0]
        for part in parts:
            for position in range(part.start, part.start + part.count):
                ids.append(part.sequence.tokens[position])
                positions.append(position)
            starts.append(len(ids))
            if part.samples:
                rows.append(len(ids) - 1)
        assert batch.input_ids.tolist() == [ids]
        assert batch.position_ids.tolist() == [positions]
        assert batch.sample_rows.tolist() == rows
        for group, attention in enumerate(batch.attention):
            self.check_attention(attention, parts, [part.sequence.tables[group] for part in parts], starts)
        assert batch.input_ids.dtype == torch.int64
        self.draw(plan.scheduled, parts)

    def check_attention(self, attention, parts, tables, starts) -> None:
        slots = []
        for part, table in zip(parts, tables, strict=True):
            for position in range(part.start, part.start + part.count):
                slots.append(table[position // BLOCK] * BLOCK + position % BLOCK)
        assert attention.slots.tolist() == slots
        assert attention.query_start.tolist() == starts
        assert attention.context_lens.tolist() == [part.start + part.count for part in parts]
        assert attention.max_query_len == max(part.count for part in parts)
        assert attention.max_context_len == max(part.start + part.count for part in parts)
        for got, own in zip(attention.block_tables.tolist(), tables, strict=True):
            assert min(got) >= 0
            kept = own.count(NO_BLOCK)
            assert got[kept:] == own[kept:] + [0] * (len(got) - len(own))
        types = [attention.query_start, attention.context_lens, attention.block_tables]
        assert {tensor.dtype for tensor in types} == {torch.int32}
        assert attention.slots.dtype == torch.int64

    def draw(self, scheduled, parts) -> None:
        """Each that samples at its end draws a token that only the runner learns until the next step."""
        drawing = [(item.row, part) for item, part in zip(scheduled, parts, strict=True) if part.samples]
        drawing = [(row, part) for row, part in drawing if part.start + part.count == len(part.sequence.tokens)]
        tokens = [7 * len(part.sequence.tokens) + row for row, part in drawing]
        self.rows.keep_drawn([row for row, _ in drawing], torch.tensor(tokens, dtype=torch.long))
        for (_, part), token in zip(drawing, tokens, strict=True):
            part.sequence.tokens.append(token)


def test_chunks_and_decodes_share_a_step():
    Steps().check(
        Part(make("a", 9, [7, 3, 5]), 2, 6, samples=False),
        Part(make("bb", 5, [2, 9]), 4, 1, samples=True),
        Part(make("ccc", 3, [1]), 0, 3, samples=True),
    )


def test_a_sequence_that_grows_brings_its_new_blocks_and_the_tokens_drawn_here_along():
    steps, sequence = Steps(), make("a", 1, [50])
    for position in range(80):
        if position and position % BLOCK == 0:
            sequence.tables[0].append(50 + position)
        steps.check(Part(sequence, position, 1, samples=True))
    assert len(sequence.tokens) == 81


def test_a_sequence_back_from_preemption_uses_its_new_blocks_even_where_the_last_one_is_the_same():
    steps, sequence = Steps(), make("a", 8, [4, 5])
    steps.check(Part(sequence, 7, 1, samples=True))
    sequence.tables, sequence.tenancy = [[9, 5, 6]], 1
    steps.check(Part(sequence, 0, 9, samples=True))


def test_equal_ids_do_not_share_a_row():
    steps = Steps()
    steps.check(Part(make("a", 4, [1]), 3, 1, samples=True))
    steps.check(Part(make("a", 4, [2]), 3, 1, samples=True))


def test_a_row_that_takes_over_anothers_number_inherits_nothing():
    steps = Steps()
    steps.check(Part(make("a", 40, list(range(20, 31))), 39, 1, samples=True))
    newcomer, other = make("b", 2, [3]), make("c", 41, list(range(40, 51)))
    steps.check(Part(newcomer, 1, 1, samples=True), Part(other, 40, 1, samples=True))
    steps.check(Part(newcomer, 2, 1, samples=True), Part(other, 41, 1, samples=True))


def test_an_unusable_draw_is_read_as_a_token_that_exists():
    rows = RunnerRows(CPU)
    rows.keep_drawn([3, 1], torch.tensor([-1, 9]))
    assert rows.drawn[[3, 1]].tolist() == [0, 9]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_plan_over_any_steps_matches_the_slow_construction(data):
    """Sequences are read in chunks, decode, go and come back to other blocks, in any company. The second of two groups has
    a window, which leaves blocks behind."""
    steps, free = Steps(groups=2), iter(range(1, 10_000))
    sequences = [make("x" * (i + 1), 60, [], []) for i in range(3)]
    done = dict.fromkeys(sequences, 0)
    for _ in range(data.draw(st.integers(1, 8))):
        parts = []
        for sequence in data.draw(st.lists(st.sampled_from(sequences), min_size=1, unique=True)):
            if data.draw(st.integers(0, 4)) == 0:
                sequence.tables, sequence.tenancy, done[sequence] = [[], []], sequence.tenancy + 1, 0
            start = done[sequence]
            count = data.draw(st.integers(1, len(sequence.tokens) - start))
            left = max(0, start - WINDOW + 1) // BLOCK
            sequence.tables[1][:left] = [NO_BLOCK] * left
            for table in sequence.tables:
                while len(table) * BLOCK < start + count:
                    table.append(next(free))
            done[sequence] = start + count
            parts.append(Part(sequence, start, count, done[sequence] == len(sequence.tokens)))
        steps.check(*parts)
        assert steps.writer.check() == []
        assert len(steps.rows) == len(parts)
