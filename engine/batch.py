"""Turns a step's plan into the tensors that the model and its attention read.

Building must not cost more than a sliver of a decode step, so everything is done on whole arrays, block tables are kept from
step to step (`engine.runner_rows`), and on a GPU all integers travel in one copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.attention.base import AttentionBatch
from engine.plan import Scheduled, StepPlan
from engine.runner_rows import Ints, RunnerRows, to_device


@dataclass(frozen=True)
class StepBatch:
    """One step on the device.

    Attributes:
        input_ids, position_ids: int64 `[1, T]`, all sequences packed.
        attention: for each group of layers. They differ in block tables and slots.
        sample_rows: int64 `[n]`, the rows of `[T, ...]` whose logits are wanted, in order of the plan's sampling entries.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention: tuple[AttentionBatch, ...]
    sample_rows: torch.Tensor


@dataclass(frozen=True)
class StepArrays:
    """One step on the host, all int32. `T` tokens of `S` rows, `n` of which sample.

    `tokens[T]` is -1 where the runner drew the token itself; `drawn_places` and `drawn_rows` say where those are and whose.
    The rest is what `StepBatch` and `AttentionBatch` hold; `places` are the slots and the block tables of each group in turn.
    """

    tokens: Ints
    positions: Ints
    sample_rows: Ints
    query_start: Ints
    context_lens: Ints
    drawn_places: Ints
    drawn_rows: Ints
    places: list[Ints]


def step_arrays(plan: StepPlan, rows: RunnerRows, block_size: int) -> StepArrays:
    """What a step's tensors contain. Every row must have blocks for the tokens scheduled."""
    scheduled = plan.scheduled
    numbers, starts, counts, samples = _columns(scheduled)
    query_start = np.zeros(len(scheduled) + 1, dtype=np.int32)
    np.cumsum(counts, out=query_start[1:])
    context_lens = starts + counts
    if len(scheduled) == query_start[-1]:
        places, positions = np.arange(len(scheduled), dtype=np.int32), starts
    else:
        places = np.repeat(np.arange(len(scheduled), dtype=np.int32), counts)
        positions = np.arange(query_start[-1], dtype=np.int32) + np.repeat(starts - query_start[:-1], counts)
    blocks, offsets = positions // block_size, positions % block_size
    own: list[Ints] = []
    for table, widths in zip(rows.tables, rows.widths, strict=True):
        tables = table[numbers, : int(widths[numbers].max())]
        own += [(tables[places, blocks] * block_size + offsets).astype(np.int32, copy=False), tables]
    tokens = _known_tokens(scheduled, rows, query_start, starts, numbers)
    drawn = np.flatnonzero(tokens < 0)
    return StepArrays(
        tokens=tokens,
        positions=positions.astype(np.int32, copy=False),
        sample_rows=query_start[1:][samples] - 1,
        query_start=query_start,
        context_lens=context_lens,
        drawn_places=drawn.astype(np.int32, copy=False),
        drawn_rows=numbers[places[drawn]],
        places=own,
    )


def _columns(scheduled: tuple[Scheduled, ...]) -> tuple[Ints, Ints, Ints, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
    numbers = np.array([item.row for item in scheduled], dtype=np.int32)
    starts = np.array([item.start for item in scheduled], dtype=np.int32)
    counts = np.array([item.count for item in scheduled], dtype=np.int32)
    return numbers, starts, counts, np.array([item.samples for item in scheduled], dtype=bool)


def _known_tokens(scheduled: tuple[Scheduled, ...], rows: RunnerRows, query_start: Ints, starts: Ints, numbers: Ints) -> Ints:
    """int32 `[T]`: the tokens that rows were admitted with, -1 for those that were drawn here."""
    tokens = np.full(query_start[-1], -1, dtype=np.int32)
    for index in np.flatnonzero(starts < rows.known[numbers]).tolist():
        item, first = scheduled[index], query_start[index]
        tokens[first : first + item.count] = rows.tokens(item.row)[item.start : item.start + item.count]
    return tokens


class BatchBuilder:
    """Builds batches for one runner from what it keeps of its rows."""

    def __init__(self, block_size: int, device: torch.device, rows: RunnerRows) -> None:
        self._block_size = block_size
        self._device = device
        self._rows = rows

    def build(self, plan: StepPlan) -> StepBatch:
        """Tensors for a plan whose changes are made already."""
        host = step_arrays(plan, self._rows, self._block_size)
        if self._device.type == "cpu" and len(host.drawn_rows):
            host.tokens[host.drawn_places] = self._rows.drawn.numpy()[host.drawn_rows]
        parts = [host.tokens, host.positions, host.sample_rows, host.query_start, host.context_lens]
        parts += [host.drawn_places, host.drawn_rows, *host.places]
        ids, place, keep, start, context, drawn, own, *places = to_device(parts, self._device)
        ids = ids.long()
        if self._device.type != "cpu" and len(host.drawn_rows):
            ids.index_copy_(0, drawn.long(), self._rows.drawn.index_select(0, own))
        query_len, context_len = int(np.diff(host.query_start).max()), int(host.context_lens.max())
        attention = [
            AttentionBatch(
                query_start=start,
                context_lens=context,
                block_tables=places[index + 1],
                slots=places[index].long(),
                max_query_len=query_len,
                max_context_len=context_len,
            )
            for index in range(0, len(places), 2)
        ]
        return StepBatch(ids[None], place.long()[None], tuple(attention), keep.long())
