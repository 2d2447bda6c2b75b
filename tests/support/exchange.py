"""Engines that read prompts for each other and hand them over, without workers, leases or bytes: only who waits for whom.

Messages between two engines arrive in order, each after its own number of turns. They are those of the workers: a prompt has its
blocks (`admitted`), has lost them (`taken back`), there is room for it (`grant`), here is its KV (`kv`), which frees it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from random import Random

from core.clock import ManualClock
from core.config import EngineConfig
from core.sampling import SamplingParams
from engine.admission import AdmissionKind
from engine.engine import Engine
from engine.sequence import NewToken, Sequence, Status
from tests.support.engines import run_alone, sequence, simulated_runner


@dataclass(eq=False)
class Job:
    """One request: read by engine `prefill`, written by engine `decode`, which may be the same. `admissions` counts how often its
    prompt got blocks, and `answered` is which of these times the writing side asked its engine for room, so that a grant for an
    earlier time can be told."""

    ticket: int
    prompt: list[int]
    max_tokens: int
    prefill: int
    decode: int
    label: str = ""
    admissions: int = 0
    answered: int = 0
    granted: bool = False
    reading: Sequence | None = None
    writing: Sequence | None = None
    output: list[int] = field(default_factory=list)
    finished_at: int | None = None

    @property
    def name(self) -> str:
        return f"job {self.ticket}{self.label}"

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(max_tokens=self.max_tokens, ignore_eos=True, seed=self.ticket)


@dataclass(frozen=True)
class Note:
    kind: str
    job: Job
    admission: int
    due: int


class Exchange:
    """`delay()` is how many turns a message takes. `computed_tokens` counts all that steps computed, `moved_tokens` all that was
    handed over."""

    def __init__(self, num_blocks: list[int], config: EngineConfig, random: Random, max_delay: int = 3) -> None:
        self.engines = [Engine(simulated_runner(count), config, ManualClock()) for count in num_blocks]
        self.jobs: list[Job] = []
        self.turn = 0
        self.computed_tokens = self.moved_tokens = self.taken_back = 0
        self._random = random
        self._max_delay = max_delay
        self._mail: dict[tuple[int, int], deque[Note]] = {}
        self._last_progress = 0

    @property
    def unfinished(self) -> list[Job]:
        return [job for job in self.jobs if job.finished_at is None]

    @property
    def needed_tokens(self) -> int:
        """What would have been computed if nobody had ever lost blocks."""
        return sum(len(job.prompt) + job.max_tokens - 1 for job in self.jobs)

    def submit(self, job: Job) -> None:
        self.jobs.append(job)
        job.reading = sequence(job.name, job.prompt, sampling=job.sampling, hold=job.prefill != job.decode, ticket=job.ticket)
        self.engines[job.prefill].add(job.reading)

    def run(self, max_turns: int = 20_000, patience: int = 200) -> None:
        """Until all is finished. Fails if no token is computed and nothing is handed over for `patience` turns."""
        until = self.turn + max_turns
        while self.unfinished:
            self.take_turn()
            assert self.turn < until, f"{len(self.unfinished)} jobs are unfinished after {max_turns} turns"
            assert self.turn - self._last_progress < patience, "frozen"
        while any(self._mail.values()):
            self.take_turn()
        assert [engine.invariants() for engine in self.engines] == [[]] * len(self.engines)
        for job in self.jobs:
            assert job.output == run_alone(job.prompt, job.sampling)

    def take_turn(self) -> None:
        self.turn += 1
        for (at, _), notes in list(self._mail.items()):
            while notes and notes[0].due <= self.turn:
                self._handle(at, notes.popleft())
        for engine in self.engines:
            self._hear(engine)
            output = engine.step()
            assert not output.failed
            self.computed_tokens += sum(part.count for part in output.parts)
            if output.parts:
                self._last_progress = self.turn
            for new in output.tokens:
                self._drawn(new)
            self._hear(engine)

    def _job(self, name: str) -> Job:
        return next(job for job in self.jobs if job.name == name)

    def _send(self, kind: str, job: Job, at: int, to: int, admission: int = 0) -> None:
        notes = self._mail.setdefault((to, at), deque())
        due = self.turn + self._random.randint(1, self._max_delay)
        notes.append(Note(kind, job, admission, max([due, *(note.due for note in notes)])))

    def _hear(self, engine: Engine) -> None:
        for admission in engine.admissions():
            job = self._job(admission.sequence.sequence_id)
            if admission.kind is AdmissionKind.ADMITTED:
                job.admissions += 1
                self._send("admitted", job, job.prefill, job.decode, job.admissions)
            elif admission.kind is AdmissionKind.TAKEN_BACK:
                self.taken_back += 1
                assert not job.granted
                self._send("taken back", job, job.prefill, job.decode)
            else:
                self._send("grant", job, job.decode, job.prefill, job.answered)

    def _handle(self, at: int, note: Note) -> None:
        job, engine = note.job, self.engines[at]
        match note.kind:
            case "admitted":
                job.answered = note.admission
                job.writing = sequence(job.name, job.prompt, sampling=job.sampling, ticket=job.ticket)
                engine.reserve(job.writing)
            case "taken back":
                assert engine.cancel(job.name)
            case "grant":
                if note.admission == job.admissions and engine.pin(job.name):
                    job.granted = True
                    self._hand_over(job)
            case "kv":
                self._last_progress = self.turn
                self.moved_tokens += len(job.prompt)
                assert job.writing is not None
                if engine.start(job.writing, job.output[0]) is not None:
                    job.finished_at = self.turn
                self._send("done", job, job.decode, job.prefill)
            case "done":
                assert engine.cancel(job.name)

    def _hand_over(self, job: Job) -> None:
        if job.granted and job.reading is not None and job.reading.status is Status.HELD:
            self._send("kv", job, job.prefill, job.decode)

    def _drawn(self, new: NewToken) -> None:
        job = self._job(new.sequence.sequence_id)
        if not new.sequence.hold:
            job.output.append(new.token)
            if new.finish is not None:
                job.finished_at = self.turn
            return
        job.output = job.output or [new.token]
        assert job.output == [new.token]
        self._hand_over(job)
