"""Random lives of random sequences in an engine with a tiny pool, checked against a run of each one alone."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from core.clock import ManualClock
from core.config import EngineConfig
from core.cost import CostModel
from core.errors import ContextLengthExceeded, EngineFault, Overloaded
from core.sampling import SamplingParams
from engine.admission import AdmissionKind
from engine.decision import Part
from engine.engine import Engine, StepOutput
from engine.plan import StepPlan
from engine.sequence import NewToken, Sequence, Status
from tests.support.engines import KVCheckingRunner, Windows, run_alone, sequence

EOS_CHANCE = 0.02
MAX_WAITING_TOKENS = 40
WINDOWS: list[Windows] = [(None, None), (None, None), (3, None), (1, None), (4,), (2, 6), (None, 3, 5)]

prompts = st.builds(
    lambda shared, own: [*range(shared), *own],
    st.sampled_from([0, 4, 8, 14]),
    st.lists(st.integers(40, 41), min_size=1, max_size=3),
)
samplings = st.builds(
    SamplingParams,
    max_tokens=st.sampled_from([1, 2, 8, 12, 16]),
    seed=st.integers(0, 1),
    ignore_eos=st.booleans(),
    stop_token_ids=st.sampled_from([(), (), (3, 4)]),
)


@dataclass(eq=False)
class Life:
    """`admitted`: the engine has said that it has blocks, and not taken them back since."""

    sequence: Sequence
    expected: list[int]
    delivered: list[int]
    admitted: bool = False
    pinned: bool = False


class EngineMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.lives: dict[str, Life] = {}
        self.count = 0
        self.build(8, 4, 4, 8, True, 0, 0, (None, None))

    @initialize(
        num_blocks=st.integers(8, 14),
        block_size=st.integers(1, 3),
        seqs=st.integers(1, 6),
        budget=st.integers(1, 8),
        prefix_cache=st.booleans(),
        steps_ahead=st.sampled_from([0, 1, 1, 2]),
        headroom=st.sampled_from([0, 2, 512]),
        windows=st.sampled_from(WINDOWS),
    )
    def build(
        self,
        num_blocks: int,
        block_size: int,
        seqs: int,
        budget: int,
        prefix_cache: bool,
        steps_ahead: int,
        headroom: int,
        windows: Windows,
    ) -> None:
        """`num_blocks` for each group of layers."""
        self.windows = list(dict.fromkeys(windows))
        self.num_blocks = num_blocks * len(self.windows)
        self.block_size, self.budget, self.seqs = block_size, budget, seqs
        self.clock, cost = ManualClock(), CostModel(step_s=1.0)
        self.runner = KVCheckingRunner(self.num_blocks, block_size, EOS_CHANCE, steps_ahead, cost, self.clock, windows)
        self.runner.salt_of = self.salt_of
        config = EngineConfig(
            max_num_seqs=seqs,
            max_num_batched_tokens=budget,
            max_waiting_tokens=MAX_WAITING_TOKENS,
            prefix_cache=prefix_cache,
            headroom_tokens=headroom,
        )
        self.engine = Engine(self.runner, config, self.clock)

    def salt_of(self, row: int) -> bytes:
        return next(owner.salt for owner, known in self.engine._writer._rows.items() if known.number == row)

    # --- entering -----------------------------------------------------------------------------------------------------

    def new_life(self, prompt: list[int], params: SamplingParams, replayed: int, hold: bool, salt: bytes, older: int = 0) -> Life:
        """A life that an earlier attempt may have led up to token `replayed`; its request is older than so many others here."""
        self.count += 1
        self.clock.advance(1.0)
        expected = run_alone(prompt, params, EOS_CHANCE)
        delivered = expected[: min(replayed, len(expected) - 1)]
        born = sequence(
            f"s{self.count}",
            prompt,
            delivered=delivered,
            hold=hold,
            salt=salt,
            ticket=1000 * (self.count - older) + self.count,
            arrived_s=self.clock.now(),
            sampling=params,
        )
        return Life(born, expected, list(delivered))

    def capacity_exceeded(self, life: Life) -> bool:
        born = life.sequence
        computed = len(born.tokens) if born.hold else born.prompt_tokens + born.sampling.max_tokens - 1
        chunk = min(self.budget, max((w for w in self.windows if w is not None), default=self.budget))
        whole, under_way = -(-computed // self.block_size), (1 + self.runner.steps_ahead) * chunk
        needed = [whole if w is None else min(whole, -(-(w - 1 + under_way) // self.block_size) + 1) for w in self.windows]
        return sum(needed) > self.num_blocks

    @rule(
        newcomers=st.lists(st.tuples(prompts, samplings), min_size=1, max_size=4),
        replayed=st.integers(0, 3),
        hold=st.booleans(),
        salt=st.sampled_from([b"", b"", b"other"]),
    )
    def add(self, newcomers: list[tuple[list[int], SamplingParams]], replayed: int, hold: bool, salt: bytes) -> None:
        for prompt, params in newcomers:
            self.add_one(prompt, params, replayed, hold, salt)

    def add_one(self, prompt: list[int], params: SamplingParams, replayed: int, hold: bool, salt: bytes, older: int = 0) -> None:
        life = self.new_life(prompt, params, replayed, hold, salt, min(older, self.count))
        load = self.engine.load()
        try:
            self.engine.add(life.sequence)
        except ContextLengthExceeded:
            assert self.capacity_exceeded(life)
        except Overloaded:
            assert load.waiting > 0
            assert load.waiting_tokens + len(life.sequence.tokens) > MAX_WAITING_TOKENS
        else:
            assert not self.capacity_exceeded(life)
            self.lives[life.sequence.sequence_id] = life

    @rule(
        newcomers=st.lists(st.tuples(prompts, samplings), min_size=1, max_size=3),
        replayed=st.integers(0, 3),
        older=st.sampled_from([0, 0, 1, 2, 5]),
    )
    def reserve(self, newcomers: list[tuple[list[int], SamplingParams]], replayed: int, older: int) -> None:
        for prompt, params in newcomers:
            life = self.new_life(prompt, params, replayed, False, b"", min(older, self.count))
            try:
                self.engine.reserve(life.sequence)
            except ContextLengthExceeded:
                assert self.capacity_exceeded(life)
            else:
                assert not self.capacity_exceeded(life)
                self.lives[life.sequence.sequence_id] = life

    @rule(
        crowd=st.lists(prompts, min_size=1, max_size=4),
        claims=st.lists(st.tuples(prompts, samplings), min_size=1, max_size=2),
        as_reservation=st.booleans(),
        pinned=st.sampled_from([0, 0, 1]),
    )
    def an_older_claim_comes_to_a_standstill(
        self, crowd: list[list[int]], claims: list[tuple[list[int], SamplingParams]], as_reservation: bool, pinned: int
    ) -> None:
        """Prompts are read that no other engine has room for; when nobody has anything to do, an older request arrives."""
        for prompt in crowd:
            self.add_one(prompt, SamplingParams(max_tokens=8), 0, True, b"")
        for _ in range(200):
            if not self.engine.has_work and not self.engine.in_flight:
                break
            self.step_once()
            self.hear()
        for life in self.of(Status.HELD)[:pinned]:
            self.pin_one(life)
        for prompt, params in claims:
            if as_reservation:
                self.reserve([(prompt, params)], 0, self.count)
            else:
                self.add_one(prompt, params, 0, False, b"", older=self.count)
            self.step_once()
        self.hear()

    @rule()
    def hear(self) -> None:
        """What the engine says of admissions, and what must hold whenever it has said it."""
        for admission in self.engine.admissions():
            life = self.lives[admission.sequence.sequence_id]
            assert admission.sequence is life.sequence
            if admission.kind is AdmissionKind.GRANTED:
                assert life.sequence.status is Status.RESERVED
                self.runner.read(life.sequence, life.sequence.cached_tokens, len(life.sequence.tokens))
                life.admitted = True
            elif admission.kind is AdmissionKind.ADMITTED:
                assert life.sequence.hold
                assert not life.admitted
                life.admitted = True
            else:
                assert life.admitted
                assert not life.pinned
                life.admitted = False
        for life in self.lives.values():
            if life.sequence.hold:
                assert life.admitted == bool(life.sequence.tables)
        if not self.engine.in_flight:
            assert not (self.waits_for_nothing() and self.oldest().incoming)

    def oldest(self) -> Sequence:
        return min((life.sequence for life in self.lives.values()), key=lambda born: born.ticket)

    def waits_for_nothing(self) -> bool:
        """Whether the oldest has no blocks though nobody here is going to free his without help from other engines."""
        if not self.lives or self.oldest().tables:
            return False
        return not self.of(Status.RUNNING, Status.READY, Status.RESERVED) and not any(
            life.pinned for life in self.of(Status.HELD)
        )

    @precondition(lambda self: self.of(Status.RUNNING, Status.HELD, Status.WAITING))
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        self.pin_one(data.draw(st.sampled_from(self.of(Status.RUNNING, Status.HELD, Status.WAITING))))

    def pin_one(self, life: Life) -> None:
        """As a worker does: it has heard of all that was taken back before."""
        self.hear()
        life.pinned = self.engine.pin(life.sequence.sequence_id)
        assert life.pinned == (life.sequence.hold and bool(life.sequence.tables))

    def of(self, *statuses: Status) -> list[Life]:
        return [life for life in self.lives.values() if life.sequence.status in statuses]

    def granted(self) -> list[Life]:
        return [life for life in self.of(Status.RESERVED) if life.admitted]

    @precondition(lambda self: self.granted())
    @rule(latest_first=st.booleans(), count=st.integers(1, 3))
    def start(self, latest_first: bool, count: int) -> None:
        reserved = self.granted()
        for life in (reserved[::-1] if latest_first else reserved)[:count]:
            self.start_one(life)

    def start_one(self, life: Life) -> None:
        moved = life.sequence
        self.runner.write(moved, moved.cached_tokens, len(moved.tokens))
        token = life.expected[len(life.delivered)]
        life.delivered.append(token)
        finish = self.engine.start(moved, token)
        assert (finish is not None) == (life.delivered == life.expected)
        if finish is not None:
            self.bury(life)

    # --- leaving ------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        life = data.draw(st.sampled_from(list(self.lives.values())))
        assert self.engine.cancel(life.sequence.sequence_id)
        self.bury(life)

    @precondition(lambda self: self.of(Status.HELD))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.release_one(data.draw(st.sampled_from(self.of(Status.HELD))))

    def release_one(self, life: Life) -> None:
        self.runner.read(life.sequence, life.sequence.computed_tokens)
        assert self.engine.cancel(life.sequence.sequence_id)
        self.bury(life)

    def bury(self, life: Life) -> None:
        assert life.sequence.status is Status.FINISHED
        assert life.sequence.tables == []
        del self.lives[life.sequence.sequence_id]

    # --- stepping -----------------------------------------------------------------------------------------------------

    @rule(times=st.integers(1, 8))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.step_once()

    def step_once(self) -> None:
        """As a worker does: only when the engine says that there is work."""
        if not self.engine.has_work:
            assert not self.waits_for_nothing(), "there is no work, and yet the oldest could go on"
            return
        output = self.engine.step()
        assert output.failed == ()
        if not output.parts:
            assert output.tokens == ()
            again = self.engine.has_work  # the step that preempts admits nobody
            assert again or not self.waits_for_nothing(), "there was nothing to compute, and yet the oldest could go on"
            return
        self.check_parts(output.parts)
        self.take(output.tokens)

    @rule(times=st.integers(1, 3))
    def launch(self, times: int) -> None:
        """Without collecting, so that anything may happen while steps are in flight."""
        for _ in range(times):
            before = self.engine.in_flight
            launched = self.engine.launch()
            assert self.engine.in_flight == before + launched <= self.runner.steps_ahead + 1

    @precondition(lambda self: self.engine.in_flight)
    @rule()
    def collect(self) -> None:
        output = self.engine.collect()
        assert output.failed == ()
        self.check_parts(output.parts)
        self.take(output.tokens)

    def take(self, tokens: tuple[NewToken, ...]) -> None:
        for new in tokens:
            life = self.lives[new.sequence.sequence_id]
            if life.sequence.hold and life.sequence.preemptions and new.position < len(life.delivered):
                life.delivered.pop()  # read, and emitted, once more
            assert new.position == len(life.delivered)
            life.delivered.append(new.token)
            assert life.delivered == life.expected[: len(life.delivered)]
            assert (new.finish is not None) == (life.delivered == life.expected)
            if life.sequence.hold:
                assert life.sequence.status is Status.HELD
                assert life.sequence.computed_tokens == len(life.sequence.tokens) - 1
            elif new.finish is not None:
                self.bury(life)

    def check_parts(self, parts: tuple[Part, ...]) -> None:
        assert 0 < sum(part.count for part in parts) <= self.budget
        assert len(parts) <= self.seqs
        assert len({part.sequence.sequence_id for part in parts}) == len(parts)
        assert all(part.count > 0 for part in parts)

    @precondition(lambda self: self.engine.has_work)
    @rule(faulty=st.sampled_from([None, 0, 0, 1]))
    def step_with_a_fault(self, faulty: int | None) -> None:
        """One entry of a plan is faulty, or (None) the whole step raises."""

        def fault(plan: StepPlan) -> dict[int, str]:
            if faulty is None:
                raise RuntimeError("injected")
            return {faulty: "injected"} if faulty < len(plan.scheduled) else {}

        while self.engine.in_flight:
            self.collect()
        self.runner.fault = fault
        launched = self.engine.launch()
        self.runner.fault = None
        self.engine.launch()
        output = self.engine.collect() if launched else StepOutput()
        owners = [part.sequence for part in output.parts]
        doomed = owners if faulty is None else owners[faulty : faulty + 1]
        assert [failed for failed, _ in output.failed] == doomed
        assert output.failed_whole == (bool(doomed) and doomed == owners)
        assert all(isinstance(error, EngineFault) for _, error in output.failed)
        for failed in doomed:
            self.bury(self.lives[failed.sequence_id])
        self.take(output.tokens)

    @invariant()
    def nothing_is_leaked_shared_or_miscounted(self) -> None:
        left = [f"sequence {name} is still {life.sequence.status.value}" for name, life in self.lives.items()]
        assert sorted(self.engine.invariants()) == sorted(left)
        assert self.runner.wrong == []

    def teardown(self) -> None:
        """Everyone who was accepted ends once transfers do, and leaves nothing behind."""
        for _ in range(10_000):
            if not self.lives:
                break
            for life in self.of(Status.HELD):
                self.release_one(life)
            for life in self.granted():
                self.start_one(life)
            self.hear()
            self.step_once()
        while self.engine.in_flight:
            assert self.engine.collect().tokens == (), "only tokens past an end are left"
        assert self.engine.invariants() == []
        assert self.runner.wrong == []


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
