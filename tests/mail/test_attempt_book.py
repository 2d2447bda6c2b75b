"""The mail about attempts that is the same for reading and writing: repeats, leases, ends that are said again, foreigners."""

from __future__ import annotations

import msgspec
import pytest

from core.attempts import Effect, Ending, Half, Phase
from core.clock import ManualClock
from core.errors import AttemptLost, DeadlineExceeded, EngineFault, InvalidRequest, LeaseExpired, Unavailable
from core.messages import Address, AttemptState, Failed, Message, Renew, TokenItem, Tokens, Wanted, Withdrawn
from mail.attempt_book import Attempt, AttemptBook
from mail.early_states import CAPACITY, EarlyStates
from mail.outbox import Outbox
from tests.support.workers import DECODE, GATEWAY, LEASE_S, PREFILL, FakePeers, submission

RESTARTED = msgspec.structs.replace(PREFILL, incarnation=2)
OTHER = Address("other", 1, "tcp://other")


class Recorder:
    """A worker that does nothing but remember what it was told."""

    def __init__(self) -> None:
        self.effects: list[tuple[str, Effect]] = []
        self.freed: list[tuple[str, str]] = []

    def answer(self, attempt: Attempt, effect: Effect) -> None:
        self.effects.append((attempt.name, effect))

    def free(self, attempt: Attempt, reason: str) -> None:
        self.freed.append((attempt.name, reason))


class Rig:
    """The book of a decode instance."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.peers = FakePeers()
        self.book = AttemptBook(DECODE, Outbox(DECODE, self.peers, self.clock), self.peers, self.clock, LEASE_S)
        self.server = Recorder()

    def open(self, attempt: str = "a", stage: str = "decode", phase: Phase = Phase.WAITING) -> Attempt:
        submit = submission(attempt, stage)
        assert self.book.is_new(submit)
        opened = self.book.open(submit, Half(stage), self.server)
        for step in (Phase.ADMITTED, Phase.GRANTED, Phase.RUNNING):
            if stage == "decode" and opened.life.phase is not phase:
                opened.life.move(step)
        self.book.catch_up(attempt)
        return opened

    def hear(self, phase: Phase, number: int, attempt: str = "a", worker: Address = PREFILL) -> None:
        self.book.renewed(worker, number, AttemptState(attempt, phase))

    def ask(self, position: int = 0, attempt: str = "a", gateway: Address = GATEWAY) -> list[Message]:
        """A gateway's `Keep`, and what it gets."""
        self.book.wanted(gateway, Wanted(attempt, position))
        self.book.flush()
        return self.peers.take(gateway)

    def tick(self, seconds: float) -> None:
        self.clock.advance(seconds)
        for attempt, error in self.book.overdue():
            self.book.fail(attempt, error)
        self.book.tick()


def item(position: int, attempt: str = "a") -> TokenItem:
    return TokenItem(attempt=attempt, position=position, tokens=(position,))


def failure(messages: list[Message]) -> str:
    (failed,) = messages
    assert isinstance(failed, Failed)
    return failed.code


def test_a_submit_that_comes_again_changes_nothing() -> None:
    rig = Rig()
    attempt = rig.open()
    assert not rig.book.is_new(submission("a", "decode"))
    rig.book.end(attempt, Ending.FINISHED, "finished")
    assert not rig.book.is_new(submission("a", "decode"))
    rig.tick(LEASE_S)
    assert rig.book.is_new(submission("a", "decode"))


def test_a_cancel_that_overtook_its_submit_is_remembered() -> None:
    rig = Rig()
    rig.book.cancel("a")
    assert not rig.book.is_new(submission("a", "decode"))
    assert rig.ask() == []


def test_a_cancel_does_not_wipe_out_how_an_attempt_ended() -> None:
    rig = Rig()
    rig.book.fail(rig.open(), EngineFault("broken"))
    rig.peers.take(GATEWAY)
    rig.book.cancel("a")
    assert failure(rig.ask()) == EngineFault.code


def test_the_largest_ticket_is_kept() -> None:
    rig = Rig()
    for ticket in (3, 9, 4):
        rig.book.is_new(submission(f"a{ticket}", "decode", ticket=ticket))
    assert rig.book.newest_ticket == 9


# --- what the gateway asks --------------------------------------------------------------------------------------------


def test_an_attempt_that_nobody_knows_is_lost_and_its_late_submit_void() -> None:
    rig = Rig()
    for _ in range(2):
        assert failure(rig.ask()) == AttemptLost.code
    assert not rig.book.is_new(submission("a", "decode"))


def test_a_failure_is_said_again_as_long_as_it_is_asked_for() -> None:
    rig = Rig()
    rig.book.fail(rig.open(), EngineFault("broken"))
    assert failure(rig.peers.take(GATEWAY)) == EngineFault.code
    for _ in range(4):
        rig.tick(LEASE_S * 0.9)
        assert failure(rig.ask()) == EngineFault.code
    rig.tick(LEASE_S)
    assert failure(rig.ask()) == AttemptLost.code


def test_a_refusal_is_said_again_too() -> None:
    rig = Rig()
    rig.book.refuse(submission("a", "decode"), InvalidRequest("no"))
    assert failure(rig.peers.take(GATEWAY)) == InvalidRequest.code
    assert [type(message) for message in rig.peers.take(PREFILL)] == [Withdrawn]
    assert failure(rig.ask()) == InvalidRequest.code
    assert not rig.book.is_new(submission("a", "decode"))


@pytest.mark.parametrize("ended", [False, True])
def test_lost_tokens_are_sent_again_with_all_that_they_carried(ended: bool) -> None:
    rig = Rig()
    attempt = rig.open(phase=Phase.RUNNING)
    first, last = item(1), msgspec.structs.replace(item(2), finish="length")
    rig.book.tokens(attempt, first)
    rig.book.tokens(attempt, last)
    if ended:
        rig.book.end(attempt, Ending.FINISHED, "finished")
    rig.book.flush()
    rig.peers.take(GATEWAY)
    assert rig.ask(1) == []
    (again,) = rig.ask(2)
    assert isinstance(again, Tokens)
    assert again.items == (msgspec.convert(msgspec.to_builtins(last), TokenItem),)
    assert rig.ask(3) == []


@pytest.mark.parametrize("ended", [False, True])
def test_tokens_that_never_arrive_end_in_a_failure(ended: bool) -> None:
    rig = Rig()
    attempt = rig.open(phase=Phase.RUNNING)
    rig.book.tokens(attempt, item(1))
    if ended:
        rig.book.end(attempt, Ending.FINISHED, "finished")
    rig.ask(1)
    for _ in range(3):
        assert not any(isinstance(message, Failed) for message in rig.ask(1))
        rig.tick(LEASE_S / 2 - 1e-3)
    assert not any(isinstance(message, Failed) for message in rig.ask(1))
    rig.tick(LEASE_S / 10)
    assert failure([message for message in rig.ask(1) if isinstance(message, Failed)]) == AttemptLost.code
    assert len(rig.book) == 0


def test_another_gateway_keeps_nothing_alive_and_gets_nothing() -> None:
    rig = Rig()
    attempt = rig.open(stage="local")
    rig.book.tokens(attempt, item(0))
    rig.book.flush()
    rig.peers.take(GATEWAY)
    for _ in range(3):
        rig.clock.advance(LEASE_S / 3)
        assert rig.ask(gateway=OTHER) == []
        assert rig.ask(gateway=msgspec.structs.replace(GATEWAY, incarnation=2)) == []
    rig.tick(0.0)
    assert failure(rig.peers.take(GATEWAY)) == LeaseExpired.code


def test_a_gateway_that_no_longer_lists_an_attempt_ends_it_within_a_lease() -> None:
    rig = Rig()
    rig.open(stage="local")
    for _ in range(5):
        rig.tick(LEASE_S * 0.9)
        rig.ask()
    rig.tick(LEASE_S * 0.9)
    assert len(rig.book) == 1
    rig.tick(LEASE_S * 0.1)
    assert rig.server.freed[0][0] == "a"
    assert len(rig.book) == 0


# --- what the other half says -----------------------------------------------------------------------------------------


def test_what_the_other_half_says_reaches_the_worker_once() -> None:
    rig = Rig()
    rig.open()
    for number in (2, 2, 1):
        rig.hear(Phase.ADMITTED, number)
    assert rig.server.effects == [("a", Effect.RESERVE)]


@pytest.mark.parametrize("worker", [RESTARTED, OTHER, msgspec.structs.replace(PREFILL, mailbox="tcp://elsewhere")])
def test_another_incarnation_or_somebody_else_is_not_heard(worker: Address) -> None:
    rig = Rig()
    rig.open()
    rig.hear(Phase.ADMITTED, 1, worker=worker)
    rig.book.withdrawn(Withdrawn(worker=worker, attempt="a", reason="no"))
    assert rig.server.effects == []
    assert len(rig.book) == 1
    rig.ask()
    rig.tick(LEASE_S)
    assert len(rig.book) == 0


def test_what_was_said_before_the_submit_came_counts_then() -> None:
    rig = Rig()
    rig.hear(Phase.ADMITTED, 3)
    rig.hear(Phase.WAITING, 2)
    assert rig.peers.sent == []
    rig.open()
    assert rig.server.effects == [("a", Effect.RESERVE)]


def test_what_somebody_else_said_before_the_submit_came_does_not_count() -> None:
    rig = Rig()
    rig.hear(Phase.ADMITTED, 3, worker=OTHER)
    rig.open()
    assert rig.server.effects == []


def test_early_words_are_kept_for_a_lease_and_in_bounded_number() -> None:
    clock = ManualClock()
    early = EarlyStates(clock, LEASE_S)
    for index in range(CAPACITY + 1):
        early.put(str(index), (PREFILL, 1, Phase.ADMITTED))
    assert len(early) == CAPACITY
    assert early.take("0") is None
    assert early.take("1") == (PREFILL, 1, Phase.ADMITTED)
    clock.advance(LEASE_S)
    assert early.take("2") is None
    early.sweep()
    assert len(early) == 0


def test_an_attempt_that_is_over_is_withdrawn_whenever_the_other_half_lists_it() -> None:
    rig = Rig()
    rig.book.end(rig.open(), Ending.CANCELLED, "cancelled")
    for number in (1, 2):
        rig.hear(Phase.GRANTED, number)
        assert rig.peers.take(PREFILL) == [Withdrawn(worker=DECODE, attempt="a", reason="cancelled")]


def test_so_is_one_that_never_began() -> None:
    rig = Rig()
    rig.book.refuse(submission("a", "decode"), Unavailable("draining"))
    rig.book.cancel("b")
    rig.peers.sent.clear()
    for name in ("a", "b"):
        rig.hear(Phase.ADMITTED, 1, attempt=name)
    assert [message.attempt for message in rig.peers.take(PREFILL) if isinstance(message, Withdrawn)] == ["a", "b"]


def test_an_attempt_that_was_delivered_is_not_withdrawn_from_who_has_not_seen_so_yet() -> None:
    rig = Rig()
    rig.book.end(rig.open(stage="prefill"), Ending.DELIVERED, "delivered")
    rig.hear(Phase.GRANTED, 1)
    assert rig.peers.sent == []


@pytest.mark.parametrize(("ending", "fails"), [(Ending.WITHDRAWN, True), (Ending.DELIVERED, False)])
def test_an_end_of_which_the_gateway_has_heard_nowhere_for_too_long_is_a_loss_unless_another_goes_on(
    ending: Ending, fails: bool
) -> None:
    rig = Rig()
    rig.book.end(rig.open(stage="prefill"), ending, "it is over")
    for _ in range(3):
        assert rig.ask(0) == []
        rig.tick(LEASE_S / 2 - 1e-3)
    assert rig.ask(0) == []
    rig.tick(LEASE_S / 10)
    answers = rig.ask(0)
    assert failure(answers) == AttemptLost.code if fails else answers == []


@pytest.mark.parametrize(("phase", "ends"), [(Phase.WAITING, True), (Phase.GRANTED, True), (Phase.RUNNING, False)])
def test_a_withdrawal_ends_what_does_not_run_yet_without_a_word_to_the_gateway(phase: Phase, ends: bool) -> None:
    rig = Rig()
    rig.open(phase=phase)
    rig.book.withdrawn(Withdrawn(worker=PREFILL, attempt="a", reason="gone"))
    assert (len(rig.book) == 0) == ends
    assert rig.peers.sent == []


def test_a_running_half_whose_commit_was_lost_says_so_when_asked() -> None:
    rig = Rig()
    rig.open(phase=Phase.RUNNING)
    rig.hear(Phase.GRANTED, 1)
    rig.book.flush()
    assert rig.peers.take(PREFILL) == [Renew(worker=DECODE, number=1, states=(AttemptState("a", Phase.RUNNING),))]


def test_what_waits_or_is_in_transit_is_renewed_and_what_runs_is_not() -> None:
    rig = Rig()
    for name, phase in (("a", Phase.WAITING), ("b", Phase.GRANTED), ("c", Phase.RUNNING)):
        rig.open(name, phase=phase)
    rig.open("d", "local")
    rig.tick(LEASE_S / 3)
    states = (AttemptState("a", Phase.WAITING), AttemptState("b", Phase.GRANTED))
    assert rig.peers.take(PREFILL) == [Renew(worker=DECODE, number=1, states=states)]
    rig.tick(LEASE_S / 6)
    assert rig.peers.take(PREFILL) == []


# --- ends -------------------------------------------------------------------------------------------------------------


def test_a_failure_is_told_to_both_once() -> None:
    rig = Rig()
    attempt = rig.open()
    rig.book.fail(attempt, EngineFault("broken"))
    rig.book.fail(attempt, EngineFault("again"))
    rig.book.end(attempt, Ending.CANCELLED, "too late")
    assert failure(rig.peers.take(GATEWAY)) == EngineFault.code
    assert rig.peers.take(PREFILL) == [Withdrawn(worker=DECODE, attempt="a", reason="broken")]
    assert rig.server.freed == [("a", "broken")]


def test_a_deadline_is_a_failure() -> None:
    rig = Rig()
    rig.open(stage="local")
    for _ in range(39):
        rig.tick(LEASE_S / 2)
        assert rig.ask() == []
    rig.tick(LEASE_S / 2)
    assert failure(rig.peers.take(GATEWAY)) == DeadlineExceeded.code


def test_a_fault_in_a_handler_ends_its_attempt_and_no_other() -> None:
    rig = Rig()
    rig.open("a")
    rig.open("b")
    rig.book.fault("a", KeyError("oops"))
    rig.book.fault("nobody", KeyError("oops"))
    assert failure(rig.peers.take(GATEWAY)) == EngineFault.code
    assert rig.book.get("b") is not None
    assert len(rig.book) == 1
