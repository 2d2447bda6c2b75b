"""The life cycle of generations in plain values: no loop, no clock, no socket."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from core.config import Role
from core.errors import DeadlineExceeded, EngineFault, HetServeError, Overloaded, ProtocolError, Unavailable, WorkerLost
from core.messages import Heartbeat, ServedBy
from core.request import FinishReason, Request
from core.request_times import Stage
from core.sampling import SamplingParams
from core.slo import SLO
from gateway.serving.events import Failure, Fenced, Progress
from gateway.serving.generation import Generation, State
from gateway.serving.journal import Journal, Outcome
from gateway.serving.lifecycle import LifeCycle, Limits
from gateway.text.token_reader import Delta
from router.admission import Admission
from router.policy import NOBODY, Assignment, Decision, Demand, Hold, Rejection, candidates, nobody
from router.round_robin import RoundRobin
from router.state import ClusterState, InstanceKey, Snapshot
from tests.gateway.strict_dispatcher import Client, StrictDispatcher
from tests.router.conftest import Beat
from tests.router.conftest import beat as beat  # the fixture

LIMITS = Limits(request_timeout_s=100.0, max_attempts=3, forgiven_by_tokens=4, max_concurrent=50, max_held=2, patience_s=30.0)
FULL = Hold("no room", 7.0)
AT_REST = ("in_flight", "journal_open", "attempts", "instances_with_work", "held")


class Policy:
    """Whoever comes first by name and is not to be avoided, a pair where the decode instance is no mixed one; or what
    `instead` says, by generation id or for all (`*`)."""

    def __init__(self) -> None:
        self.instead: dict[str, Decision | Exception] = {}
        self.asked: list[tuple[str, int, frozenset[InstanceKey]]] = []

    def assign(self, demand: Demand, snapshot: Snapshot, avoid: frozenset[InstanceKey] = NOBODY) -> Decision:
        name = demand.request.request_id
        self.asked.append((name, demand.tokens, avoid))
        found = self.instead.get(name, self.instead.get("*"))
        if isinstance(found, Exception):
            raise found
        if found is not None:
            return found
        options = candidates(demand, snapshot, avoid, 0)
        for decode in sorted([*options.local, *options.decode], key=lambda item: item.key):
            if decode in options.local:
                return Assignment(None, decode, 0.1, 0.01, "first")
            prefill = min((item for item in options.prefill if item.role is Role.PREFILL), key=lambda item: item.key)
            return Assignment(prefill, decode, 0.1, 0.01, "first")
        return nobody(demand, snapshot, avoid)


class Desk:
    """A life cycle at a time `now_s`, whose actions are carried out at once, but for fences: those on `settle`."""

    def __init__(self, beat: Beat, limits: Limits = LIMITS) -> None:
        self.beat = beat
        self.now_s = 1000.0
        self.policy = Policy()
        self.cluster = ClusterState(dead_after_s=1.5, stuck_after_s=3.0)
        self.life = LifeCycle(self.policy, self.cluster, Journal(), limits)
        self.dispatcher = StrictDispatcher(self.life)
        self._arrived = 0

    @property
    def log(self) -> list[str]:
        """What was carried out since one last asked."""
        log, self.dispatcher.log = self.dispatcher.log, []
        return log

    def arrive(self, name: str = "", prompt: int = 3, slo: SLO = SLO(), max_tokens: int = 60) -> Generation:
        self._arrived += 1
        request = Request(
            request_id=name or f"r{self._arrived}",
            prompt=tuple(range(prompt)),
            sampling=SamplingParams(max_tokens=max_tokens),
            slo=slo,
            arrived_s=self.now_s,
        )
        generation, actions = self.life.arrive(request, self.now_s)
        self.dispatcher.begin(generation)
        self.dispatcher.do(actions, self.now_s)
        return generation

    def client(self, generation: Generation) -> Client:
        return self.dispatcher.clients[generation.generation_id]

    def beats(self, *heartbeats: Heartbeat) -> None:
        for heartbeat in heartbeats:
            self.dispatcher.do(self.life.take(heartbeat, self.now_s), self.now_s)

    def mixed(self, *names: str, **load: object) -> None:
        self.beats(*(self.beat(name, role="mixed", **load) for name in names))

    def says(
        self,
        attempt: str,
        *tokens: int,
        worker: str | None = None,
        finish: FinishReason | None = None,
        cut: bool = False,
        served: ServedBy | None = None,
    ) -> None:
        key = self.key(attempt, worker)
        delta = Delta(key, tokens=list(tokens), finish=finish, cut=cut, served=[] if served is None else [(key, served)])
        self.dispatcher.do(self.life.take(Progress(attempt, delta), self.now_s), self.now_s)

    def fails(self, attempt: str, code: str = "engine_fault", worker: str | None = None, nobody: bool = False) -> None:
        failure = Failure(attempt, None if nobody else self.key(attempt, worker), code, "scripted")
        self.dispatcher.do(self.life.take(failure, self.now_s), self.now_s)

    def key(self, attempt: str, worker: str | None) -> InstanceKey:
        assignment = self.dispatcher.launched[attempt][1].assignment
        if worker is None:
            return assignment.decode.key
        return next(item.key for item in (assignment.prefill, assignment.decode) if item is not None and item.name == worker)

    def settle(self) -> None:
        """The pump says of each fenced attempt that nothing more will come."""
        for attempt in list(self.dispatcher.fencing):
            del self.dispatcher.fencing[attempt]
            self.dispatcher.do(self.life.take(Fenced(attempt), self.now_s), self.now_s)

    def tick(self, seconds: float = 0.0) -> None:
        self.now_s += seconds
        self.dispatcher.do(self.life.tick(self.now_s), self.now_s)

    def wait(self, seconds: float, *alive: str) -> None:
        """Time passes, with a tick and a heartbeat of the living every second."""
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            self.now_s += min(1.0, until_s - self.now_s)
            self.mixed(*alive)
            self.tick()

    def cancel(self, generation: Generation) -> None:
        self.dispatcher.do(self.life.cancel(generation, self.now_s), self.now_s)

    def lose(self, name: str, incarnation: int = 1) -> None:
        self.dispatcher.do(self.life.lose((name, incarnation), self.now_s), self.now_s)

    def busy(self) -> dict[str, int]:
        counts = self.life.invariants()
        return {name: counts[name] for name in AT_REST if counts[name]}


@pytest.fixture
def desk(beat: Beat) -> Desk:
    return Desk(beat)


# --- the diagram ------------------------------------------------------------------------------------------------------


def test_an_arrival_is_assigned_runs_and_finishes(desk: Desk) -> None:
    desk.mixed("m0")
    generation = desk.arrive()
    assert (generation.state, generation.attempt.attempt_id) == (State.RUNNING, "r1-1")
    assert desk.busy() == {"in_flight": 1, "journal_open": 1, "attempts": 1, "instances_with_work": 1}
    assert desk.life.serving("r1-1") == "r1"
    desk.now_s += 0.5
    desk.says("r1-1", 7)
    desk.now_s += 0.25
    desk.says("r1-1", 8, 9, finish=FinishReason.LENGTH)
    assert desk.log == ["launch r1-1", "close r1-1", "end r1"]
    client = desk.client(generation)
    assert (client.tokens, client.gaps_s, client.error) == ([7, 8, 9], [None, 0.25], None)
    entry = generation.entry
    assert (generation.state, entry.outcome, entry.finish, entry.error) == (State.ENDED, Outcome.COMPLETED, "length", None)
    assert (entry.times.ttft_s, entry.times.total_s, entry.times.tokens) == (0.5, 0.75, 3)
    assert entry.times.marks_s[Stage.ASSIGNED] == 1000.0
    assert desk.busy() == {}
    assert desk.life.serving("r1-1") is None
    assert desk.life.invariants()["completed"] == 1


def test_a_delta_without_tokens_is_no_gap_between_tokens(desk: Desk) -> None:
    desk.mixed("m0")
    generation = desk.arrive()
    desk.says("r1-1", 7)
    desk.now_s += 1.0
    desk.says("r1-1", served=ServedBy(queue_s=0.5))
    desk.now_s += 1.0
    desk.says("r1-1", 8)
    assert desk.client(generation).gaps_s == [None, 2.0]
    assert generation.entry.times.marks_s[Stage.LAST_TOKEN] == 1002.0
    assert generation.entry.served[("m0", 1)].queue_s == 0.5


def test_a_stream_that_the_gateway_cut_is_told_to_its_workers(desk: Desk) -> None:
    desk.mixed("m0")
    generation = desk.arrive()
    desk.says("r1-1", 7, finish=FinishReason.STOP, cut=True)
    assert desk.log == ["launch r1-1", "stop r1-1", "close r1-1", "end r1"]
    assert generation.entry.outcome is Outcome.COMPLETED
    assert desk.busy() == {}


def test_a_failed_attempt_is_stopped_and_fenced_before_the_next_begins(desk: Desk) -> None:
    desk.mixed("m0", "m1")
    generation = desk.arrive()
    desk.says("r1-1", 7, 8)
    desk.fails("r1-1", "engine_fault")
    assert (generation.state, generation.attempt) == (State.FENCING, None)
    assert desk.log == ["launch r1-1", "stop r1-1", "fence r1-1"]
    assert isinstance(desk.dispatcher.fencing["r1-1"], EngineFault)
    assert desk.busy() == {"in_flight": 1, "journal_open": 1, "attempts": 1}
    assert desk.life.serving("r1-1") == "r1"
    desk.tick(1.0)
    assert desk.log == [], "the next attempt waits for the fence, however long"
    desk.settle()
    assert desk.log == ["launch r1-2"]
    assert (generation.state, generation.attempt.assignment.decode.name) == (State.RUNNING, "m1")
    assert desk.life.serving("r1-1") is None
    desk.says("r1-2", 9, finish=FinishReason.STOP)
    assert desk.client(generation).tokens == [7, 8, 9]
    assert len(generation.entry.assignments) == 2


def test_a_failed_attempt_whose_successor_nobody_takes_now_is_held_until_somebody_does(desk: Desk) -> None:
    desk.mixed("m0")
    generation = desk.arrive()
    desk.lose("m0")
    assert generation.state is State.FENCING
    assert isinstance(desk.dispatcher.fencing["r1-1"], WorkerLost)
    desk.settle()
    assert (generation.state, desk.busy()) == (State.HELD, {"in_flight": 1, "journal_open": 1, "held": 1})
    desk.mixed("m1")
    assert generation.state is State.HELD
    desk.tick()
    assert (generation.state, generation.attempt.assignment.decode.name) == (State.RUNNING, "m1")
    assert desk.busy() == {"in_flight": 1, "journal_open": 1, "attempts": 1, "instances_with_work": 1}


def test_an_arrival_may_be_held_and_begins_later(desk: Desk) -> None:
    desk.mixed("m0")
    desk.policy.instead["*"] = FULL
    generation = desk.arrive()
    assert (generation.state, desk.log, desk.busy()["held"]) == (State.HELD, [], 1)
    desk.wait(90.0, "m0")
    assert generation.state is State.HELD, "a hold is no failure: it costs neither attempts nor patience"
    del desk.policy.instead["*"]
    desk.tick()
    assert (generation.state, desk.log) == (State.RUNNING, ["launch r1-1"])


def test_what_cannot_be_retried_fails_the_generation_for_good(desk: Desk) -> None:
    desk.mixed("m0", "m1")
    generation = desk.arrive()
    desk.fails("r1-1", "context_length_exceeded")
    assert desk.log == ["launch r1-1", "stop r1-1", "close r1-1", "end r1"]
    assert desk.client(generation).error.code == generation.entry.error == "context_length_exceeded"
    assert generation.entry.outcome is Outcome.FAILED
    assert desk.busy() == {}


@pytest.mark.parametrize("where", list(State)[:3])
def test_a_generation_can_be_cancelled_from_anywhere(desk: Desk, where: State) -> None:
    generation = held_running_or_fencing(desk, where)
    desk.dispatcher.log.clear()
    desk.cancel(generation)
    assert desk.log == (["stop r1-1", "close r1-1"] if where is State.RUNNING else []) + ["end r1"]
    assert (generation.entry.outcome, generation.entry.error, desk.client(generation).error) == (Outcome.CANCELLED, None, None)
    desk.cancel(generation)
    desk.settle()
    desk.tick()
    assert (desk.log, desk.busy(), desk.life.invariants()["cancelled"]) == ([], {}, 1)


@pytest.mark.parametrize("where", list(State)[:3])
def test_a_generation_expires_anywhere(desk: Desk, where: State) -> None:
    generation = held_running_or_fencing(desk, where)
    desk.wait(98.0, "m0")
    desk.now_s = 1100.0 - 1e-6
    desk.mixed("m0")
    desk.tick()
    assert generation.state is where
    desk.dispatcher.log.clear()
    desk.now_s = 1100.0
    desk.tick()
    assert desk.log == (["stop r1-1", "close r1-1"] if where is State.RUNNING else []) + ["end r1"]
    error = desk.client(generation).error
    assert isinstance(error, DeadlineExceeded)
    assert "100 s" in str(error)
    desk.settle()
    assert desk.busy() == {}


@pytest.mark.parametrize("where", list(State)[:3])
def test_a_generation_can_be_failed_from_anywhere(desk: Desk, where: State) -> None:
    generation = held_running_or_fencing(desk, where)
    error = HetServeError("broken")
    desk.dispatcher.do(desk.life.fail("r1", error, desk.now_s), desk.now_s)
    assert desk.client(generation).error is error
    assert desk.life.fail("r1", error, desk.now_s) == []
    desk.settle()
    assert desk.busy() == {}


def test_closing_ends_everything_with_the_same_error(desk: Desk) -> None:
    desk.mixed("m0", "m1")
    running, fencing = desk.arrive(), desk.arrive()
    desk.fails("r2-1")
    desk.policy.instead["*"] = FULL
    held = desk.arrive()
    del desk.policy.instead["*"]
    error = Unavailable("shutting down")
    desk.dispatcher.log.clear()
    desk.dispatcher.do(desk.life.close(error, desk.now_s), desk.now_s)
    assert [desk.client(each).error for each in (running, fencing, held)] == [error] * 3
    assert desk.log == ["stop r1-1", "close r1-1", "end r1", "end r2", "end r3"], "nothing begins any more"
    desk.settle()
    assert desk.busy() == {}
    assert desk.life.invariants()["failed"] == 3


def held_running_or_fencing(desk: Desk, where: State) -> Generation:
    desk.mixed("m0")
    if where is State.HELD:
        desk.policy.instead["*"] = FULL
    generation = desk.arrive()
    if where is State.FENCING:
        desk.fails("r1-1")
    assert generation.state is where
    return generation


# --- admission --------------------------------------------------------------------------------------------------------


def test_no_more_than_max_concurrent_are_admitted(desk: Desk) -> None:
    desk.mixed("m0")
    assert desk.life.max_concurrent == 50
    desk.life.admit(50)
    with pytest.raises(Overloaded) as refused:
        desk.life.admit(51)
    assert refused.value.retry_after_s == 1.0
    desk.arrive()
    desk.life.admit(49)
    with pytest.raises(Overloaded, match="1 generations"):
        desk.life.admit(50)
    desk.says("r1-1", 7, finish=FinishReason.STOP)
    desk.life.admit(50)
    assert len(desk.life) == 0


@pytest.mark.parametrize(
    ("found", "error"),
    [
        (Rejection("nobody"), Unavailable),
        (Rejection("full", 3.0), Overloaded),
        (FULL, Overloaded),
        (ZeroDivisionError(), ZeroDivisionError),
    ],
)
def test_an_arrival_that_is_refused_leaves_nothing_behind(
    beat: Beat, found: Decision | Exception, error: type[Exception]
) -> None:
    desk = Desk(beat, replace(LIMITS, max_held=0))
    desk.mixed("m0")
    before = desk.cluster.snapshot()
    desk.policy.instead["*"] = found
    with pytest.raises(error) as refused:
        desk.arrive()
    if isinstance(found, Rejection | Hold) and found.retry_after_s is not None:
        assert refused.value.retry_after_s == found.retry_after_s
    assert desk.cluster.snapshot() is before, "no correction for work that was not sent"
    assert desk.life.invariants() == dict.fromkeys(desk.life.invariants(), 0)
    assert (desk.life.journal.open, desk.life.journal.recent()) == ({}, [])
    desk.policy.instead.clear()
    assert desk.arrive().ticket == 1
    desk.tick(200.0)
    assert desk.life.invariants()["failed"] == 1


def test_what_is_sent_to_an_instance_is_counted_there_until_its_heartbeat_says_it(desk: Desk) -> None:
    desk.beats(desk.beat("d0"), desk.beat("p0", role="prefill"))
    generation = desk.arrive(prompt=5)
    p0, d0 = (next(item for item in desk.cluster.snapshot().instances if item.name == name) for name in ("p0", "d0"))
    assert (p0.waiting_tokens, p0.sequences, p0.assigned_context_tokens) == (5, 1, 0)
    assert (d0.waiting_tokens, d0.sequences, d0.assigned_context_tokens) == (0, 1, 5)
    desk.says("r1-1", 7, 8)
    desk.lose("p0")
    desk.fails("r1-1")
    desk.settle()
    assert generation.attempt.assignment.prefill is None
    (d0,) = desk.cluster.snapshot().instances
    assert (d0.waiting_tokens, d0.sequences, d0.assigned_context_tokens) == (7, 2, 12), "what was delivered is read again"


def test_tickets_grow_above_all_that_was_heard_of_and_stay(desk: Desk) -> None:
    desk.mixed("m0", newest_ticket=41)
    first, second = desk.arrive(), desk.arrive()
    desk.mixed("m0", newest_ticket=7)
    desk.fails("r1-1")
    desk.settle()
    assert (first.ticket, second.ticket, desk.arrive().ticket) == (42, 43, 44)


# --- hold -------------------------------------------------------------------------------------------------------------


def test_at_most_max_held_arrivals_wait_because_the_policy_says_so(desk: Desk) -> None:
    desk.mixed("m0")
    desk.policy.instead["*"] = FULL
    desk.arrive()
    second = desk.arrive()
    with pytest.raises(Overloaded, match="no room") as refused:
        desk.arrive("r3")
    assert refused.value.retry_after_s == 7.0
    assert len(desk.life) == 2
    desk.cancel(second)
    assert desk.arrive("r3").state is State.HELD


def test_those_who_wait_for_an_instance_to_come_back_take_no_place_of_arrivals(desk: Desk) -> None:
    desk.mixed("m0")
    lost = [desk.arrive(), desk.arrive(), desk.arrive()]
    desk.lose("m0")
    desk.settle()
    assert desk.busy()["held"] == 3
    desk.mixed("m1")
    desk.policy.instead["*"] = FULL
    assert desk.arrive("new").state is State.HELD
    desk.tick()  # now the policy holds those three as well: they have begun, and cannot be turned away
    assert all(each.state is State.HELD for each in lost)
    assert desk.arrive("newer").state is State.HELD
    with pytest.raises(Overloaded):
        desk.arrive("newest")


def test_held_ones_begin_in_the_order_in_which_they_are_due(beat: Beat) -> None:
    desk = Desk(beat, replace(LIMITS, max_held=9))
    desk.mixed("m0")
    desk.policy.instead["*"] = FULL
    desk.arrive("patient")
    desk.now_s += 1.0
    desk.arrive("late", slo=SLO(ttft_s=5.0))
    desk.arrive("first", slo=SLO(ttft_s=2.0))
    desk.arrive("second", slo=SLO(ttft_s=2.0))
    desk.arrive("never", slo=SLO(ttft_s=1000.0))  # due when it expires, as the first is, but a second later
    desk.arrive("last")
    del desk.policy.instead["*"]
    desk.tick()
    assert desk.log == [f"launch {name}-1" for name in ("first", "second", "late", "patient", "never", "last")]


def test_a_stream_that_has_begun_is_not_due_by_its_first_token(desk: Desk) -> None:
    desk.mixed("m0")
    begun = desk.arrive("begun", slo=SLO(ttft_s=1.0))
    desk.says("begun-1", 7)
    desk.fails("begun-1")
    desk.policy.instead["*"] = FULL
    desk.settle()
    desk.arrive("other", slo=SLO(ttft_s=50.0))
    assert begun.state is State.HELD
    del desk.policy.instead["*"]
    desk.dispatcher.log.clear()
    desk.tick()
    assert desk.log == ["launch other-1", "launch begun-2"]


def test_a_hold_at_the_head_stops_those_behind_it(desk: Desk) -> None:
    desk.mixed("m0")
    desk.policy.instead["*"] = FULL
    desk.arrive("head", slo=SLO(ttft_s=1.0))
    desk.arrive("next", slo=SLO(ttft_s=2.0))
    desk.policy.instead = {"head": FULL}
    desk.policy.asked.clear()
    desk.tick()
    assert [name for name, *_ in desk.policy.asked] == ["head"]
    assert (desk.log, desk.busy()["held"]) == ([], 2)
    desk.policy.instead = {"next": FULL}
    desk.tick()
    assert (desk.log, desk.busy()["held"]) == (["launch head-1"], 1)
    desk.policy.instead.clear()
    desk.tick()
    assert (desk.log, desk.busy().get("held")) == (["launch next-1"], None)


def test_an_arrival_does_not_overtake_a_held_one_that_is_due_earlier(desk: Desk) -> None:
    """Small requests that always fit would starve a large one."""
    desk.mixed("m0")
    desk.policy.instead = {"large": FULL}
    desk.arrive("large", slo=SLO(ttft_s=5.0))
    small = desk.arrive("small", slo=SLO(ttft_s=6.0))
    assert (small.state, desk.log) == (State.HELD, [])
    desk.arrive("urgent", slo=SLO(ttft_s=1.0))
    assert desk.log == ["launch urgent-1"]
    with pytest.raises(Overloaded, match="due earlier"):
        desk.arrive("too many", slo=SLO(ttft_s=6.0))
    desk.policy.instead.clear()
    desk.tick()
    assert desk.log == ["launch large-1", "launch small-1"]


def test_who_waits_for_an_instance_to_come_back_is_in_nobodys_way(desk: Desk) -> None:
    desk.mixed("m0")
    waiting = desk.arrive("waiting")
    desk.lose("m0")
    desk.settle()
    desk.mixed("m1")
    desk.policy.instead = {"waiting": Rejection("nobody"), "*": FULL}
    desk.arrive("behind")
    desk.policy.instead = {"waiting": Rejection("nobody")}
    desk.dispatcher.log.clear()
    desk.tick()
    assert (waiting.state, desk.log) == (State.HELD, ["launch behind-1"])


def test_a_hold_at_the_head_does_not_prolong_the_patience_of_those_behind_it(desk: Desk) -> None:
    desk.mixed("m0")
    head = desk.arrive("head")
    waiting = desk.arrive("waiting")
    desk.lose("m0")
    desk.settle()
    desk.mixed("m1")
    desk.policy.instead = {"waiting": Rejection("nobody"), "head": FULL}
    desk.wait(31.0, "m1")
    assert head.state is State.HELD
    assert desk.client(waiting).error.code == "unavailable"


@pytest.mark.parametrize("end", ["finish", "cut", "late", "cancel", "failure", "fail", "tick"])
def test_whoever_is_held_is_tried_again_when_another_makes_room(desk: Desk, end: str) -> None:
    desk.mixed("m0")
    running = desk.arrive("running")
    desk.now_s += 1.0
    desk.policy.instead["*"] = FULL
    desk.arrive("held")
    if end == "tick":
        desk.wait(99.0 - 1e-3, "m0")
    del desk.policy.instead["*"]
    desk.dispatcher.log.clear()
    if end in ("finish", "cut"):
        desk.says("running-1", 7, finish=FinishReason.STOP, cut=end == "cut")
    elif end == "late":
        desk.fails("running-1")
        desk.says("running-1", 7, finish=FinishReason.STOP)
    elif end == "cancel":
        desk.cancel(running)
    elif end == "failure":
        desk.fails("running-1", "invalid_request")
    elif end == "fail":
        desk.dispatcher.do(desk.life.fail("running", HetServeError(""), desk.now_s), desk.now_s)
    else:
        desk.now_s = 1100.0
        desk.tick()
    assert desk.log[-1] == "launch held-1"
    assert running.done


def test_at_an_end_nobody_asks_about_those_who_wait_for_an_instance_to_come_back(desk: Desk) -> None:
    """It brings none back, and with a thousand of them each end would hold up the gateway for 30 ms."""
    desk.mixed("m0")
    waiting = [desk.arrive() for _ in range(5)]
    desk.mixed("m1")
    desk.policy.instead["*"] = Assignment(None, desk.cluster.snapshot().instances[1], 0.1, 0.01, "")
    desk.arrive("running")
    desk.policy.instead["*"] = FULL
    desk.arrive("held")
    desk.policy.instead = {each.generation_id: Rejection("nobody") for each in waiting}
    desk.lose("m0")
    desk.settle()
    desk.policy.asked.clear()
    desk.says("running-1", 7, finish=FinishReason.STOP)
    assert [name for name, *_ in desk.policy.asked] == ["held"]
    desk.tick()
    assert {name for name, *_ in desk.policy.asked} == {"held", *desk.policy.instead}


def test_a_cancelled_one_that_was_held_makes_no_room(desk: Desk) -> None:
    desk.mixed("m0")
    desk.policy.instead["*"] = FULL
    first, _ = desk.arrive(), desk.arrive()
    desk.policy.asked.clear()
    desk.cancel(first)
    assert (desk.policy.asked, desk.busy()["held"]) == ([], 1)


# --- patience and deadlines -------------------------------------------------------------------------------------------


def test_patience_ends(desk: Desk) -> None:
    desk.mixed("m0")
    generation = desk.arrive()
    desk.lose("m0")
    desk.now_s += 5.0
    desk.settle()
    desk.tick(30.0 - 1e-6)
    assert generation.state is State.HELD, "patience begins when nobody is found"
    desk.now_s = 1035.0
    desk.tick()
    assert desk.client(generation).error.code == "unavailable"
    assert desk.busy() == {}


def test_patience_begins_anew_after_somebody_was_found(desk: Desk) -> None:
    desk.mixed("m0")
    generation = desk.arrive()
    for round_ in range(2):
        desk.lose(f"m{round_}")
        desk.settle()
        desk.tick(20.0)
        assert generation.state is State.HELD
        desk.mixed(f"m{round_ + 1}")
        desk.tick()
        assert generation.state is State.RUNNING


def test_a_hold_takes_no_patience(desk: Desk) -> None:
    desk.mixed("m0")
    generation = desk.arrive()
    desk.lose("m0")
    desk.settle()
    desk.tick(20.0)
    desk.policy.instead["*"] = FULL
    desk.tick()
    del desk.policy.instead["*"]
    desk.tick(20.0)
    assert generation.state is State.HELD
    desk.tick(30.0)
    assert generation.done


def test_without_patience_a_retry_that_nobody_takes_fails_at_once(beat: Beat) -> None:
    desk = Desk(beat, replace(LIMITS, patience_s=0.0))
    desk.mixed("m0")
    generation = desk.arrive()
    desk.lose("m0")
    desk.settle()
    assert generation.done
    assert desk.busy() == {}


def test_full_queues_are_waited_for_by_a_retry_and_then_named(desk: Desk) -> None:
    desk.mixed("m0")
    generation = desk.arrive()
    desk.fails("r1-1")
    desk.policy.instead["*"] = Rejection("every queue is full", 4.0)
    desk.settle()
    assert generation.state is State.HELD
    desk.wait(30.0, "m0")
    assert desk.client(generation).error.retry_after_s == 4.0


def test_an_arrival_waits_for_one_that_is_between_roles_but_not_for_full_queues(desk: Desk) -> None:
    desk.mixed("m0")
    desk.arrive()
    desk.fails("r1-1", "unavailable")
    assert desk.arrive().state is State.HELD
    desk.policy.instead["*"] = Rejection("every queue is full", 4.0)
    with pytest.raises(Overloaded):
        desk.arrive()
    desk.policy.instead.clear()
    desk.tick(1.0)
    assert desk.log[-1] == "fence r1-1"
    desk.mixed("m0")
    desk.tick()
    assert desk.log == ["launch r2-1"]


def test_those_that_ended_are_not_kept_until_their_deadline(desk: Desk) -> None:
    """Prompts, tokens and all: at a hundred a second that is ten minutes' worth."""
    desk.mixed("m0")
    stays = desk.arrive("stays")
    for number in range(1000):
        desk.arrive(f"g{number}")
        desk.says(f"g{number}-1", 7, finish=FinishReason.STOP)
    assert len(desk.life._deadlines) < 200
    desk.wait(100.0, "m0")
    assert desk.client(stays).error.code == "deadline_exceeded"


def test_clearing_away_those_that_ended_keeps_deadlines_in_order(desk: Desk) -> None:
    desk.mixed("m0")
    generations = []
    for _ in range(200):
        desk.now_s += 0.1
        generations.append(desk.arrive())
    desk.now_s = 1000.0 + 0.1 * 31 + 100.0
    desk.mixed("m0")
    desk.tick()
    assert sum(each.done for each in generations) in (30, 31)
    for each in generations[::3] + generations[1::3] + generations[2::6]:
        desk.cancel(each)
    deadlines = [item[:2] for item in desk.life._deadlines]
    assert len(deadlines) < 100
    assert all(deadlines[(at - 1) // 2] <= deadlines[at] for at in range(1, len(deadlines)))


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_long_stream_outlives_more_deaths_than_max_attempts(desk: Desk) -> None:
    desk.mixed("m0", "m1")
    generation = desk.arrive()
    for death in range(1, 9):
        desk.says(f"r1-{death}", 1, 2, 3, 4)
        desk.fails(f"r1-{death}", "worker_lost")
        assert generation.failures == 1
        desk.settle()
    desk.says("r1-9", 5, finish=FinishReason.STOP)
    assert len(desk.client(generation).tokens) == 33
    assert generation.entry.outcome is Outcome.COMPLETED


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_a_request_that_kills_whoever_takes_it_ends_after_max_attempts(desk: Desk, tokens: int) -> None:
    desk.mixed("m0", "m1", "m2", "m3")
    generation = desk.arrive()
    for death in (1, 2, 3):
        assert not generation.done
        desk.says(f"r1-{death}", *range(tokens))
        desk.fails(f"r1-{death}", "worker_lost")
        desk.settle()
    assert (generation.entry.error, generation.failures) == ("worker_lost", 3)
    assert desk.log[-3:] == ["stop r1-3", "close r1-3", "end r1"]


def test_tokens_count_from_the_last_failure_on(desk: Desk) -> None:
    desk.mixed("m0", "m1")
    generation = desk.arrive()
    desk.says("r1-1", 1, 2, 3)
    desk.fails("r1-1", "worker_lost")
    desk.settle()
    desk.says("r1-2", 4, 5)
    desk.fails("r1-2", "worker_lost")
    assert generation.failures == 2


def test_an_overloaded_worker_is_left_for_another(desk: Desk) -> None:
    desk.mixed("m0", "m1")
    generation = desk.arrive()
    desk.fails("r1-1", "overloaded")
    desk.settle()
    assert generation.attempt.assignment.decode.name == "m1"
    assert generation.failures == 1


def test_those_that_failed_it_are_avoided_until_nobody_else_is_left(desk: Desk) -> None:
    desk.mixed("m0", "m1")
    generation = desk.arrive()
    tried = []
    for attempt in ("r1-1", "r1-2"):
        tried.append(generation.attempt.assignment.decode.name)
        desk.fails(attempt)
        desk.settle()
    assert [*tried, generation.attempt.assignment.decode.name] == ["m0", "m1", "m0"]
    assert [avoid for *_, avoid in desk.policy.asked] == [NOBODY, {("m0", 1)}, {("m0", 1), ("m1", 1)}, NOBODY]


def test_an_unknown_code_is_not_retried(desk: Desk) -> None:
    desk.mixed("m0", "m1")
    generation = desk.arrive()
    desk.fails("r1-1", "from_the_future")
    assert generation.entry.error == "internal_error"


def test_a_broken_transfer_makes_the_other_side_suspect_and_then_both(desk: Desk) -> None:
    desk.beats(*(desk.beat(name) for name in ("d0", "d1", "d2")), *(desk.beat(name, role="prefill") for name in ("p0", "p1")))
    generation = desk.arrive()
    desk.fails("r1-1", "transfer_failed", worker="d0")
    desk.settle()
    assert generation.avoid == {("p0", 1)}
    assert names(generation) == ("p1", "d0")
    desk.fails("r1-2", "corrupt_transfer", worker="p1")
    assert generation.avoid == {("p0", 1), ("p1", 1), ("d0", 1)}
    other = desk.arrive()
    desk.fails("r2-1", "lease_expired", worker="p0")
    assert other.avoid == {("d0", 1)}


def test_tokens_lost_on_the_way_make_both_workers_suspect(desk: Desk) -> None:
    desk.beats(desk.beat("d0"), desk.beat("p0", role="prefill"))
    generation = desk.arrive()
    desk.fails("r1-1", "transfer_failed", nobody=True)
    assert generation.avoid == {("p0", 1), ("d0", 1)}
    assert generation.state is State.FENCING


def test_a_broken_transfer_of_one_that_works_alone_makes_it_suspect(desk: Desk) -> None:
    desk.mixed("m0")
    generation = desk.arrive()
    desk.fails("r1-1", "transfer_failed")
    assert generation.avoid == {("m0", 1)}


def test_once_decoding_prefill_no_longer_matters(desk: Desk) -> None:
    desk.beats(desk.beat("d0"), desk.beat("p0", role="prefill"))
    generation = desk.arrive()
    desk.says("r1-1", 7, worker="p0")
    assert not generation.attempt.decoding
    desk.says("r1-1", 8, worker="d0")
    desk.fails("r1-1", worker="p0")
    desk.lose("p0")
    assert (generation.state, generation.failures) == (State.RUNNING, 0)
    desk.lose("d0")
    assert generation.state is State.FENCING
    desk.settle()
    assert desk.busy() == {"in_flight": 1, "journal_open": 1, "held": 1}


def test_prefill_matters_until_decoding(desk: Desk) -> None:
    desk.beats(desk.beat("d0"), desk.beat("p0", role="prefill"))
    generation = desk.arrive()
    desk.says("r1-1", 7, worker="p0")
    desk.lose("p0")
    assert generation.state is State.FENCING
    assert (generation.avoid, generation.failures) == ({("p0", 1)}, 1)


def test_a_failure_of_somebody_who_does_not_serve_the_attempt_is_none(desk: Desk) -> None:
    desk.mixed("m0")
    generation = desk.arrive()
    desk.dispatcher.do(desk.life.take(Failure("r1-1", ("m0", 2), "engine_fault", ""), desk.now_s), desk.now_s)
    assert generation.state is State.RUNNING


# --- what an old attempt still says -----------------------------------------------------------------------------------


def test_a_retry_reads_what_was_delivered_and_passes_over_a_cache_too_small_for_it(desk: Desk) -> None:
    life = LifeCycle(RoundRobin(Admission(1 << 20)), desk.cluster, Journal(), LIMITS)
    desk.life = desk.dispatcher.life = life
    desk.beats(desk.beat("d0"), desk.beat("p0", role="prefill"), desk.beat("p1", role="prefill", total_blocks=2))
    first = [desk.arrive(prompt=30) for _ in range(2)]
    assert {each.attempt.assignment.prefill.name for each in first} == {"p0", "p1"}, "30 tokens fit into 32"
    small = next(each for each in first if each.attempt.assignment.prefill.name == "p0")
    assert small.demand.tokens == 30
    desk.says(small.attempt.attempt_id, 1, 2, 3)
    assert (small.demand.tokens, small.demand.max_context_tokens) == (33, 90)
    desk.fails(small.attempt.attempt_id, worker="d0")
    desk.settle()
    for _ in range(2):  # whoever's turn it is
        assert names(small) == ("p0", "d0")
        desk.says(small.attempt.attempt_id, 4)
        desk.fails(small.attempt.attempt_id, "unavailable", worker="p0")
        desk.beats(desk.beat("p0", role="prefill"))
        desk.settle()


def test_the_policy_is_told_how_much_a_retry_reads(desk: Desk) -> None:
    desk.mixed("m0", "m1")
    desk.arrive(prompt=3)
    desk.says("r1-1", 1, 2)
    desk.fails("r1-1")
    desk.says("r1-1", 3)
    desk.settle()
    assert desk.policy.asked == [("r1", 3, NOBODY), ("r1", 6, {("m0", 1)})]


def test_tokens_that_come_before_the_fence_count(desk: Desk) -> None:
    desk.mixed("m0", "m1")
    generation = desk.arrive()
    desk.says("r1-1", 7)
    desk.fails("r1-1")
    desk.now_s += 0.5
    desk.says("r1-1", 8)
    desk.settle()
    desk.says("r1-2", 9)
    assert desk.client(generation).tokens == generation.entry.tokens == [7, 8, 9]
    assert desk.client(generation).gaps_s == [None, 0.5, 0.0]


def test_an_end_that_comes_before_the_fence_counts(desk: Desk) -> None:
    desk.mixed("m0", "m1")
    generation = desk.arrive()
    desk.fails("r1-1")
    desk.says("r1-1", 7, finish=FinishReason.LENGTH)
    assert (generation.entry.outcome, generation.entry.finish) == (Outcome.COMPLETED, "length")
    assert desk.log == ["launch r1-1", "stop r1-1", "fence r1-1", "end r1"]
    assert desk.busy() == {"attempts": 1}
    desk.says("r1-1", 8)
    desk.settle()
    assert (desk.log, desk.busy()) == ([], {})


def test_what_an_old_attempt_says_after_the_fence_is_nothing(desk: Desk) -> None:
    desk.mixed("m0", "m1")
    generation = desk.arrive()
    desk.fails("r1-1")
    desk.fails("r1-1")
    assert generation.failures == 1, "an attempt fails once"
    desk.settle()
    desk.says("r1-1", 7, finish=FinishReason.STOP)
    desk.fails("r1-1")
    desk.dispatcher.do(desk.life.take(Fenced("r1-1"), desk.now_s), desk.now_s)
    desk.dispatcher.do(desk.life.unreachable("r1-1", ("m0", 1), desk.now_s), desk.now_s)
    assert (generation.state, generation.failures, generation.entry.tokens) == (State.RUNNING, 1, [])


def test_an_attempt_that_is_being_fenced_cannot_become_unreachable(desk: Desk) -> None:
    desk.mixed("m0", "m1")
    generation = desk.arrive()
    desk.fails("r1-1")
    assert desk.life.unreachable("r1-1", ("m0", 1), desk.now_s) == []
    assert desk.life.unreachable("r9-1", ("m0", 1), desk.now_s) == []
    assert (generation.state, generation.failures) == (State.FENCING, 1)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_refusal_costs_patience_not_an_attempt(desk: Desk) -> None:
    desk.mixed("m0")
    generation = desk.arrive()
    for attempt in range(1, 6):
        desk.fails(f"r1-{attempt}", "unavailable")
        desk.settle()
        assert (generation.state, generation.failures, generation.avoid) == (State.HELD, 0, NOBODY)
        desk.mixed("m0")
        desk.tick(5.0 if attempt < 5 else 0.0)
        desk.mixed("m0")
        desk.tick()
    assert generation.state is State.RUNNING
    desk.now_s = 1030.0
    desk.fails("r1-6", "unavailable")
    assert (generation.failures, generation.avoid) == (1, {("m0", 1)}), "patience began with the first refusal"


def test_a_token_makes_a_worker_one_that_has_taken_the_attempt(desk: Desk) -> None:
    desk.mixed("m0", "m1")
    generation = desk.arrive()
    desk.says("r1-1", served=ServedBy())
    desk.fails("r1-1", "unavailable")
    desk.settle()
    assert generation.failures == 0
    desk.says("r1-2", 7)
    desk.fails("r1-2", "unavailable")
    assert (generation.failures, generation.avoid) == (1, {("m1", 1)})


def test_tokens_renew_the_patience_with_refusals(desk: Desk) -> None:
    desk.mixed("m0")
    generation = desk.arrive()
    desk.fails("r1-1", "unavailable")
    desk.mixed("m0")
    desk.settle()
    desk.says("r1-2", 7)
    desk.fails("r1-2")
    desk.settle()
    desk.now_s += 31.0
    desk.fails("r1-3", "unavailable")
    assert generation.failures == 1


def test_unavailability_that_no_worker_named_is_a_failure(desk: Desk) -> None:
    desk.mixed("m0")
    generation = desk.arrive()
    desk.fails("r1-1", "unavailable", nobody=True)
    assert (generation.failures, generation.avoid) == (1, {("m0", 1)})


# --- workers that go ---------------------------------------------------------------------------------------------------


def test_a_worker_that_takes_no_messages_is_one_that_failed(desk: Desk) -> None:
    desk.mixed("m0", "m1")
    desk.dispatcher.unreachable.add(("m0", 1))
    generation = desk.arrive()
    assert desk.log == ["launch r1-1", "stop r1-1", "fence r1-1"]
    assert desk.dispatcher.fencing["r1-1"].code == "worker_lost"
    desk.settle()
    assert (generation.attempt.assignment.decode.name, generation.failures) == ("m1", 1)


def test_where_nobody_takes_messages_a_generation_ends(desk: Desk) -> None:
    desk.mixed("m0", "m1")
    desk.dispatcher.unreachable |= {("m0", 1), ("m1", 1)}
    generation = desk.arrive()
    for _ in range(9):
        desk.settle()
    assert generation.entry.error == "worker_lost"
    assert len(desk.dispatcher.launched) == 3


@pytest.mark.parametrize("how", ["lose", "restart", "silence", "stuck"])
def test_the_attempts_of_a_worker_that_is_gone_move(desk: Desk, how: str) -> None:
    desk.mixed("m0", "m1", running=1)
    first, second = desk.arrive(), desk.arrive()
    desk.policy.instead["*"] = Assignment(None, desk.cluster.snapshot().instances[1], 0.1, 0.01, "")
    third = desk.arrive()
    desk.policy.instead.clear()
    if how == "lose":
        desk.lose("m0", 2)
        assert first.state is State.RUNNING, "another incarnation"
        desk.lose("m0")
    elif how == "restart":
        desk.beats(desk.beat("m0", role="mixed", incarnation=2))
    elif how == "silence":
        desk.wait(1.5, "m1")
        assert first.state is State.RUNNING
        desk.now_s += 1e-3
        desk.tick()
    else:
        for steps in range(1, 5):
            desk.now_s += 1.0
            desk.mixed("m0", running=1)
            desk.mixed("m1", running=1, steps=steps)
            desk.tick()
            assert (first.state is State.RUNNING) == (steps < 4)
    assert (first.state, second.state, third.state) == (State.FENCING, State.FENCING, State.RUNNING)
    assert desk.dispatcher.fencing["r1-1"].code == "worker_lost"
    desk.settle()
    assert first.avoid == {("m0", 1)}
    incarnation = 2 if how == "restart" else 1
    assert first.attempt.assignment.decode.key == (("m0", 2) if how == "restart" else ("m1", incarnation))


def test_a_death_moves_the_oldest_first_and_always_in_the_same_order(desk: Desk) -> None:
    desk.mixed("m0")
    generations = [desk.arrive() for _ in range(40)]
    desk.dispatcher.log.clear()
    desk.lose("m0")
    assert desk.log == [f"{what} {each.generation_id}-1" for each in generations for what in ("stop", "fence")]


def test_a_heartbeat_that_says_nonsense_changes_nothing(desk: Desk) -> None:
    desk.mixed("m0")
    before = desk.cluster.snapshot()
    with pytest.raises(ProtocolError):
        desk.beats(desk.beat("m0", role="cook", incarnation=2, newest_ticket=99))
    assert desk.cluster.snapshot() is before
    assert desk.arrive().ticket == 1


# --- a policy that raises ---------------------------------------------------------------------------------------------


def test_a_policy_that_raises_ends_the_retry_that_it_was_asked_about(desk: Desk) -> None:
    desk.mixed("m0")
    first, second = desk.arrive(), desk.arrive()
    desk.lose("m0")
    fault = desk.policy.instead["r1"] = ZeroDivisionError()
    desk.settle()
    error = desk.client(first).error
    assert (type(error), error.__cause__) == (HetServeError, fault)
    assert second.state is State.HELD
    desk.policy.instead = {"r2": KeyError("x")}
    desk.tick()
    assert second.entry.error == "internal_error"
    assert desk.busy() == {}


def test_a_policy_that_raises_for_one_that_is_held_keeps_the_others(desk: Desk) -> None:
    desk.mixed("m0")
    desk.policy.instead["*"] = FULL
    desk.arrive(), desk.arrive()
    desk.policy.instead = {"r1": ZeroDivisionError()}
    desk.tick()
    assert desk.log == ["end r1", "launch r2-1"]


# --- the journal ------------------------------------------------------------------------------------------------------


def test_cached_tokens_never_exceed_the_prompt(desk: Desk) -> None:
    desk.mixed("m0", "m1")
    generation = desk.arrive(prompt=5)
    desk.says("r1-1", 1, 2, 3, served=ServedBy(cached_tokens=4, kv_bytes=10, transfer_s=0.5, queue_s=0.25))
    assert generation.entry.cached_tokens == 4
    desk.fails("r1-1")
    desk.settle()
    desk.says("r1-2", 4, finish=FinishReason.STOP, served=ServedBy(cached_tokens=8, kv_bytes=5, transfer_s=0.25, queue_s=0.5))
    (summary,) = desk.life.journal.recent()
    assert summary == {
        "id": "r1",
        "outcome": "completed",
        "finish_reason": "stop",
        "error": None,
        "prefill": "m1",
        "decode": "m1",
        "local": True,
        "attempts": 2,
        "why": "first",
        "prompt_tokens": 5,
        "tokens": 4,
        "cached_tokens": 5,
        "kv_bytes": 15,
        "transfer_s": 0.75,
        "queue_s": 0.5,
        "ttft_s": 0.0,
        "tpot_s": 0.0,
        "total_s": 0.0,
        "predicted_ttft_s": 0.1,
        "predicted_tpot_s": 0.01,
    }


def test_what_never_began_has_a_summary_too(desk: Desk) -> None:
    desk.beats(desk.beat("d0"), desk.beat("p0", role="prefill"))
    pair = desk.arrive()
    desk.policy.instead["*"] = FULL
    generation = desk.arrive()
    assert generation.entry.summary()["outcome"] == "running"
    assert (pair.entry.summary()["prefill"], pair.entry.summary()["local"]) == ("p0", False)
    desk.cancel(generation)
    summary = desk.life.journal.recent()[0]
    assert (summary["outcome"], summary["prefill"], summary["decode"], summary["why"]) == ("cancelled", None, None, None)
    assert (summary["local"], summary["attempts"], summary["predicted_ttft_s"], summary["cached_tokens"]) == (False, 0, None, 0)
    assert (summary["predicted_tpot_s"], summary["queue_s"], summary["transfer_s"], summary["kv_bytes"]) == (None, 0.0, 0, 0)


def test_the_journal_remembers_the_newest_first_and_no_more_than_it_may(desk: Desk) -> None:
    journal = Journal(recent=2)
    desk.life = desk.dispatcher.life = LifeCycle(desk.policy, desk.cluster, journal, LIMITS)
    desk.mixed("m0")
    for _ in range(3):
        desk.cancel(desk.arrive())
    assert [each["id"] for each in journal.recent()] == ["r3", "r2"]
    assert (journal.accepted, journal.outcomes[Outcome.CANCELLED], journal.open) == (3, 3, {})


# --- what it stands on ------------------------------------------------------------------------------------------------


def test_it_needs_no_loop_no_socket_and_no_server() -> None:
    """So that a simulator can drive it."""
    foreign = (
        "asyncio",
        "zmq",
        "starlette",
        "fastapi",
        "uvicorn",
        "structlog",
        "prometheus_client",
        "torch",
        "ray",
        "tokenizers",
    )
    code = f"import sys, gateway.serving.lifecycle; print(*(name for name in {foreign} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def names(generation: Generation) -> tuple[str, str]:
    assignment = generation.attempt.assignment
    return assignment.prefill.name, assignment.decode.name
