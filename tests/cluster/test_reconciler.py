from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.reconciler import GiveUp, Kill, Phase, Reconciler, RestartPolicy, Start

POLICY = RestartPolicy(backoff_s=1.0, backoff_cap_s=8.0, settled_s=10.0, max_failed_starts=3, start_timeout_s=60.0)


def test_everything_starts_at_once_with_the_first_incarnation() -> None:
    reconciler = Reconciler(["gateway", "decode-0"])
    assert reconciler.step(0.0) == [Start("gateway", 1), Start("decode-0", 1)]
    assert reconciler.step(0.0) == []


def test_a_member_that_dies_is_replaced_at_once_with_the_next_incarnation() -> None:
    reconciler = Reconciler(["a"], POLICY)
    reconciler.step(0.0)
    assert reconciler.ready("a", 1, 1.0)
    assert reconciler.ended("a", 1, "killed", 50.0)
    assert reconciler.step(50.0) == [Start("a", 2)]


def test_deaths_in_a_row_wait_longer_and_longer_up_to_the_cap() -> None:
    reconciler = Reconciler(["a"], POLICY)
    now_s, pauses = 0.0, []
    for incarnation in range(1, 8):
        began_s = now_s
        now_s += reconciler.wake_s(now_s) or 0.0
        pauses.append(now_s - began_s)
        assert reconciler.step(now_s) == [Start("a", incarnation)]
        reconciler.ready("a", incarnation, now_s)
        reconciler.ended("a", incarnation, "crash", now_s)
    assert pauses == [0.0, 0.0, 1.0, 2.0, 4.0, 8.0, 8.0]


def test_a_long_life_clears_the_record() -> None:
    reconciler = Reconciler(["a"], POLICY)
    now_s = 0.0
    for incarnation in range(1, 5):
        now_s += reconciler.wake_s(now_s) or 0.0
        reconciler.step(now_s)
        reconciler.ready("a", incarnation, now_s)
        reconciler.ended("a", incarnation, "crash", now_s)
    now_s += 100.0
    reconciler.step(now_s)
    reconciler.ready("a", 5, now_s)
    reconciler.ended("a", 5, "crash", now_s + POLICY.settled_s)
    assert reconciler.wake_s(now_s + POLICY.settled_s) == 0.0


def test_failed_starts_in_a_row_are_given_up_with_the_last_reason() -> None:
    reconciler = Reconciler(["a"], POLICY)
    now_s = 0.0
    for incarnation in range(1, POLICY.max_failed_starts + 1):
        assert reconciler.step(now_s) == [Start("a", incarnation)]
        reconciler.ended("a", incarnation, f"no memory ({incarnation})", now_s)
        now_s += 100.0
    assert reconciler.step(now_s) == [GiveUp("a", 3, "no memory (3)")]
    assert reconciler.step(now_s + 1e6) == []
    assert reconciler.settled


def test_a_hopeless_first_start_is_given_up_at_once_but_a_member_that_worked_before_is_tried_again() -> None:
    reconciler = Reconciler(["a", "b"], POLICY)
    reconciler.step(0.0)
    reconciler.ended("a", 1, "not a model", 0.0, hopeless=True)
    reconciler.ready("b", 1, 0.0)
    reconciler.ended("b", 1, "killed", 20.0)
    assert reconciler.step(20.0) == [GiveUp("a", 1, "not a model"), Start("b", 2)]
    reconciler.ended("b", 2, "port in use", 20.0, hopeless=True)
    assert reconciler.step(21.0) == [Start("b", 3)]


def test_a_member_that_worked_is_tried_for_ever_at_the_longest_pause() -> None:
    reconciler = Reconciler(["a"], POLICY)
    reconciler.step(0.0)
    reconciler.ready("a", 1, 0.0)
    reconciler.ended("a", 1, "node died", 20.0)
    now_s, pauses = 20.0, []
    for incarnation in range(2, 40):
        pauses.append(reconciler.wake_s(now_s))
        now_s += pauses[-1] or 0.0
        assert reconciler.step(now_s) == [Start("a", incarnation)]
        reconciler.ended("a", incarnation, "no such accelerator", now_s, hopeless=True)
    assert pauses[-30:] == [POLICY.backoff_cap_s] * 30
    assert not reconciler.settled


def test_a_start_that_hangs_is_killed_and_counts_as_failed() -> None:
    reconciler = Reconciler(["a"], POLICY)
    reconciler.step(0.0)
    assert reconciler.wake_s(0.0) == 60.0
    assert reconciler.step(60.0) == [Kill("a", 1, "not ready after 60 s")]
    assert reconciler.step(61.0) == []
    assert not reconciler.ready("a", 1, 61.0), "a condemned member must not become ready"
    reconciler.ended("a", 1, "killed", 62.0)
    assert reconciler.slots["a"].failed_starts == 1
    assert reconciler.slots["a"].reason == "not ready after 60 s", "the cause, not the weapon"


def test_a_member_is_condemned_once() -> None:
    reconciler = Reconciler(["a"], POLICY)
    reconciler.step(0.0)
    reconciler.ready("a", 1, 0.0)
    assert reconciler.condemn("a", 1, "silent") == Kill("a", 1, "silent")
    assert reconciler.condemn("a", 1, "silent") is None
    assert reconciler.condemn("a", 2, "silent") is None


class ClusterMachine(RuleBasedStateMachine):
    """Processes come, die and lie; the model is a table of which incarnations are really alive."""

    def __init__(self) -> None:
        super().__init__()
        self.reconciler = Reconciler(["a", "b", "c"], POLICY)
        self.now_s = 0.0
        self.alive: dict[str, int] = {}
        self.highest: dict[str, int] = {}
        self.given_up: set[str] = set()
        self.worked: set[str] = set()

    @rule(seconds=st.floats(0, 40))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    @rule()
    def step(self) -> None:
        for action in self.reconciler.step(self.now_s):
            assert action.name not in self.given_up
            match action:
                case Start(name, incarnation):
                    assert name not in self.alive, "two live incarnations of one member"
                    assert incarnation > self.highest.get(name, 0)
                    self.alive[name] = self.highest[name] = incarnation
                case Kill(name, incarnation, _):
                    assert self.alive.get(name) == incarnation
                case GiveUp(name, failures, _):
                    assert name not in self.alive
                    assert name not in self.worked, "what worked once is never given up"
                    assert failures >= 1
                    self.given_up.add(name)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def becomes_ready(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.alive)))
        if self.reconciler.ready(name, self.alive[name], self.now_s):
            self.worked.add(name)

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), hopeless=st.booleans())
    def dies(self, data: st.DataObject, hopeless: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.alive)))
        assert self.reconciler.ended(name, self.alive.pop(name), "died", self.now_s, hopeless)

    @rule(name=st.sampled_from(["a", "b", "c", "stranger"]), age=st.integers(1, 3))
    def ghosts_change_nothing(self, name: str, age: int) -> None:
        before = repr(self.reconciler.slots)
        ghost = self.highest.get(name, 0) - age
        assert not self.reconciler.ready(name, ghost, self.now_s)
        assert not self.reconciler.ended(name, ghost, "ghost", self.now_s)
        assert self.reconciler.condemn(name, ghost, "ghost") is None
        assert repr(self.reconciler.slots) == before

    @invariant()
    def the_reconciler_knows_exactly_who_lives(self) -> None:
        live = {name: slot.incarnation for name, slot in self.reconciler.slots.items() if slot.live}
        assert live == self.alive

    @invariant()
    def whoever_is_absent_has_a_time_to_come_back(self) -> None:
        absent = [slot for slot in self.reconciler.slots.values() if slot.phase is Phase.ABSENT]
        wake_s = self.reconciler.wake_s(self.now_s)
        if absent:
            assert wake_s is not None
            assert wake_s <= POLICY.backoff_cap_s

    def teardown(self) -> None:
        """Left alone, with starts that succeed, everybody not given up comes to be ready."""
        for _ in range(4):
            self.now_s += POLICY.backoff_cap_s
            self.step()
            for name, incarnation in list(self.alive.items()):
                if self.reconciler.slots[name].condemned:
                    self.reconciler.ended(name, incarnation, "killed", self.now_s)
                    del self.alive[name]
                else:
                    self.reconciler.ready(name, incarnation, self.now_s)
        self.step()
        assert self.reconciler.settled


TestClusterMachine = ClusterMachine.TestCase
TestClusterMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
