"""TEMPORARY: the coming Engine API over today's engine. Deleted when admission and steps land."""
from __future__ import annotations
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import Any
from engine.admission import Admission, AdmissionKind
from engine.decision import Part
from engine.engine import Engine
from engine.sequence import Sequence, Status

@dataclass(frozen=True)
class StepOutput:
    tokens: tuple = ()
    failed: tuple = ()
    parts: tuple = ()
    failed_whole: bool = False

class ShimEngine(Engine):
    def __init__(self, *args: Any, **kw: Any) -> None:
        super().__init__(*args, **kw)
        self._asked: deque[Sequence] = deque()
        self._done: deque[StepOutput] = deque()
        self._said: list[Admission] = []
        self._hold: dict[str, Sequence] = {}

    def add(self, sequence: Sequence) -> None:
        super().add(sequence)
        if sequence.hold:
            self._hold[sequence.sequence_id] = sequence

    def reserve(self, sequence: Sequence) -> None:
        self._check(sequence)
        self._scheduler._check_fits(sequence)
        self._asked.append(sequence)

    def cancel(self, sequence_id: str) -> bool:
        self._hold.pop(sequence_id, None)
        for sequence in self._asked:
            if sequence.sequence_id == sequence_id:
                self._asked.remove(sequence)
                return True
        return super().cancel(sequence_id)

    def pin(self, sequence_id: str) -> bool:
        sequence = self._sequences.get(sequence_id)
        return sequence is not None and bool(sequence.blocks)

    def admissions(self):
        for name, sequence in list(self._hold.items()):
            if sequence.blocks:
                self._said.append(Admission(AdmissionKind.ADMITTED, sequence))
                del self._hold[name]
        said, self._said = tuple(self._said), []
        return said

    @property
    def in_flight(self) -> int:
        return len(self._done)

    @property
    def ready(self) -> bool:
        return bool(self._done)

    def launch(self, on_layer=None) -> bool:
        while self._asked and super().reserve(self._asked[0]):
            self._said.append(Admission(AdmissionKind.GRANTED, self._asked.popleft()))
        if self._done or not self.has_work:
            return False
        def listen(plan, layer):
            if on_layer:
                on_layer(tuple(Part(i.sequence, i.start, i.count, i.samples) for i in plan.scheduled if i.sequence.hold), layer)
        out = super().step(listen)
        if out.plan is None:
            return False
        parts = tuple(Part(i.sequence, i.start, i.count, i.samples) for i in out.plan.scheduled)
        self._done.append(StepOutput(out.tokens, out.failed, parts, len(out.failed) == len(parts)))
        return True

    def collect(self):
        return self._done.popleft() if self._done else StepOutput()

    def load(self):
        import dataclasses
        load = super().load()
        return dataclasses.replace(load, waiting=load.waiting + len(self._asked))
