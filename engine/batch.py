"""Turns a step's plan into the tensors that the model and its attention read.

Building must not cost more than a sliver of a decode step, so everything is done on whole arrays, a sequence's block table is
converted once and then only extended, and on a GPU all integers travel in one copy.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from engine.attention.base import AttentionBatch
from engine.plan import StepPlan
from engine.sequence import Sequence

_Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class StepBatch:
    """One step on the device.

    Attributes:
        input_ids, position_ids: int64 `[1, T]`, all sequences packed.
        sample_rows: int64 `[n]`, the rows whose logits are wanted, in order of the plan's sampling entries.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention: AttentionBatch
    sample_rows: torch.Tensor


@dataclass(frozen=True)
class StepArrays:
    """One step on the host: the contents of a `StepBatch`, all int32. `T` tokens of `S` sequences, `n` of which sample."""

    tokens: _Ints
    positions: _Ints
    slots: _Ints
    sample_rows: _Ints
    query_start: _Ints
    context_lens: _Ints
    block_tables: _Ints


class _Table:
    """One sequence's blocks as an array that grows with it."""

    def __init__(self) -> None:
        self.blocks: _Ints = np.zeros(8, dtype=np.int32)
        self.count = 0
        self.preemptions = -1

    def update(self, sequence: Sequence) -> None:
        blocks, known = sequence.blocks, self.count
        if (
            self.preemptions != sequence.preemptions
            or known > len(blocks)
            or (known > 0 and self.blocks[known - 1] != blocks[known - 1])
        ):
            known, self.preemptions = 0, sequence.preemptions
        if len(blocks) > len(self.blocks):
            grown = np.zeros(2 * len(blocks), dtype=np.int32)
            grown[:known] = self.blocks[:known]
            self.blocks = grown
        if len(blocks) > known:
            self.blocks[known : len(blocks)] = blocks[known:]
        self.count = len(blocks)


class BatchBuilder:
    """Builds batches for one engine. Remembers block tables of living sequences between steps."""

    def __init__(self, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = device
        self._tables: weakref.WeakKeyDictionary[Sequence, _Table] = weakref.WeakKeyDictionary()

    def build(self, plan: StepPlan) -> StepBatch:
        """Tensors for the plan. Every sequence must have blocks for the tokens scheduled."""
        host = self.arrays(plan)
        parts = [host.tokens, host.positions, host.slots, host.sample_rows, host.query_start, host.context_lens]
        ids, place, slot, keep, start, context, table = self._to_device([*parts, host.block_tables])
        attention = AttentionBatch(
            query_start=start,
            context_lens=context,
            block_tables=table,
            slots=slot.long(),
            max_query_len=int(np.diff(host.query_start).max()),
            max_context_len=int(host.context_lens.max()),
        )
        return StepBatch(ids.long()[None], place.long()[None], attention, keep.long())

    def arrays(self, plan: StepPlan) -> StepArrays:
        """What `build` puts on the device."""
        scheduled = plan.scheduled
        tables = self._block_tables(plan)
        starts = np.array([item.start for item in scheduled], dtype=np.int32)
        counts = np.array([item.count for item in scheduled], dtype=np.int32)
        query_start = np.zeros(len(scheduled) + 1, dtype=np.int32)
        np.cumsum(counts, out=query_start[1:])
        if len(scheduled) == query_start[-1]:
            tokens = np.array([item.sequence.tokens[item.start] for item in scheduled], dtype=np.int32)
            rows, positions = np.arange(len(scheduled)), starts
        else:
            tokens = np.empty(query_start[-1], dtype=np.int32)
            for first, item in zip(query_start.tolist(), scheduled, strict=False):
                tokens[first : first + item.count] = item.sequence.tokens[item.start : item.start + item.count]
            rows = np.repeat(np.arange(len(scheduled)), counts)
            positions = np.arange(len(tokens), dtype=np.int32) + np.repeat(starts - query_start[:-1], counts)
        slots = tables[rows, positions // self._block_size] * self._block_size + positions % self._block_size
        samples = np.array([item.samples for item in scheduled], dtype=bool)
        parts = [tokens, positions, slots, query_start[1:][samples] - 1, query_start, starts + counts, tables]
        return StepArrays(*(part.astype(np.int32, copy=False) for part in parts))

    def _block_tables(self, plan: StepPlan) -> _Ints:
        """int32 `[S, widest]`, padded with 0."""
        tables = []
        for item in plan.scheduled:
            table = self._tables.get(item.sequence)
            if table is None:
                table = self._tables[item.sequence] = _Table()
            table.update(item.sequence)
            tables.append(table)
        width = max(table.count for table in tables)
        matrix = np.zeros((len(tables), width), dtype=np.int32)
        for row, table in zip(matrix, tables, strict=True):
            row[: table.count] = table.blocks[: table.count]
        return matrix

    def _to_device(self, arrays: list[_Ints]) -> list[torch.Tensor]:
        if self._device.type == "cpu":
            return [torch.from_numpy(array) for array in arrays]
        packed = torch.from_numpy(np.concatenate([array.ravel() for array in arrays])).pin_memory()
        whole = packed.to(self._device, non_blocking=True)
        pieces = torch.split(whole, [array.size for array in arrays])
        return [piece.view(array.shape) for piece, array in zip(pieces, arrays, strict=True)]
