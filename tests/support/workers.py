"""Fakes around a worker, so that its decisions can be watched one message at a time, in virtual time."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from core.clock import ManualClock
from core.config import EngineConfig
from core.cost import CostModel
from core.errors import TransferError
from core.groups import Tables, layer_groups
from core.layout import KVLayout, LayerShape
from core.messages import Address, Message, Submit
from core.sampling import SamplingParams
from core.tokens import pack_tokens
from core.wire import decode, encode
from engine.engine import Engine
from engine.simulated_runner import SimulatedRunner
from kv_transfer.events import SendFailed
from kv_transfer.outbound import Outbound
from kv_transfer.store import Fence
from kv_transfer.terms import Terms, check_endpoints, check_kept, check_room, check_tables

PREFILL = Address("prefill", 1, "tcp://prefill")
DECODE = Address("decode", 1, "tcp://decode")
GATEWAY = Address("gateway", 1, "tcp://gateway")
LAYERS = 2
BLOCK_SIZE = 4
LEASE_S = 5.0


@dataclass
class FakePeers:
    """Remembers what was sent to whom. What is for an endpoint in `full` finds no room."""

    sent: list[tuple[str, Message]] = field(default_factory=list)
    full: set[str] = field(default_factory=set)
    lost: int = 0

    def send(self, endpoint: str, message: Message) -> bool:
        if endpoint in self.full:
            self.lost += 1
            return False
        self.sent.append((endpoint, decode(encode(message))))
        return True

    def forget(self, endpoint: str) -> None:
        pass

    def close(self, linger_s: float = 0.0) -> None:
        pass

    def take(self, to: Address) -> list[Message]:
        taken = [message for endpoint, message in self.sent if endpoint == to.mailbox]
        self.sent = [(endpoint, message) for endpoint, message in self.sent if endpoint != to.mailbox]
        return taken


@dataclass
class FakeMailbox:
    """Hands out what was put in; `receive` takes `read_s` of the clock's time for each message."""

    clock: ManualClock
    read_s: float = 0.0
    messages: deque[Message] = field(default_factory=deque)

    def put(self, *messages: Message) -> None:
        self.messages.extend(decode(encode(message)) for message in messages)

    def receive(self) -> Message | None:
        if not self.messages:
            return None
        self.clock.advance(self.read_s)
        return self.messages.popleft()

    def wait(self, timeout_s: float) -> None:
        raise AssertionError("nobody waits in virtual time")

    def wake(self) -> None:
        pass


LAYOUT = KVLayout.whole(layers=(LayerShape(1, 4, 4),) * LAYERS, dtype="float32", block_size=BLOCK_SIZE)
WINDOW = 6
SLIDING = KVLayout.whole(layers=(LayerShape(1, 4, 4, WINDOW), LayerShape(1, 4, 4)), dtype="float32", block_size=BLOCK_SIZE)


@dataclass
class FakeSession:
    """Remembers which tokens of which layer were pushed. A call that would fail a real session fails the test."""

    terms: Terms
    outbound: Outbound | None = None
    pushed: dict[int, set[int]] = field(default_factory=dict)
    fences: list[Fence | None] = field(default_factory=list)
    tail: bytes | None = None
    aborted: str | None = None
    ended: bool = False

    @property
    def attempt(self) -> str:
        return self.terms.attempt

    @property
    def grant(self) -> int:
        return self.terms.grant

    def push(self, layer: int, start: int, count: int, fence: Fence | None = None) -> None:
        if self.ended:
            return
        assert self.tail is None
        assert self.outbound is not None
        self.outbound.push(layer, start, count, None)
        self.outbound.take_begin(seed=0)
        while region := self.outbound.take_region():
            for each in range(region.layers.start, region.layers.stop):
                self.pushed.setdefault(each, set()).update(range(region.tokens.start, region.tokens.stop))
        self.fences.append(fence)

    def finish(self, tail: bytes) -> None:
        if self.ended:
            return
        assert self.outbound is not None
        self.outbound.finish(tail)
        self.tail = tail

    def abort(self, reason: str) -> bool:
        if self.ended:
            return False
        self.aborted, self.ended = reason, True
        return True


@dataclass
class FakeSender:
    """Takes what the real one takes. `failed` are the events of sessions that could not be."""

    layout: KVLayout = LAYOUT
    sessions: dict[str, FakeSession] = field(default_factory=dict)
    failed: list[SendFailed] = field(default_factory=list)
    _grants: set[tuple[str, int | None, int]] = field(default_factory=set)

    def begin(self, terms: Terms, endpoints: tuple[str, ...], tables: Tables, incarnation: int | None = None) -> FakeSession:
        groups = layer_groups(self.layout)
        check_tables(tables, groups)
        session = self.sessions[terms.attempt] = FakeSession(terms)
        try:
            terms.check()
            named = check_endpoints(endpoints), incarnation, terms.grant
            check_kept(groups, terms)
            if named in self._grants:
                raise ValueError(f"Got grant {terms.grant} twice")
            self._grants.add(named)
            session.outbound = Outbound(self.layout, groups, terms, tables)
        except ValueError as error:
            session.ended = True
            self.failed.append(SendFailed(terms.attempt, TransferError(str(error))))
        return session


@dataclass
class FakeReceiver:
    """Takes what the real one takes."""

    layout: KVLayout = LAYOUT
    endpoint: str = "127.0.0.1:1"
    grants: dict[int, str] = field(default_factory=dict)
    renewed: list[int] = field(default_factory=list)

    @property
    def open_grants(self) -> int:
        return len(self.grants)

    def open(self, terms: Terms, tables: Tables) -> None:
        terms.check()
        check_room(self.layout, layer_groups(self.layout), tables, terms)
        if terms.grant in self.grants:
            raise ValueError(f"Got grant = {terms.grant} but it is open already")
        self.grants[terms.grant] = terms.attempt

    def renew(self, grant: int) -> bool:
        self.renewed.append(grant)
        return grant in self.grants

    def close(self, grant: int, reason: str) -> bool:
        return self.grants.pop(grant, None) is not None


def engine(clock: ManualClock, num_blocks: int = 64, layout: KVLayout = LAYOUT, **config: object) -> Engine:
    runner = SimulatedRunner(
        layout=layout,
        num_blocks=num_blocks,
        max_model_len=200,
        vocab_size=100,
        cost=CostModel(),
        sleep=clock.advance,
        eos_token_ids=frozenset(),
    )
    return Engine(runner, EngineConfig.model_validate(config), clock)


def submission(
    attempt: str, stage: str, tokens: int = 10, max_tokens: int = 5, deadline_s: float = 100.0, ticket: int = 0
) -> Submit:
    peer = {"prefill": DECODE, "decode": PREFILL, "local": None}[stage]
    return Submit(
        attempt=attempt,
        gateway=GATEWAY,
        tokens=pack_tokens(list(range(1, tokens + 1))),
        prompt_tokens=tokens,
        sampling=SamplingParams(max_tokens=max_tokens),
        stage=stage,
        peer=peer,
        deadline_s=deadline_s,
        ticket=ticket,
    )
