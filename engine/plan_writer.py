"""Lays a decision out as plain data: which row stands for which sequence, and what its runner has not been told yet.

The rows that a runner has are those of the last plan: whoever is missing from a plan is dropped by it, and nobody need say so. A
scheduler gives nearly every running sequence something to do in every step; a prompt that gets nothing in one comes back with all
its tokens, which are known.

Neighbours: `engine.decision` comes in, `engine.plan` goes out, `engine.engine` calls.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from core.errors import EngineFault
from core.groups import NO_BLOCK
from engine.decision import Part
from engine.plan import Admitted, BlocksAdded, Scheduled, StepPlan
from engine.sequence import Sequence


@dataclass(slots=True, eq=False)
class _Row:
    """What the runner knows of one row: whose it is, in which of its tenancies, and how much of each of its tables."""

    number: int
    tenancy: int
    told: list[int]


class PlanWriter:
    """Writes the plans of one engine, each once and in order."""

    def __init__(self) -> None:
        self._rows: dict[Sequence, _Row] = {}
        self._vacant: list[int] = []
        self._owed: list[int] = []
        self._made = 0
        self._step = 0

    def write(self, parts: tuple[Part, ...]) -> StepPlan:
        """The next plan. Raises EngineFault if a sequence comes (back) whose tokens are not all known: nobody could tell a
        runner what it is."""
        rows = [row for row in map(self._known, [part.sequence for part in parts]) if row is not None]
        dropped, self._owed = self._owed, []
        admitted: list[Admitted] = []
        changed = not len(rows) == len(parts) == len(self._rows)
        if changed:
            dropped += self._drop_absent(parts)
        for number in dropped:
            heapq.heappush(self._vacant, number)
        if changed:
            rows = [self._rows.get(part.sequence) or self._admit(part.sequence, admitted) for part in parts]
        scheduled: list[Scheduled] = []
        blocks: list[BlocksAdded] = []
        for part, row in zip(parts, rows, strict=True):
            tables = part.sequence.tables
            if row.told[0] != len(tables[0]) or len(tables) > 1:
                _tell(row, tables, blocks)
            scheduled.append(Scheduled(row.number, part.start, part.count, part.samples))
        self._step += 1
        return StepPlan(self._step, tuple(scheduled), tuple(dropped), tuple(admitted), tuple(blocks))

    def write_alone(self, sequence: Sequence) -> StepPlan:
        """A plan that computes a new sequence whole and draws one token, in a row that the next plan drops. Others stay."""
        admitted: list[Admitted] = []
        row = self._admit(sequence, admitted)
        blocks: list[BlocksAdded] = []
        _tell(row, sequence.tables, blocks)
        del self._rows[sequence]
        self._owed.append(row.number)
        self._step += 1
        item = Scheduled(row.number, 0, len(sequence.tokens), True)
        return StepPlan(self._step, (item,), (), tuple(admitted), tuple(blocks))

    def check(self) -> list[str]:
        """Every violated invariant, in words."""
        numbers = sorted([*[row.number for row in self._rows.values()], *self._vacant, *self._owed])
        return [] if numbers == list(range(self._made)) else [f"rows {numbers} are not the {self._made} that were made"]

    def _known(self, sequence: Sequence) -> _Row | None:
        row = self._rows.get(sequence)
        return row if row is not None and row.tenancy == sequence.tenancy else None

    def _drop_absent(self, parts: tuple[Part, ...]) -> list[int]:
        """Forget the rows that are not in the plan, or are of an earlier tenancy; their numbers."""
        present = {part.sequence for part in parts}
        gone = [sequence for sequence in self._rows if sequence not in present or self._known(sequence) is None]
        return [self._rows.pop(sequence).number for sequence in gone]

    def _admit(self, sequence: Sequence, admitted: list[Admitted]) -> _Row:
        if sequence.pending_tokens:
            raise EngineFault(f"sequence {sequence.sequence_id} came back to the batch before its last token was known")
        if self._vacant:
            number = heapq.heappop(self._vacant)  # the smallest, so that runners' tables stay dense
        else:
            number, self._made = self._made, self._made + 1
        admitted.append(Admitted(number, tuple(sequence.tokens), sequence.prompt_tokens, sequence.sampling))
        row = self._rows[sequence] = _Row(number, sequence.tenancy, [0] * len(sequence.tables))
        return row


def _tell(row: _Row, tables: list[list[int]], blocks: list[BlocksAdded]) -> None:
    """Add to `blocks` what the runner has not been told of a row's tables. What a window has left it need not know."""
    for group, table in enumerate(tables):
        first = row.told[group]
        if first == len(table):
            continue
        row.told[group] = len(table)
        while first < len(table) and table[first] == NO_BLOCK:
            first += 1
        blocks.append(BlocksAdded(row.number, first, tuple(table[first:]), group))
