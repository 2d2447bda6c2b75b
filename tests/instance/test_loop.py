"""The loop, a turn at a time on a clock moved by hand: floods of mail, steps longer than leases, faults in handlers, roles, and
how it shows that it hangs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from core.attempts import Phase
from core.clock import ManualClock
from core.config import EngineConfig, Role
from core.cost import CostModel
from core.errors import AttemptLost, EngineFault, InvalidRequest, Unavailable
from core.layout import KVLayout, LayerShape
from core.messages import (
    Address,
    AttemptState,
    Cancel,
    Failed,
    Grant,
    Keep,
    Message,
    Renew,
    Submit,
    Tokens,
    Wanted,
    Withdrawn,
)
from decode.worker import DecodeWorker
from engine.engine import Engine
from engine.simulated_runner import SimulatedRunner, SimulatedStep
from instance.loop import LOST_STEPS, MAIL_BUDGET_S, TICK_S, EngineLoop
from kv_transfer.events import Broken, Delivered, Received, SendFailed
from mail.attempt_book import AttemptBook
from mail.outbox import Outbox
from prefill.worker import PrefillWorker
from tests.support.workers import (
    BLOCK_SIZE,
    DECODE,
    GATEWAY,
    LAYERS,
    LEASE_S,
    PREFILL,
    FakeMailbox,
    FakePeers,
    FakeReceiver,
    FakeSender,
    submission,
)

ME = Address("me", 1, "tcp://me")
STEP_S = 0.01


class Rig:
    """A loop whose device ends a step `step_s` after it began, as the clock says."""

    def __init__(self, role: Role = Role.MIXED, step_s: float = STEP_S, num_blocks: int = 64, read_s: float = 0.0) -> None:
        clock = self.clock = ManualClock()
        layout = KVLayout.whole(layers=(LayerShape(1, 4, 4),) * LAYERS, dtype="float32", block_size=BLOCK_SIZE)
        cost = CostModel(step_s=step_s, prefill_token_s=0, attention_s=0, decode_sequence_s=0, decode_context_s=0)
        self.runner = SimulatedRunner(layout, num_blocks, 200, 100, cost, clock.advance, clock=clock)
        self.engine = Engine(self.runner, EngineConfig(prefix_cache=False), clock)
        self.mailbox, self.peers = FakeMailbox(clock, read_s), FakePeers()
        self.sender, self.receiver = FakeSender(), FakeReceiver()
        self.book = AttemptBook(ME, Outbox(ME, self.peers, clock), self.peers, clock, LEASE_S)
        self.prefill = PrefillWorker(self.engine, self.sender, self.book, clock)
        self.decode = DecodeWorker(self.engine, self.receiver, self.book, self.peers, ME, clock, LEASE_S, 1 << 20)
        self.loop = EngineLoop(self.engine, self.mailbox, self.book, self.prefill, self.decode, role, clock, lambda: None)

    def turn(self, *messages: Message) -> float:
        self.mailbox.put(*messages)
        return self.loop.turn()

    def pass_time(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Turn whenever the loop has something to do, or asked to be called again."""
        end_s = self.clock.now() + seconds
        while self.clock.now() < end_s and not until():
            self.clock.advance(max(self.loop.turn(), 1e-3))

    def tokens(self) -> list[int]:
        """Positions that the gateway was sent since it was last asked."""
        messages = self.peers.take(GATEWAY)
        return [item.position for m in messages if isinstance(m, Tokens) for item in m.items]

    def failures(self) -> dict[str, str]:
        return {m.attempt: m.code for m in self.peers.take(GATEWAY) if isinstance(m, Failed)}


def keep(*attempts: str, position: int = 0) -> Keep:
    return Keep(gateway=GATEWAY, wanted=tuple(Wanted(attempt, position) for attempt in attempts))


def states(*attempts: str, number: int, worker: Address = DECODE, phase: Phase = Phase.WAITING) -> Renew:
    return Renew(worker=worker, number=number, states=tuple(AttemptState(attempt, phase) for attempt in attempts))


def grant(attempt: str, number: int = 1) -> Grant:
    return Grant(
        attempt=attempt, grant=number, decode=DECODE, endpoints=("d:1",), first_token=0, windowed=False, lease_s=5.0, answers=99
    )


# --- mail -------------------------------------------------------------------------------------------------------------


def test_a_flood_of_submits_stops_neither_steps_nor_renewals_nor_leases() -> None:
    """As large prompts arrive a thousand at a time: each takes a millisecond to take in."""
    rig = Rig(read_s=1e-3, num_blocks=40_000)
    rig.turn(submission("running", "local", tokens=10, max_tokens=150), submission("reading", "prefill", tokens=9))
    rig.clock.advance(STEP_S)
    rig.turn()
    rig.peers.sent.clear()
    rig.mailbox.put(*(submission(f"flood{index}", "decode", tokens=100) for index in range(1000)))
    turns, renewed_s = 0, []
    while rig.mailbox.messages:
        assert rig.turn() == 0.0 or not rig.mailbox.messages
        turns += 1
        rig.clock.advance(STEP_S)
        if rig.peers.take(DECODE):
            renewed_s.append(rig.clock.now())
    assert turns >= 0.8 * 1000 * 1e-3 / MAIL_BUDGET_S
    assert len(rig.tokens()) >= 148  # all that it was to write
    assert renewed_s
    assert (
        max(later - earlier for earlier, later in zip([0.0, *renewed_s], [*renewed_s, rig.clock.now()], strict=True))
        < LEASE_S / 2
    )


def test_a_turn_takes_no_more_mail_than_its_budget_lasts_and_comes_back_at_once() -> None:
    rig = Rig(read_s=1e-3)
    rig.mailbox.put(*(Cancel(attempt=str(index)) for index in range(12)))
    assert rig.turn() == 0.0
    assert 12 - len(rig.mailbox.messages) in range(4, 8)
    while rig.mailbox.messages:
        rig.turn()
    assert 0 < rig.turn() <= TICK_S


def test_one_message_that_takes_longer_than_the_budget_is_handled() -> None:
    rig = Rig(read_s=1.0)
    assert rig.turn(submission("a", "local")) == 0.0
    assert len(rig.book) == 1


# --- long steps -------------------------------------------------------------------------------------------------------


def test_during_a_step_of_four_leases_mail_leases_and_renewals_go_on() -> None:
    rig = Rig(step_s=4 * LEASE_S)
    rig.turn(submission("early", "prefill", tokens=10), submission("doomed", "local"))
    rig.turn(grant("early"))
    assert rig.engine.in_flight == 1
    assert "early" in rig.sender.sessions
    rig.clock.advance(0.1)
    rig.turn(submission("late", "prefill", tokens=10))
    renewed = 0
    for number in range(1, int(3.5 * LEASE_S * 10)):
        rig.clock.advance(0.1)
        rig.turn(keep("early", "late"), states("early", "late", number=number))
        renewed += sum(isinstance(message, Renew) for message in rig.peers.take(DECODE))
        if number == 20:
            rig.turn(Cancel(attempt="doomed"))
    assert rig.engine.in_flight == 1
    assert renewed >= 3 * 3.5 - 1
    assert rig.failures() == {}
    assert len(rig.book) == 2
    rig.clock.advance(LEASE_S)
    rig.turn(keep("early", "late"))
    assert rig.tokens() == [0]
    assert rig.sender.sessions["early"].tail is not None


def test_in_a_long_step_a_silent_peer_still_ends_its_attempt() -> None:
    rig = Rig(step_s=4 * LEASE_S)
    rig.turn(submission("a", "prefill"))
    rig.clock.advance(LEASE_S * 0.9)
    rig.turn(keep("a"))
    rig.clock.advance(LEASE_S * 0.2)
    rig.turn()
    assert rig.failures() == {"a": "lease_expired"}
    assert rig.engine.in_flight == 1


def test_layers_are_pushed_while_the_step_goes_on() -> None:
    rig = Rig()
    rig.turn(submission("a", "prefill", tokens=10))
    rig.turn(grant("a"))
    part = rig.engine._flying[0].parts[0]
    rig.loop._layer_written(1, (part,), 0)
    rig.turn()
    assert rig.sender.sessions["a"].pushed == {0: set(range(10))}
    assert rig.engine.in_flight == 1


# --- faults -----------------------------------------------------------------------------------------------------------

MESSAGES: dict[str, tuple[str, str, Message | object]] = {
    "submit": ("decode", "submit", submission("bad", "local")),
    "grant": ("prefill", "granted", grant("bad")),
    "keep": ("book", "wanted", keep("bad", "good")),
    "renew": ("book", "renewed", states("bad", "good", number=1)),
    "withdrawn": ("book", "withdrawn", Withdrawn(worker=DECODE, attempt="bad", reason="x")),
    "cancel": ("book", "cancel", Cancel(attempt="bad")),
    "delivered": ("prefill", "delivered", Delivered("bad", 1, 0.0)),
    "send failed": ("prefill", "send_failed", SendFailed("bad", EngineFault("x"))),
    "received": ("decode", "received", Received(1, "bad", b"", 1, 0.0)),
    "broken": ("decode", "broken", Broken(1, "bad", EngineFault("x"))),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_fault_in_a_handler_ends_its_attempt_and_nothing_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    owner, method, message = MESSAGES[name]
    if name != "submit":
        rig.turn(submission("bad", "prefill", tokens=10))
    rig.turn(submission("good", "local", max_tokens=3))
    target = getattr(rig, owner)
    healthy = getattr(target, method)

    def broken(*args: object) -> object:
        if any("bad" in repr(argument) for argument in args):
            raise KeyError("oops")
        return healthy(*args)

    monkeypatch.setattr(target, method, broken)
    if isinstance(message, Message):
        rig.turn(message)
    else:
        rig.loop.post(message)
        rig.turn()
    failed = [m for m in rig.peers.take(GATEWAY) if isinstance(m, Failed)]
    assert [(m.attempt, m.code) for m in failed] == [("bad", EngineFault.code)]
    monkeypatch.undo()
    rig.pass_time(1.0, until=lambda: len(rig.book) == 0)
    assert max(rig.tokens()) == 2
    assert rig.engine.invariants() == []


@pytest.mark.parametrize("method", ["layer_written", "drawn", "admitted"])
def test_a_fault_after_a_step_ends_its_attempt_and_nothing_else(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()

    def broken(*args: object) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(rig.prefill, method, broken)
    rig.turn(submission("bad", "prefill"), submission("good", "local", max_tokens=3))
    rig.pass_time(1.0, until=lambda: len(rig.book) == 0)
    messages = rig.peers.take(GATEWAY)
    assert [(m.attempt, m.code) for m in messages if isinstance(m, Failed)] == [("bad", EngineFault.code)]
    assert [i.finish is not None for m in messages if isinstance(m, Tokens) for i in m.items if i.attempt == "good"][-1]
    assert rig.engine.invariants() == []


def test_an_attempt_that_cannot_even_be_freed_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    rig.turn(submission("bad", "prefill"), submission("good", "local", max_tokens=3))

    def broken(*args: object) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(rig.prefill, "free", broken)
    rig.turn(Cancel(attempt="bad"))
    rig.pass_time(1.0, until=lambda: len(rig.book) == 0)
    assert max(rig.tokens()) == 2


def test_a_device_that_is_gone_ends_the_loop() -> None:
    rig = Rig()

    def gone(*args: object) -> None:
        raise OSError("no device")

    rig.runner.launch = gone
    for index in range(LOST_STEPS - 1):
        rig.turn(submission(str(index), "local"))
        rig.turn()
    rig.turn(submission("last", "local"))
    with pytest.raises(EngineFault, match="one token by itself"):
        rig.turn()


# --- roles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["prefill", "decode", "local"])
@pytest.mark.parametrize("role", list(Role))
def test_a_role_says_what_work_is_taken(role: Role, stage: str) -> None:
    rig = Rig(Role.MIXED)
    rig.loop.set_role(role)
    rig.turn(submission("a", stage))
    taken = role is Role.MIXED or (stage == "prefill") == (role is Role.PREFILL)
    assert len(rig.book) == taken
    assert rig.loop.progress.role is role
    if not taken:
        assert rig.failures() == {"a": Unavailable.code}
        peer = {"prefill": DECODE, "decode": PREFILL}.get(stage)
        assert peer is None or [type(message) for message in rig.peers.take(peer)] == [Withdrawn]


@pytest.mark.parametrize("flip", ["role", "drain"])
def test_what_is_here_goes_on_when_no_more_is_taken(flip: str) -> None:
    rig = Rig(Role.MIXED)
    rig.turn(submission("a", "local", max_tokens=5))
    if flip == "role":
        rig.loop.set_role(Role.PREFILL)
    else:
        rig.loop.drain()
    rig.turn(submission("b", "local"))
    assert rig.failures() == {"b": Unavailable.code}
    rig.pass_time(1.0, until=lambda: len(rig.book) == 0)
    assert max(rig.tokens()) == 4
    rig.turn()
    assert rig.loop.progress.drained == (flip == "drain")


def test_a_drain_can_be_taken_back() -> None:
    rig = Rig()
    rig.loop.drain()
    rig.turn(submission("a", "local"))
    assert rig.loop.load().draining
    rig.loop.drain(False)
    rig.turn(submission("b", "local"))
    assert rig.failures() == {"a": Unavailable.code}
    assert not rig.loop.load().draining
    assert len(rig.book) == 1


def test_a_stage_that_is_none_is_refused() -> None:
    rig = Rig()
    bad = Submit(**{name: getattr(submission("a", "local"), name) for name in Submit.__struct_fields__} | {"stage": "bake"})
    rig.turn(bad)
    assert rig.failures() == {"a": InvalidRequest.code}


def test_what_a_gateway_asks_for_and_never_came_is_lost() -> None:
    rig = Rig()
    rig.turn(keep("a"))
    assert rig.failures() == {"a": AttemptLost.code}
    rig.turn(submission("a", "local"))
    assert len(rig.book) == 0


# --- load, and hanging ------------------------------------------------------------------------------------------------


def test_an_idle_loop_that_turns_is_not_stalled_and_one_that_does_not_is() -> None:
    rig = Rig()
    rig.pass_time(10.0)
    assert rig.loop.load().stalled_s <= 2 * TICK_S
    rig.clock.advance(3.0)
    assert rig.loop.load().stalled_s >= 3.0
    assert rig.loop.load().step_age_s >= 3.0


def test_a_step_that_does_not_end_shows_though_the_loop_turns() -> None:
    rig = Rig(step_s=100.0)
    rig.turn(submission("a", "local"))
    for second in range(1, 5):
        rig.clock.advance(1.0)
        rig.turn(keep("a"))
        assert rig.loop.load().stalled_s == pytest.approx(second)
        assert rig.loop.load().step_age_s == 0.0


def test_a_layer_is_a_sign_of_life_and_a_long_step_no_death(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a step with nothing to hand over."""
    rig = Rig(step_s=100.0)
    steps: list[SimulatedStep] = []
    launch = rig.runner.launch
    monkeypatch.setattr(rig.runner, "launch", lambda *step: steps.append(launch(*step)) or steps[-1])
    rig.turn(submission("a", "local"))
    for _ in range(20):
        rig.clock.advance(2.0)
        assert steps[0].on_layer is not None
        steps[0].on_layer(0)
        rig.turn(keep("a"))
        assert rig.loop.load().stalled_s == 0.0
    rig.clock.advance(2.5)
    assert rig.loop.load().stalled_s == pytest.approx(2.5)


def test_work_that_waits_while_no_step_is_made_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    rig.pass_time(10.0)
    monkeypatch.setattr(rig.engine, "launch", lambda *_: False)
    rig.turn(submission("a", "local"))
    for _ in range(4):
        rig.clock.advance(1.0)
        rig.turn(keep("a"))
    assert 4.0 <= rig.loop.load().stalled_s <= 4.1
    monkeypatch.undo()
    rig.turn()
    rig.clock.advance(STEP_S)
    rig.turn()
    assert rig.loop.load().stalled_s <= STEP_S


def test_work_that_waits_for_a_peer_does_not_show() -> None:
    """All blocks are kept for KV that comes in: only the peer, or its lease, can change that."""
    rig = Rig(num_blocks=8)
    rig.turn(submission("a", "decode", tokens=24, max_tokens=2), states("a", number=1, worker=PREFILL, phase=Phase.ADMITTED))
    rig.turn(submission("b", "local", tokens=24, max_tokens=2))
    assert rig.receiver.open_grants == 1
    for number in range(2, 12):
        rig.clock.advance(1.0)
        rig.turn(keep("a", "b"), states("a", number=number, worker=PREFILL, phase=Phase.GRANTED))
        assert rig.loop.load().stalled_s == 0.0
    assert rig.loop.load().waiting == 1


def test_load_counts_what_waits_for_its_prefill_side_too() -> None:
    rig = Rig()
    rig.turn(submission("a", "decode", tokens=24, ticket=7), submission("b", "local", tokens=10, ticket=5))
    load = rig.loop.load()
    assert (load.waiting, load.waiting_tokens, load.running, load.newest_ticket) == (1, 24, 1, 7)
