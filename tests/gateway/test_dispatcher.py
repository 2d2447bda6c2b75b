"""The dispatcher by itself: what it sends, and whom it tries, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from core.clock import ManualClock
from core.config import Role
from core.errors import HetServeError, Unavailable
from core.messages import Address, Cancel, Heartbeat, Message, Submit
from core.request import Request
from core.sampling import SamplingParams
from gateway.serving.dispatcher import Dispatcher
from gateway.serving.events import Failure, Fenced, Progress
from gateway.serving.generation import Generation
from gateway.serving.inbox import Inbox
from gateway.serving.journal import Journal, Outcome
from gateway.serving.lifecycle import LifeCycle, Limits
from gateway.serving.metrics import Metrics
from gateway.text.token_reader import Delta, TextOptions, TokenReader
from router.admission import Admission
from router.round_robin import RoundRobin
from router.state import ClusterState
from tests.router.conftest import Beat
from tests.router.conftest import beat as beat  # the fixture

GATEWAY = Address("gateway", 1, "tcp://gateway")
PATIENCE_S = 30.0


class FakePump:
    """Fences at once, when asked to `settle`."""

    def __init__(self) -> None:
        self.fenced: list[str] = []
        self.open_attempts = 0

    def open(self, attempt: str, reader: TokenReader, decode: Address, prefill: Address | None) -> None:
        self.open_attempts += 1

    def close(self, attempt: str) -> None:
        self.open_attempts -= 1

    def fence(self, attempt: str) -> None:
        self.open_attempts -= 1
        self.fenced.append(attempt)


class RecordingPeers:
    def __init__(self) -> None:
        self.sent: list[tuple[str, Message]] = []
        self.lost = 0

    def send(self, endpoint: str, message: Message) -> bool:
        self.sent.append((endpoint, message))
        return True

    def forget(self, endpoint: str) -> None: ...

    def close(self, linger_s: float = 0.5) -> None: ...


class Desk:
    """A dispatcher between a fake pump and recorded mail."""

    def __init__(self, beat: Beat) -> None:
        self.beat = beat
        self.clock, self.peers, self.pump = ManualClock(), RecordingPeers(), FakePump()
        cluster = ClusterState(dead_after_s=1.5, stuck_after_s=3.0)
        self.dispatcher = Dispatcher(
            address=GATEWAY,
            peers=self.peers,
            pump=self.pump,
            life=LifeCycle(RoundRobin(Admission(1 << 20)), cluster, Journal(), Limits(patience_s=PATIENCE_S)),
            metrics=Metrics(),
            clock=self.clock,
        )
        self._requests = 0

    def beats(self, *heartbeats: Heartbeat) -> None:
        self.dispatcher.deliver(list(heartbeats))

    def start(self) -> Generation:
        self._requests += 1
        request = Request(request_id=f"r{self._requests}", prompt=(1, 2, 3), sampling=SamplingParams(max_tokens=9))
        return self.dispatcher.start(request, TextOptions(lambda ids: ""), Inbox(), 0)

    def fails(self, generation: Generation, code: str, worker: str | None = None) -> None:
        """The present attempt's decode worker, or the named one, says so; then the pump fences."""
        attempt = generation.attempt
        assert attempt is not None
        key = attempt.assignment.decode.key if worker is None else (worker, 1)
        self.dispatcher.deliver([Failure(attempt.attempt_id, key, code, "scripted")])
        self.settle()

    def token(self, generation: Generation, worker: str) -> None:
        assert generation.attempt is not None
        self.dispatcher.deliver([Progress(generation.attempt.attempt_id, Delta((worker, 1), tokens=[5]))])

    def settle(self) -> None:
        while self.pump.fenced:
            self.dispatcher.deliver([Fenced(self.pump.fenced.pop())])

    @property
    def submits(self) -> list[Submit]:
        return [message for _, message in self.peers.sent if isinstance(message, Submit)]

    @property
    def cancels(self) -> list[Cancel]:
        return [message for _, message in self.peers.sent if isinstance(message, Cancel)]


@pytest.fixture
async def desk(beat: Beat) -> AsyncIterator[Desk]:
    desk = Desk(beat)
    yield desk
    desk.dispatcher.close_all(HetServeError("the test is over"))


async def test_tickets_grow_and_are_the_same_on_both_workers_and_in_every_retry(desk: Desk) -> None:
    desk.beats(desk.beat("p0", role="prefill"), desk.beat("d0"))
    first, second = desk.start(), desk.start()
    desk.fails(first, "engine_fault")
    tickets = [(submit.attempt, submit.stage, submit.ticket) for submit in desk.submits]
    assert tickets[:4] == [("r1-1", "decode", 1), ("r1-1", "prefill", 1), ("r2-1", "decode", 2), ("r2-1", "prefill", 2)]
    assert {ticket for attempt, _, ticket in tickets[4:]} == {1}
    assert tickets[4][0] == "r1-2"
    assert second.ticket == 2


async def test_a_new_ticket_is_larger_than_any_that_a_worker_has_seen(desk: Desk) -> None:
    desk.beats(desk.beat("m0", role="mixed", newest_ticket=41), desk.beat("m1", role="mixed", newest_ticket=7))
    assert [desk.start().ticket, desk.start().ticket] == [42, 43]
    desk.beats(desk.beat("m1", role="mixed", newest_ticket=40))
    assert desk.start().ticket == 44
    desk.beats(desk.beat("m1", role="mixed", newest_ticket=100))
    assert desk.start().ticket == 101


async def test_a_worker_that_drains_or_changed_its_role_costs_a_request_no_attempt(desk: Desk) -> None:
    desk.beats(desk.beat("m0", role="mixed"))
    generation = desk.start()
    for _ in range(20):  # far more often than an attempt may fail
        desk.fails(generation, "unavailable")
        assert generation.attempt is None, "it must not be asked again before it has said how it stands"
        desk.clock.advance(0.2)
        desk.beats(desk.beat("m0", role="mixed"))
        desk.dispatcher.sweep()
        assert generation.attempt is not None
    assert generation.failures == 0
    assert len({submit.attempt for submit in desk.submits}) == 21
    assert {cancel.attempt for cancel in desk.cancels} == {submit.attempt for submit in desk.submits[:-1]}


async def test_a_refusal_moves_the_request_to_the_next_instance_at_once(desk: Desk) -> None:
    desk.beats(desk.beat("m0", role="mixed"), desk.beat("m1", role="mixed"))
    generation = desk.start()
    tried = generation.attempt.assignment.decode.name
    desk.fails(generation, "unavailable")
    assert generation.attempt.assignment.decode.name != tried
    desk.beats(desk.beat(tried, role="mixed"))
    desk.fails(generation, "engine_fault")
    assert generation.attempt.assignment.decode.name == tried, "a refusal is no reason to avoid it for good"
    assert generation.failures == 1


async def test_a_refusal_by_the_prefill_side_counts_as_little(desk: Desk) -> None:
    desk.beats(desk.beat("p0", role="prefill"), desk.beat("p1", role="prefill"), desk.beat("d0"))
    generation = desk.start()
    tried = generation.attempt.assignment.prefill.name
    desk.fails(generation, "unavailable", worker=tried)
    assert generation.failures == 0
    assert generation.attempt.assignment.prefill.name not in (tried, None)
    assert generation.attempt.assignment.decode.name == "d0"


async def test_refusals_end_with_patience(desk: Desk) -> None:
    desk.beats(desk.beat("m0", role="mixed"))
    generation = desk.start()
    refusals = 0
    while not generation.done and refusals < 1000:
        if generation.attempt is not None:
            desk.fails(generation, "unavailable")
            refusals += 1
        desk.clock.advance(0.2)
        desk.beats(desk.beat("m0", role="mixed"))
        desk.dispatcher.sweep()
    assert PATIENCE_S <= desk.clock.now() < PATIENCE_S + 2.0
    assert generation.entry.outcome is Outcome.FAILED
    assert generation.entry.error == "unavailable"


async def test_progress_renews_patience(desk: Desk) -> None:
    desk.beats(desk.beat("m0", role="mixed"))
    generation = desk.start()
    desk.fails(generation, "unavailable")
    desk.clock.advance(PATIENCE_S - 1)
    desk.beats(desk.beat("m0", role="mixed"))
    desk.dispatcher.sweep()
    desk.token(generation, "m0")
    desk.fails(generation, "worker_lost")
    desk.clock.advance(2.0)
    desk.fails(generation, "unavailable")
    assert generation.failures == 1
    assert not generation.done


async def test_once_tokens_came_from_a_worker_its_unavailability_is_a_failure(desk: Desk) -> None:
    desk.beats(desk.beat("m0", role="mixed"))
    generation = desk.start()
    for failures in (1, 2, 3):
        desk.token(generation, "m0")
        desk.fails(generation, "unavailable")
        assert generation.failures == failures
    assert generation.done


@pytest.mark.parametrize("code", ["worker_lost", "attempt_lost"])
async def test_a_lost_worker_or_attempt_is_a_failure_not_a_refusal(desk: Desk, code: str) -> None:
    desk.beats(desk.beat("m0", role="mixed"), desk.beat("m1", role="mixed"))
    generation = desk.start()
    tried = generation.attempt.assignment.decode.name
    desk.fails(generation, code)
    assert generation.failures == 1
    assert generation.attempt.assignment.decode.name != tried


async def test_a_request_that_arrives_while_the_only_instance_is_between_roles_waits_for_its_next_heartbeat(desk: Desk) -> None:
    desk.beats(desk.beat("m0", role="mixed"))
    refused = desk.start()
    desk.fails(refused, "unavailable")
    late = desk.start()
    assert late.attempt is refused.attempt is None
    desk.beats(desk.beat("m0", role="decode"))
    desk.dispatcher.sweep()
    assert late.attempt.assignment.decode.role is refused.attempt.assignment.decode.role is Role.DECODE


async def test_a_request_that_nobody_can_serve_is_refused_at_once(desk: Desk) -> None:
    desk.beats(desk.beat("m0", role="mixed", draining=True))
    with pytest.raises(Unavailable, match="no live instance can decode"):
        desk.start()
    assert desk.dispatcher.in_flight == 0


async def test_who_waits_for_an_instance_between_roles_can_be_closed_and_expires(desk: Desk) -> None:
    desk.beats(desk.beat("m0", role="mixed"))
    first = desk.start()
    desk.fails(first, "unavailable")
    second = desk.start()
    desk.dispatcher.close(first)
    desk.clock.advance(PATIENCE_S)
    desk.dispatcher.sweep()
    assert (first.entry.outcome, second.entry.outcome) == (Outcome.CANCELLED, Outcome.FAILED)
    counts = desk.dispatcher.invariants()
    assert (counts["in_flight"], counts["held"], counts["attempts"], counts["instances_with_work"]) == (0, 0, 0, 0)
    await asyncio.sleep(0)


@pytest.mark.parametrize("held", [False, True])
async def test_a_fault_while_a_request_is_tried_again_ends_it_and_no_other(
    desk: Desk, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no attempt then, so that no answer of a worker would end it any more."""
    desk.beats(desk.beat("m0", role="mixed"))
    first, second = desk.start(), desk.start()
    if held:
        desk.dispatcher.worker_lost(("m0", 1))
        desk.settle()

    assign = RoundRobin.assign

    def breaks(policy: RoundRobin, request: Request, *rest: object) -> object:
        if request.request.request_id == "r1":
            raise ZeroDivisionError
        return assign(policy, request, *rest)

    monkeypatch.setattr(RoundRobin, "assign", breaks)
    if held:
        desk.beats(desk.beat("m1", role="mixed"))
        desk.dispatcher.sweep()
    else:
        desk.fails(first, "engine_fault")
        desk.fails(second, "engine_fault")
    assert first.entry.outcome is Outcome.FAILED
    assert second.attempt is not None
    assert desk.dispatcher.invariants()["in_flight"] == 1
