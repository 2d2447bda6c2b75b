"""The dispatcher by itself: what it sends, and whom it tries, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from core.clock import ManualClock
from core.config import Role
from core.errors import HetServeError, Overloaded, Unavailable
from core.messages import Address, Cancel, Heartbeat, Message, Submit
from core.request import FinishReason, Request
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
        self.calls: list[str] = []
        self.opened: list[tuple[str, str, str | None]] = []
        self.open_attempts = 0

    def open(self, attempt: str, reader: TokenReader, decode: Address, prefill: Address | None) -> None:
        self.open_attempts += 1
        self.opened.append((attempt, decode.name, None if prefill is None else prefill.name))
        self.calls.append(f"open {attempt}")

    def close(self, attempt: str) -> None:
        self.open_attempts -= 1
        self.calls.append(f"close {attempt}")

    def fence(self, attempt: str) -> None:
        self.open_attempts -= 1
        self.fenced.append(attempt)
        self.calls.append(f"fence {attempt}")


class RecordingPeers:
    """Cannot send message number `deaf`, the first being 1."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Message]] = []
        self.lost = 0
        self.deaf = 0

    def send(self, endpoint: str, message: Message) -> bool:
        self.sent.append((endpoint, message))
        return len(self.sent) != self.deaf

    def forget(self, endpoint: str) -> None: ...

    def close(self, linger_s: float = 0.5) -> None: ...


class Desk:
    """A dispatcher between a fake pump and recorded mail."""

    def __init__(self, beat: Beat) -> None:
        self.beat = beat
        self.clock, self.peers, self.pump = ManualClock(), RecordingPeers(), FakePump()
        metrics = Metrics()
        cluster = ClusterState(dead_after_s=1.5, stuck_after_s=3.0)
        self.dispatcher = Dispatcher(
            address=GATEWAY,
            peers=self.peers,
            pump=self.pump,
            life=LifeCycle(RoundRobin(Admission(1 << 20)), cluster, Journal(), Limits(patience_s=PATIENCE_S)),
            metrics=metrics,
            clock=self.clock,
        )
        self.metrics = metrics
        self.inboxes: dict[str, Inbox] = {}
        self.started: list[Generation] = []
        self._requests = 0

    def beats(self, *heartbeats: Heartbeat) -> None:
        self.dispatcher.deliver(list(heartbeats))

    def start(self) -> Generation:
        self._requests += 1
        request = Request(request_id=f"r{self._requests}", prompt=(1, 2, 3), sampling=SamplingParams(max_tokens=9))
        inbox = self.inboxes[request.request_id] = Inbox()
        self.started.append(self.dispatcher.start(request, TextOptions(lambda ids: ""), inbox, 0))
        return self.started[-1]

    def running(self, name: str) -> Generation:
        return next(each for each in self.started if each.generation_id == name)

    def metric(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)

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


async def test_a_prompt_that_cannot_be_read_back_begins_nothing(desk: Desk) -> None:
    desk.beats(desk.beat("m0", role="mixed"))
    request = Request(request_id="r1", prompt=(1, 2, 3), sampling=SamplingParams(max_tokens=9))

    def breaks(ids: list[int]) -> str:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        desk.dispatcher.start(request, TextOptions(breaks), Inbox(), 0)
    assert {name: count for name, count in desk.dispatcher.invariants().items() if count} == {}


async def test_a_retry_that_cannot_be_sent_ends_its_generation_and_no_other(desk: Desk) -> None:
    """A worker made up a token that is none, and died: nothing would tell the next one to begin, nor the client why."""
    desk.beats(desk.beat("m0", role="mixed"), desk.beat("m1", role="mixed"))
    broken, other = desk.start(), desk.start()
    desk.dispatcher.deliver([Progress("r1-1", Delta(("m0", 1), tokens=[1 << 40]))])
    desk.dispatcher.worker_lost(("m0", 1))
    desk.dispatcher.worker_lost(("m1", 1))
    desk.settle()
    desk.beats(desk.beat("m2", role="mixed"))
    desk.dispatcher.sweep()
    assert (broken.entry.outcome, broken.entry.error) == (Outcome.FAILED, "internal_error")
    assert len(await desk.inboxes["r1"].get()) == 1
    with pytest.raises(HetServeError, match="failed to handle"):
        await desk.inboxes["r1"].get()
    assert other.attempt.assignment.decode.name == "m2"
    assert [submit.attempt for submit in desk.submits] == ["r1-1", "r2-1", "r2-2"]
    assert desk.cancels[-1] == Cancel(attempt="r1-2")
    desk.dispatcher.close(other)
    assert {name: count for name, count in desk.dispatcher.invariants().items() if count} == {
        "accepted": 2,
        "failed": 1,
        "cancelled": 1,
    }


async def test_a_delta_that_cannot_be_given_to_the_client_ends_its_stream(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one, too: the life cycle has ended it by then, and nobody else would tell the client."""
    desk.beats(desk.beat("m0", role="mixed"))
    first, second = desk.start(), desk.start()

    def breaks(*rest: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(desk.inboxes["r1"], "put", breaks)
    last = Delta(("m0", 1), tokens=[5], finish=FinishReason.LENGTH)
    desk.dispatcher.deliver([Progress("r1-1", last), Progress("r2-1", last)])
    with pytest.raises(HetServeError, match="failed to handle"):
        await desk.inboxes["r1"].get()
    assert await desk.inboxes["r2"].get() == [(0, last)]
    assert (first.done, second.entry.outcome) == (True, Outcome.COMPLETED)
    assert desk.dispatcher.invariants()["streams"] == desk.dispatcher.invariants()["pump_attempts"] == 0


async def test_an_attempt_that_a_worker_takes_no_message_of_is_stopped_on_both_and_tried_elsewhere(desk: Desk) -> None:
    desk.beats(*(desk.beat(name, role="prefill") for name in ("p0", "p1")), desk.beat("d0"))
    desk.peers.deaf = 2  # the second message: to the prefill worker
    generation = desk.start()
    assert [(submit.attempt, submit.stage) for submit in desk.submits] == [("r1-1", "decode"), ("r1-1", "prefill")]
    assert [cancel.attempt for cancel in desk.cancels] == ["r1-1", "r1-1"]
    assert desk.pump.calls == ["open r1-1", "fence r1-1"]
    desk.settle()
    assert generation.avoid == {("p0", 1)}
    assert names(generation) == ("p1", "d0")
    assert desk.pump.calls[2:] == ["open r1-2"]


async def test_an_attempt_is_listened_for_before_it_is_submitted_and_closed_at_its_end(desk: Desk) -> None:
    desk.beats(desk.beat("p0", role="prefill"), desk.beat("d0"))
    generation = desk.start()
    assert desk.pump.opened == [("r1-1", "d0", "p0")]
    attempt = generation.attempt
    desk.dispatcher.deliver([Progress("r1-1", Delta(("d0", 1), tokens=[5], finish=FinishReason.STOP, cut=True))])
    assert desk.pump.calls == ["open r1-1", "close r1-1"]
    sent = [(endpoint, message.attempt) for endpoint, message in desk.peers.sent if isinstance(message, Cancel)]
    assert sent == [(worker.mailbox, "r1-1") for worker in attempt.workers]
    (submit,) = (submit for submit in desk.submits if submit.stage == "prefill")
    assert (submit.gateway, submit.peer.name, submit.prompt_tokens, submit.deadline_s) == (GATEWAY, "d0", 3, 600.0)


async def test_a_draining_gateway_admits_nobody(desk: Desk) -> None:
    desk.dispatcher.admit(1)
    desk.dispatcher.draining = True
    with pytest.raises(Unavailable, match="draining"):
        desk.dispatcher.admit(1)


async def test_a_full_gateway_admits_nobody(desk: Desk) -> None:
    with pytest.raises(Overloaded):
        desk.dispatcher.admit(desk.dispatcher.max_concurrent + 1)


async def test_what_is_served_is_counted(desk: Desk) -> None:
    desk.beats(desk.beat("m0", role="mixed"), desk.beat("m1", role="mixed"))
    desk.start()
    assert desk.metric("hetserve_in_flight") == 1
    desk.clock.advance(0.5)
    desk.token(desk.running("r1"), "m0")
    desk.clock.advance(0.25)
    desk.token(desk.running("r1"), "m0")
    desk.fails(desk.running("r1"), "engine_fault")
    desk.dispatcher.deliver([Progress("r1-2", Delta(("m1", 1), finish=FinishReason.LENGTH))])
    desk.start()
    desk.fails(desk.running("r2"), "context_length_exceeded")
    found = {
        name: desk.metric(f"hetserve_{name}", **labels)
        for name, labels in {
            "output_tokens_total": {},
            "ttft_seconds_count": {},
            "ttft_seconds_sum": {},
            "itl_seconds_count": {},
            "itl_seconds_sum": {},
            "in_flight": {},
            "retries_total": {"code": "engine_fault"},
        }.items()
    }
    assert found == {
        "output_tokens_total": 2,
        "ttft_seconds_count": 1,
        "ttft_seconds_sum": 0.5,
        "itl_seconds_count": 1,
        "itl_seconds_sum": 0.25,
        "in_flight": 0,
        "retries_total": 1,
    }
    assert [desk.metric("hetserve_requests_total", outcome=each) for each in ("completed", "failed")] == [1, 1]


async def test_the_ears_of_a_gateway_that_stood_still_are_not_the_workers_silence(desk: Desk) -> None:
    desk.beats(desk.beat("m0", role="mixed"))
    generation = desk.start()
    desk.clock.advance(5.0)
    desk.dispatcher.was_deaf(5.0)
    desk.dispatcher.sweep()
    assert generation.failures == 0
    desk.clock.advance(5.0)
    desk.dispatcher.sweep()
    assert generation.failures == 1


async def test_a_heartbeat_that_says_nonsense_is_refused_and_what_comes_behind_it_is_not(desk: Desk) -> None:
    desk.beats(desk.beat("m0", role="cook"), desk.beat("m1", role="mixed"))
    assert [item.name for item in desk.dispatcher.snapshot().instances] == ["m1"]


def names(generation: Generation) -> tuple[str, str]:
    return generation.attempt.assignment.prefill.name, generation.attempt.assignment.decode.name
