"""Fakes around a worker, so that its decisions can be watched one message at a time, in virtual time."""

from __future__ import annotations

from dataclasses import dataclass, field

from core.clock import ManualClock
from core.config import EngineConfig
from core.cost import CostModel
from core.layout import KVLayout, LayerShape
from core.messages import Address, Message, Submit
from core.sampling import SamplingParams
from core.tokens import pack_tokens
from engine.engine import Engine
from engine.simulated_runner import SimulatedRunner

PREFILL = Address("prefill", 1, "tcp://prefill")
DECODE = Address("decode", 1, "tcp://decode")
GATEWAY = Address("gateway", 1, "tcp://gateway")
LAYERS = 2
BLOCK_SIZE = 4
LEASE_S = 5.0


@dataclass
class FakePeers:
    """Remembers what was sent to whom."""

    sent: list[tuple[str, Message]] = field(default_factory=list)

    def send(self, endpoint: str, message: Message) -> bool:
        self.sent.append((endpoint, message))
        return True

    def take(self, to: Address) -> list[Message]:
        taken = [message for endpoint, message in self.sent if endpoint == to.mailbox]
        self.sent = [(endpoint, message) for endpoint, message in self.sent if endpoint != to.mailbox]
        return taken


@dataclass
class FakeSession:
    """Remembers which tokens of which layer were pushed."""

    first_token: int
    num_tokens: int
    pushed: dict[int, set[int]] = field(default_factory=dict)
    tail: bytes | None = None
    aborted: str | None = None

    def push(self, layer: int, start: int, count: int) -> None:
        assert self.tail is None
        assert self.aborted is None
        wanted = set(range(max(start, self.first_token), min(start + count, self.num_tokens)))
        self.pushed.setdefault(layer, set()).update(wanted)

    def finish(self, tail: bytes) -> None:
        everything = set(range(self.first_token, self.num_tokens))
        assert all(self.pushed.get(layer) == everything for layer in range(LAYERS)), self.pushed
        self.tail = tail

    def abort(self, reason: str) -> bool:
        self.aborted = reason
        return True


@dataclass
class FakeSender:
    sessions: dict[str, FakeSession] = field(default_factory=dict)

    def begin(self, *, attempt: str, first_token: int, num_tokens: int, **_: object) -> FakeSession:
        session = self.sessions[attempt] = FakeSession(first_token, num_tokens)
        return session


@dataclass
class FakeReceiver:
    endpoint: str = "127.0.0.1:1"
    open_grants: dict[int, str] = field(default_factory=dict)
    renewed: list[int] = field(default_factory=list)

    def open(self, *, grant: int, attempt: str, **_: object) -> None:
        self.open_grants[grant] = attempt

    def renew(self, grant: int) -> bool:
        self.renewed.append(grant)
        return grant in self.open_grants

    def close(self, grant: int, reason: str) -> bool:
        return self.open_grants.pop(grant, None) is not None


def engine(clock: ManualClock, num_blocks: int = 64, **config: object) -> Engine:
    layout = KVLayout.whole(layers=(LayerShape(1, 4, 4),) * LAYERS, dtype="float32", block_size=BLOCK_SIZE)
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


def submission(attempt: str, stage: str, tokens: int = 10, max_tokens: int = 5, deadline_s: float = 100.0) -> Submit:
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
    )
