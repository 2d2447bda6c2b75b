"""Anything, in any order, happens to a pair of instances and their mail: attempts begin, are cancelled, lose messages, see one
side die and come back, or change its role. Once the mail works again, each stream has ended exactly or in one typed error, and
nothing is left over."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from core.config import Role
from core.errors import from_wire
from core.layout import KVLayout
from core.messages import Failed, Grant, Keep, Message, Renew, Submit, Tokens, Withdrawn
from mail.faults import Delay, Drop, Duplicate, Fault, Letter, Reorder
from tests.instance.pair import LAYOUT, LEASE_S, SLIDING, Pair, Stream

KINDS: list[type[Message]] = [Submit, Keep, Renew, Grant, Withdrawn, Tokens, Failed]
FAULTS: list[Fault] = [Drop(), Delay(LEASE_S * 0.3), Delay(LEASE_S * 1.5), Duplicate(), Duplicate(LEASE_S), Reorder(LEASE_S)]


class PairMachine(RuleBasedStateMachine):
    @initialize(
        blocks=st.tuples(st.sampled_from([12, 18, 64]), st.sampled_from([16, 24, 64])), layout=st.sampled_from([LAYOUT, SLIDING])
    )
    def begin(self, blocks: tuple[int, int], layout: KVLayout) -> None:
        self.next_faults: list[tuple[type[Message], Fault]] = []
        self.pair = Pair(*blocks, plan=self.plan, roles=(Role.MIXED, Role.MIXED), layout=layout)
        self.streams: list[Stream] = []

    def plan(self, letter: Letter) -> Fault | None:
        """The first fault that waits for a message of this type."""
        for index, (kind, fault) in enumerate(self.next_faults):
            if isinstance(letter.message, kind):
                del self.next_faults[index]
                return fault
        return None

    @rule(
        prompt=st.sampled_from([1, 4, 9, 20]),
        max_tokens=st.sampled_from([1, 2, 8, 40]),
        way=st.sampled_from(["to", "fro", "local"]),
    )
    def submit(self, prompt: int, max_tokens: int, way: str) -> None:
        first, second = self.pair.prefill.address, self.pair.decode.address
        prefill, decode = {"to": (first, second), "fro": (second, first), "local": (None, second)}[way]
        tokens = [(11 * len(self.streams) + index) % 100 for index in range(prompt)]
        self.streams.append(self.pair.gateway.submit(tokens, max_tokens, prefill, decode))

    @rule(faults=st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from(FAULTS)), min_size=1, max_size=6))
    def spoil(self, faults: list[tuple[type[Message], Fault]]) -> None:
        self.next_faults += faults

    @rule(turns=st.sampled_from([0.001, 0.03, 0.2, LEASE_S / 3, LEASE_S]))
    def wait(self, turns: float) -> None:
        self.pair.run(turns)

    @precondition(lambda self: self.streams)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        stream = data.draw(st.sampled_from(self.streams))
        if stream.ended_s is None:
            self.pair.gateway.cancel(stream)

    @rule(which=st.booleans())
    def restart(self, which: bool) -> None:
        self.pair.restart(self.pair.prefill if which else self.pair.decode)

    @rule(which=st.booleans(), role=st.sampled_from(list(Role)))
    def change_role(self, which: bool, role: Role) -> None:
        (self.pair.prefill if which else self.pair.decode).loop.set_role(role)

    @rule(which=st.booleans(), draining=st.booleans())
    def drain(self, which: bool, draining: bool) -> None:
        (self.pair.prefill if which else self.pair.decode).loop.drain(draining)

    def teardown(self) -> None:
        if not hasattr(self, "pair"):
            return
        self.next_faults.clear()
        for side in (self.pair.prefill, self.pair.decode):
            assert side.book.newest_ticket <= len(self.streams)
        self.pair.settle_or_give_up(8 * LEASE_S + 40.0)
        self.pair.check(waits_s=1000.0)
        for stream in self.streams:
            for failed in stream.failures:
                assert from_wire(failed.code, "").retryable or failed.code in ("context_length_exceeded", "overloaded"), failed


TestPairMachine = PairMachine.TestCase
TestPairMachine.settings = settings(
    max_examples=150,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
