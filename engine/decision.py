"""What the scheduler decides for one step, in terms of sequences. `engine.plan_writer` turns it into plain data."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from engine.sequence import Sequence


class Part(msgspec.Struct, frozen=True, eq=False, gc=False):
    """What a step computes of one sequence: tokens `[start, start + count)`; `samples` when that reaches its last token, so
    that one new token is drawn. `sequence.tables` have room."""

    sequence: Sequence
    start: int
    count: int
    samples: bool


@dataclass(frozen=True)
class Decision:
    """One step, never empty. `preempted` sequences lost their blocks to make room and wait again."""

    parts: tuple[Part, ...]
    preempted: tuple[Sequence, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(part.count for part in self.parts)
