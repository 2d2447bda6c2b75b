"""A prefill and a decode engine in one process, and KV between them by the real path: tensor stores, sessions and grants over
loopback, each layer pushed by the listener while later ones compute."""

from __future__ import annotations

from itertools import count
from queue import SimpleQueue
from types import TracebackType

from core.clock import MonotonicClock
from core.config import EngineConfig
from engine.decision import Part
from engine.engine import Engine
from engine.sequence import Sequence
from engine.torch_runner import TorchRunner
from kv_transfer.events import Broken, Delivered, Received, SendFailed
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from kv_transfer.sessions import SendSession
from kv_transfer.tensor_store import TensorStore
from kv_transfer.terms import Terms
from kv_transfer.transports.tcp import TcpTransport

SECRET = b"a secret of the whole cluster"
LEASE_S = 60.0


class HandOver:
    """Serves whole generations: read by one engine, written by the other. Use as a context manager.

    `kv_bytes` have gone over; `needed_bytes` are those that the writing engine lacked.
    """

    def __init__(self, prefill: TorchRunner, decode: TorchRunner, config: EngineConfig) -> None:
        clock = MonotonicClock()
        assert prefill.fingerprint == decode.fingerprint
        self.reader, self.writer = Engine(prefill, config, clock), Engine(decode, config, clock)
        self.events: SimpleQueue[Received | Broken | Delivered | SendFailed] = SimpleQueue()
        common = TcpTransport(), SECRET, prefill.fingerprint, 1, clock, self.events.put
        self.sender = KVSender(_store(prefill), *common)
        self.receiver = KVReceiver(_store(decode), *common)
        self._layers = len(prefill.layout.layers)
        self._sessions: dict[str, SendSession] = {}
        self._writing: dict[str, Sequence] = {}
        self._terms: dict[str, Terms] = {}
        self._numbers = count(1)
        self.needed_bytes = 0
        self.kv_bytes = 0

    def serve(self, reading: list[Sequence], writing: list[Sequence]) -> None:
        """`reading[i]` has `hold` and the prompt that `writing[i]` goes on from. The writing engine has room for all of them; the
        reading one need not: its blocks are free once their KV was delivered."""
        self._writing = {sequence.sequence_id: sequence for sequence in writing}
        for sequence in writing:
            self._grant(sequence)
        for sequence in reading:
            self.reader.add(sequence)
        self._drawn: dict[str, int] = {}
        delivered = received = 0
        while delivered < len(reading) or received < len(writing):
            if self.reader.has_work:
                self._read()
            if self.reader.has_work and self.events.empty():
                continue
            match self.events.get(timeout=LEASE_S):
                case Received() as event:
                    received += 1
                    self.kv_bytes += event.kv_bytes
                    assert self.writer.start(self._writing[event.attempt], self._drawn[event.attempt]) is None
                case Delivered() as event:
                    delivered += 1
                    assert self.reader.cancel(event.attempt)
                case other:
                    raise AssertionError(other)
            self.writer.launch()
        while self.writer.has_work:
            assert self.writer.step().failed == ()
        assert self.reader.invariants() == self.writer.invariants() == []

    def close(self) -> None:
        self.sender.close()
        self.receiver.stop()

    def __enter__(self) -> HandOver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _read(self) -> None:
        output = self.reader.step(self._pushed)
        assert output.failed == ()
        for new in output.tokens:
            self._drawn[new.sequence.sequence_id] = new.token
            self._sessions[new.sequence.sequence_id].finish(b"")

    def _grant(self, sequence: Sequence) -> None:
        self.writer.reserve(sequence)
        assert [admission.sequence for admission in self.writer.admissions()] == [sequence]
        number, windowed = next(self._numbers), self.writer.groups.windowed
        terms = Terms(number, sequence.sequence_id, sequence.cached_tokens, len(sequence.tokens), LEASE_S, windowed)
        self.receiver.open(terms, sequence.tables)
        self._terms[sequence.sequence_id] = terms
        layout = self.writer.layout
        self.needed_bytes += sum(
            region.tokens.size * layout.layer_bytes_per_token(region.layers.start) for region in terms.needed(layout)
        )

    def _pushed(self, parts: tuple[Part, ...], layer: int) -> None:
        for part in parts:
            name = part.sequence.sequence_id
            if name not in self._sessions:
                self._sessions[name] = self._begin(part)
            self._sessions[name].push(layer, part.start, part.count)

    def _begin(self, part: Part) -> SendSession:
        """What the prefix cache had comes first."""
        terms = self._terms[part.sequence.sequence_id]
        session = self.sender.begin(terms, (self.receiver.endpoint,), part.sequence.tables)
        for layer in range(self._layers):
            session.push(layer, 0, part.start)
        return session


def _store(runner: TorchRunner) -> TensorStore:
    return TensorStore([(layer.key, layer.value) for layer in runner.layers], runner.layout)
