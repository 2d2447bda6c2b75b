"""Anything, in any order, happens to the generations of a gateway: workers beat, die, come back, refuse and fail; tokens come,
come late or never; clients hang up; the policy places, holds and refuses as it likes, and sometimes raises. After each event
every generation is in exactly one state, and all that is kept of it agrees with that. In the end nothing is left over."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from core.cost import CostModel
from core.errors import _BY_CODE, DeadlineExceeded, HetServeError, Overloaded, ProtocolError, Unavailable, from_wire
from core.layout import KVLayout, LayerShape
from core.messages import Address, Heartbeat, Load, ServedBy
from core.request import FinishReason, Request
from core.sampling import SamplingParams
from core.slo import SLO
from gateway.serving.actions import Action
from gateway.serving.events import Event, Failure, Fenced, Progress
from gateway.serving.generation import Generation, State
from gateway.serving.journal import Journal, Outcome
from gateway.serving.lifecycle import SPARE_DEADLINES, LifeCycle, Limits
from gateway.text.token_reader import Delta
from router.policy import NOBODY, Assignment, Decision, Demand, Hold, Rejection, candidates
from router.state import ClusterState, InstanceKey, Snapshot
from tests.gateway.strict_dispatcher import StrictDispatcher

NAMES = ["a", "b", "c"]
CODES = [*sorted(_BY_CODE), "from_the_future"]
LIKELY_CODES = ["engine_fault", "unavailable", "worker_lost", "transfer_failed"]
MOODS = st.integers(0, (1 << 31) - 1)
LIMITS = Limits(request_timeout_s=60.0, max_attempts=3, forgiven_by_tokens=4, max_concurrent=12, max_held=3, patience_s=5.0)
LAYOUT = KVLayout.whole(layers=[LayerShape(2, 8, 8)], dtype="float32", block_size=4)


class MoodyPolicy:
    """Any valid choice, by a number that changes with each question. Even numbers that say nothing else place."""

    def __init__(self) -> None:
        self.mood = 0
        self.calm = False
        self.asked = 0

    def assign(self, demand: Demand, snapshot: Snapshot, avoid: frozenset[InstanceKey] = NOBODY) -> Decision:
        self.asked += 1
        options = candidates(demand, snapshot, avoid, 0)
        pairs = [(p, d) for d in options.decode for p in options.prefill if p.kind == d.kind and p.key != d.key]
        places = [(None, item) for item in options.local] + pairs
        mood, self.mood = self.mood, (self.mood * 1103515245 + 12345) % (1 << 31) if self.mood else 0
        kind = 0 if self.calm else mood // 7 % 8
        if kind == 7 and mood % 5 == 0:
            raise ZeroDivisionError
        if not places or kind == 6:
            return Rejection("nobody", 2.0 if mood % 3 == 1 else None)
        if kind in (4, 5):
            return Hold("not now", 1.0)
        prefill, decode = places[mood // 64 % len(places)]
        return Assignment(prefill, decode, 0.1, 0.01, "so")


class LifeCycleMachine(RuleBasedStateMachine):
    @initialize(roles=st.lists(st.sampled_from(["mixed", "mixed", "prefill", "decode"]), min_size=1, max_size=3))
    def begin(self, roles: list[str]) -> None:
        self.now_s = 1.0
        self.policy = MoodyPolicy()
        self.cluster = ClusterState(dead_after_s=1.5, stuck_after_s=3.0)
        self.life = LifeCycle(self.policy, self.cluster, Journal(recent=4), LIMITS)
        self.dispatcher = StrictDispatcher(self.life)
        self.generations: list[Generation] = []
        self.sent: dict[str, list[int]] = {}
        self.finished: set[str] = set()
        self.newest_ticket = 0
        self.arrivals = 0
        for name, role in zip(NAMES, roles, strict=False):
            self.take(heartbeat(name, 1, role, 200, Load(free_blocks=50)))

    # --- what happens

    @rule(
        prompt=st.sampled_from([1, 3, 9, 30]),
        ttft_s=st.sampled_from([None, 0.5, 3.0, 100.0]),
        mood=MOODS,
    )
    def arrive(self, prompt: int, ttft_s: float | None, mood: int) -> None:
        try:
            self.life.admit(1)
        except Overloaded:
            assert self.live == LIMITS.max_concurrent
            return
        self.arrivals += 1
        self.policy.mood = mood
        request = Request(
            request_id=f"r{self.arrivals}",
            prompt=tuple(range(prompt)),
            sampling=SamplingParams(max_tokens=20),
            slo=SLO(ttft_s=ttft_s),
            arrived_s=self.now_s,
        )
        before = self.life.invariants(), self.cluster.snapshot()
        try:
            generation, actions = self.life.arrive(request, self.now_s)
        except (Overloaded, Unavailable, ZeroDivisionError):
            assert (self.life.invariants(), self.cluster.snapshot()) == before
            return
        assert generation.ticket > self.newest_ticket
        self.newest_ticket = generation.ticket
        self.generations.append(generation)
        self.sent[generation.generation_id] = []
        self.dispatcher.begin(generation)
        self.carry_out(actions)

    @rule(
        name=st.sampled_from(NAMES),
        incarnation=st.sampled_from([1, 1, 1, 1, 2]),
        role=st.sampled_from(["mixed", "mixed", "mixed", "prefill", "decode", "decode", "cook"]),
        capacity=st.sampled_from([200, 200, 24]),
        busy=st.booleans(),
        draining=st.sampled_from([False, False, False, True]),
        newest_ticket=st.sampled_from([0, 0, 5, 50]),
    )
    def beat(self, name: str, incarnation: int, role: str, capacity: int, busy: bool, draining: bool, newest_ticket: int) -> None:
        load = Load(running=int(busy), free_blocks=capacity // 4, draining=draining, newest_ticket=newest_ticket)
        try:
            self.take(heartbeat(name, incarnation, role, capacity, load))
        except ProtocolError:
            assert role == "cook"
        else:
            self.newest_ticket = max(self.newest_ticket, newest_ticket)

    @precondition(lambda self: self.dispatcher.launched)
    @rule(
        which=st.integers(0, 31),
        old=st.sampled_from([False, False, False, True]),
        prefill=st.booleans(),
        tokens=st.integers(0, 3),
        end=st.sampled_from([None, None, None, None, None, None, "finish", "cut"]),
        served=st.booleans(),
    )
    def progress(self, which: int, old: bool, prefill: bool, tokens: int, end: str | None, served: bool) -> None:
        attempt_id = self.some_attempt(which, old)
        generation, attempt = self.dispatcher.launched[attempt_id]
        worker = attempt.workers[-1 if prefill else 0]
        key = worker.name, worker.incarnation
        sent = self.sent[generation.generation_id]
        fresh = [len(sent) + index for index in range(tokens)]
        delta = Delta(key, tokens=fresh, finish=None if end is None else FinishReason.STOP, cut=end == "cut")
        if served:
            delta.served.append((key, ServedBy(cached_tokens=7 * which, queue_s=0.1)))
        counts = not generation.done and (attempt_id in self.dispatcher.open or attempt_id in self.dispatcher.fencing)
        open_before = attempt_id in self.dispatcher.open
        if counts:
            sent += fresh
        self.take(Progress(attempt_id, delta))
        if counts and end is not None:
            assert generation.entry.outcome is Outcome.COMPLETED
            if end == "finish" and open_before:
                self.finished.add(attempt_id)

    @precondition(lambda self: self.dispatcher.launched)
    @rule(
        which=st.integers(0, 31),
        old=st.sampled_from([False, False, False, True]),
        worker=st.sampled_from(["decode", "decode", "prefill", "prefill", "nobody", "stranger"]),
        code=st.one_of(st.sampled_from(LIKELY_CODES), st.sampled_from(CODES)),
        mood=MOODS,
    )
    def fail(self, which: int, old: bool, worker: str, code: str, mood: int) -> None:
        attempt_id = self.some_attempt(which, old)
        generation, attempt = self.dispatcher.launched[attempt_id]
        keys = {"decode": attempt.workers[0], "prefill": attempt.workers[-1], "stranger": Address("stranger", 1, "")}
        who = None if worker == "nobody" else (keys[worker].name, keys[worker].incarnation)
        self.policy.mood = mood
        counts = attempt_id in self.dispatcher.open and (who is None or attempt.needs(who))
        failures = generation.failures
        self.take(Failure(attempt_id, who, code, "scripted"))
        if counts:
            assert attempt_id not in self.dispatcher.open
            error = from_wire(code, "")
            if not error.retryable and not isinstance(error, Overloaded):
                assert generation.entry.error == error.code
        else:
            assert generation.failures == failures

    @precondition(lambda self: self.dispatcher.open)
    @rule(tokens=st.integers(1, 3), mood=MOODS)
    def step(self, tokens: int, mood: int) -> None:
        """Every worker that decodes makes as many tokens for each of its sequences."""
        self.policy.mood = mood
        for attempt_id in sorted(self.dispatcher.open):
            generation, attempt = self.dispatcher.launched[attempt_id]
            sent = self.sent[generation.generation_id]
            fresh = [len(sent) + index for index in range(tokens)]
            sent += fresh
            self.take(Progress(attempt_id, Delta(attempt.assignment.decode.key, tokens=fresh)))

    @precondition(lambda self: self.dispatcher.fencing)
    @rule(which=st.integers(0, 31), mood=MOODS)
    def fenced(self, which: int, mood: int) -> None:
        self.policy.mood = mood
        self.fence(sorted(self.dispatcher.fencing)[which % len(self.dispatcher.fencing)])

    @rule(
        what=st.sampled_from(["cancel", "cancel", "lose", "lose", "deaf", "unreachable", "break down", "fenced again", "close"]),
        which=st.integers(0, 31),
        name=st.sampled_from(NAMES),
        incarnation=st.integers(1, 2),
        mood=MOODS,
    )
    def something_rare(self, what: str, which: int, name: str, incarnation: int, mood: int) -> None:
        self.policy.mood = mood
        if what == "lose":
            self.carry_out(self.life.lose((name, incarnation), self.now_s))
        elif what == "deaf":
            self.dispatcher.unreachable ^= {(name, incarnation)}
        elif what == "fenced again":
            known = [each for each in self.dispatcher.launched if each not in {*self.dispatcher.open, *self.dispatcher.fencing}]
            attempt_id = known[which % len(known)] if known else "unknown-1"
            assert self.life.take(Fenced(attempt_id), self.now_s) == []
        elif what == "close" and which % 4 == 0:
            self.carry_out(self.life.close(Unavailable("closing"), self.now_s))
            assert self.live == 0
        elif what == "unreachable" and self.dispatcher.launched:
            attempt_id = self.some_attempt(which, which % 2 == 0)
            worker = self.dispatcher.launched[attempt_id][1].workers[0]
            self.carry_out(self.life.unreachable(attempt_id, (worker.name, worker.incarnation), self.now_s))
        elif what == "cancel" and self.generations:
            generation = self.generations[-1 - which % len(self.generations)]
            done = generation.done
            self.carry_out(self.life.cancel(generation, self.now_s))
            assert generation.done
            assert done or generation.entry.outcome is Outcome.CANCELLED
        elif what == "break down" and self.generations:
            generation = self.generations[-1 - which % len(self.generations)]
            self.carry_out(self.life.fail(generation.generation_id, HetServeError("broken"), self.now_s))
            assert generation.done

    @rule(
        seconds=st.sampled_from([0.0, 0.1, 0.1, 0.5, 0.5, 1.4, 2.0, 5.0, 20.0]),
        alive=st.sampled_from([True, True, True, False]),
        mood=MOODS,
    )
    def tick(self, seconds: float, alive: bool, mood: int) -> None:
        """Whoever is `alive` beats as before."""
        self.now_s += seconds
        self.policy.mood = mood
        for instance in self.cluster.snapshot().instances if alive else ():
            self.take(instance.beat)
        self.carry_out(self.life.tick(self.now_s))
        for generation in self.generations:
            late = self.now_s >= generation.expires_s
            assert generation.done or not late
            if generation.state is State.HELD:
                assert not 0 < generation.patience_until_s <= self.now_s
            error = self.dispatcher.clients[generation.generation_id].error
            assert not isinstance(error, DeadlineExceeded) or late or error.args == ("scripted",)

    # --- what holds whatever happened

    @invariant()
    def each_is_in_one_state_and_everything_agrees_with_it(self) -> None:
        if not hasattr(self, "life"):
            return
        life, dispatcher = self.life, self.dispatcher
        outcomes = dict.fromkeys(Outcome, 0)
        attempts, at = {}, {}
        for generation in self.generations:
            name, attempt, client = generation.generation_id, generation.attempt, dispatcher.clients[generation.generation_id]
            mine = [each for each in (*dispatcher.open, *dispatcher.fencing) if dispatcher.launched[each][0] is generation]
            attempts.update(dict.fromkeys(mine, generation))
            assert client.tokens == generation.entry.tokens == self.sent[name]
            assert len(generation.entry.assignments) == sum(each.startswith(f"{name}-") for each in dispatcher.launched)
            assert generation.entry.cached_tokens <= len(generation.entry.request.prompt)
            assert (name in life._live, name in life.journal.open, client.ended) == (not generation.done,) * 2 + (
                generation.done,
            )
            assert [each[2] for each in life._held].count(generation) == (generation.state is State.HELD)
            assert (attempt is not None) == (generation.state is State.RUNNING)
            assert (generation.entry.outcome is None) != generation.done
            assert generation.failures < LIMITS.max_attempts or generation.done
            match generation.state:
                case State.HELD:
                    assert not mine
                case State.RUNNING:
                    assert mine == [attempt.attempt_id]
                    assert mine[0] in dispatcher.open
                    for key in attempt.keys:
                        at.setdefault(key, set()).add(generation)
                        assert not attempt.needs(key) or self.takes_part(key)
                case State.FENCING:
                    assert len(mine) == 1
                    assert mine[0] in dispatcher.fencing
                case State.ENDED:
                    outcomes[generation.entry.outcome] += 1
                    assert all(each in dispatcher.fencing for each in mine)
                    assert (client.error is not None) == (generation.entry.outcome is Outcome.FAILED)
        assert life._attempts == attempts
        assert life._at == at
        assert life.journal.outcomes == outcomes
        assert life.journal.accepted == len(self.generations) == self.live + sum(outcomes.values())
        assert len(life) == self.live <= LIMITS.max_concurrent
        assert [item[:2] for item in life._held] == sorted(item[:2] for item in life._held)
        waiting = [each for *_, each in life._held if not each.entry.assignments and not each.patience_until_s]
        assert len(waiting) <= LIMITS.max_held
        due = [generation for *_, generation in life._deadlines if not generation.done]
        assert sorted(each.ticket for each in due) == [each.ticket for each in self.generations if not each.done]
        assert len(life._deadlines) <= 2 * self.live + SPARE_DEADLINES + 1
        assert dispatcher.stopped == {*dispatcher.launched} - dispatcher.open - self.finished, (
            "who ends early is told, who ends is not"
        )

    # --- the end

    def teardown(self) -> None:
        if not hasattr(self, "life"):
            return
        if self.arrivals % 2:
            for generation in self.generations:
                self.cancel_one(generation)
        else:
            self.settle()
        while self.dispatcher.fencing:
            self.fence(min(self.dispatcher.fencing))
        self.each_is_in_one_state_and_everything_agrees_with_it()
        counts = self.life.invariants()
        ended = sum(counts.pop(name) for name in ("completed", "failed", "cancelled"))
        assert counts.pop("accepted") == ended == len(self.generations)
        assert not any(counts.values()), counts

    def cancel_one(self, generation: Generation) -> None:
        self.carry_out(self.life.cancel(generation, self.now_s))

    def settle(self) -> None:
        """One instance that can do everything, and a policy that lets it: nobody is forgotten."""
        self.policy.calm = True
        self.dispatcher.unreachable.clear()
        self.take(heartbeat("z", 1, "mixed", 200, Load(free_blocks=50)))
        while self.dispatcher.fencing:
            self.fence(min(self.dispatcher.fencing))
        self.carry_out(self.life.tick(self.now_s))
        for generation in [each for each in self.generations if not each.done]:
            assert generation.state is State.RUNNING
            decode = generation.attempt.assignment.decode.key
            self.take(Progress(generation.attempt.attempt_id, Delta(decode, finish=FinishReason.LENGTH)))
            self.finished.add(f"{generation.generation_id}-{len(generation.entry.assignments)}")
            assert generation.entry.outcome is Outcome.COMPLETED

    # --- how

    @property
    def live(self) -> int:
        return sum(not generation.done for generation in self.generations)

    def some_attempt(self, which: int, old: bool) -> str:
        """Mostly one that is listened to."""
        now = sorted({*self.dispatcher.open, *self.dispatcher.fencing})
        known = list(self.dispatcher.launched) if old or not now else now
        return known[-1 - which % len(known)]

    def takes_part(self, key: InstanceKey) -> bool:
        """Whether the instance lives and moves."""
        return any(item.key == key and not item.stuck for item in self.cluster.snapshot().instances)

    def take(self, event: Event) -> None:
        self.carry_out(self.life.take(event, self.now_s))

    def fence(self, attempt_id: str) -> None:
        del self.dispatcher.fencing[attempt_id]
        self.take(Fenced(attempt_id))

    def carry_out(self, actions: list[Action]) -> None:
        self.dispatcher.do(actions, self.now_s)


def heartbeat(name: str, incarnation: int, role: str, capacity: int, load: Load) -> Heartbeat:
    return Heartbeat(
        worker=Address(name, incarnation, f"tcp://{name}/{incarnation}"),
        role=role,
        accelerator="CPU",
        model="tiny",
        fingerprint="f",
        layout=LAYOUT,
        total_blocks=capacity // 4,
        capacity_tokens=capacity,
        max_model_len=200,
        max_num_seqs=8,
        kv_endpoint="127.0.0.1:1",
        cost=CostModel(),
        load=load,
    )


SETTINGS = settings(
    max_examples=600,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)

TestLifeCycleMachine = LifeCycleMachine.TestCase
TestLifeCycleMachine.settings = SETTINGS


@pytest.mark.long
@pytest.mark.timeout(1800)
class TestLifeCycleMachineAtLength(LifeCycleMachine.TestCase):
    settings = settings(SETTINGS, max_examples=5000, stateful_step_count=80)
