"""A prefill and a decode instance, and a gateway that wants one stream of each pair, in virtual time: real loops, workers, books,
engines and KV sessions; mail passes through a `Post` that can lose, repeat, delay and reorder anything."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from core.config import EngineConfig, Role
from core.cost import CostModel
from core.errors import EngineFault
from core.layout import KVLayout, LayerShape
from core.messages import Address, Cancel, Failed, Keep, Submit, TokenItem, Tokens, Wanted
from core.sampling import SamplingParams
from core.tokens import pack_tokens
from decode.worker import DecodeWorker
from engine.engine import Engine
from engine.plan import ModelRunner
from engine.sequence import Sequence
from engine.simulated_runner import SimulatedRunner
from instance.loop import EngineLoop, TransferEvent
from kv_transfer.byte_store import ByteStore
from mail.attempt_book import AttemptBook
from mail.faults import Plan
from mail.outbox import Outbox
from prefill.worker import PrefillWorker
from tests.support.virtual.device import VirtualDevice
from tests.support.virtual.fabric import Fabric, VirtualReceiver, VirtualSender
from tests.support.virtual.post import Post
from tests.support.virtual.timeline import Timeline

LEASE_S = 1.5
STEP_S = 0.025
BLOCK_SIZE = 4
LAYOUT = KVLayout.whole(layers=(LayerShape(1, 4, 4),) * 2, dtype="float32", block_size=BLOCK_SIZE)
SLIDING = KVLayout.whole(layers=(LayerShape(1, 4, 4, 7), LayerShape(1, 4, 4)), dtype="float32", block_size=BLOCK_SIZE)
VOCAB = 100


def runner(num_blocks: int, layout: KVLayout = LAYOUT, step: Callable[[float], None] | None = None) -> SimulatedRunner:
    return SimulatedRunner(layout, num_blocks, 400, VOCAB, CostModel(), step, frozenset())


class Side:
    """One instance. `turns` counts the turns of its loop."""

    def __init__(
        self, pair: Pair, name: str, role: Role, num_blocks: int, incarnation: int = 1, max_waiting_tokens: int = 10_000
    ) -> None:
        timeline = self._timeline = pair.timeline
        self.address = Address(name, incarnation, f"virtual://{name}-{incarnation}")
        self.mailbox = pair.post.open(self.address.mailbox)
        self.mailbox.on_arrival = self._wake
        peers = pair.post.peers(self.address.mailbox)
        device: ModelRunner = runner(num_blocks, pair.layout)
        if pair.step_s > 0:
            cost = CostModel(step_s=pair.step_s, prefill_token_s=0.0, attention_s=0.0, decode_sequence_s=0.0)
            device = VirtualDevice(timeline, self._wake, pair.layout, num_blocks, 400, VOCAB, cost, steps_ahead=1)
        self.engine = Engine(device, EngineConfig(prefix_cache=False, max_num_batched_tokens=32), timeline)
        store = ByteStore(pair.layout, num_blocks)
        self.receiver = VirtualReceiver(pair.fabric, f"kv://{name}-{incarnation}", store, self._post)
        self.sender = VirtualSender(pair.fabric, store, self._post)
        self.book = AttemptBook(self.address, Outbox(self.address, peers, timeline), peers, timeline, LEASE_S)
        self.prefill = PrefillWorker(self.engine, self.sender, self.book, timeline)
        self.decode = DecodeWorker(
            self.engine, self.receiver, self.book, peers, self.address, timeline, LEASE_S, max_waiting_tokens
        )
        self.loop = EngineLoop(self.engine, self.mailbox, self.book, self.prefill, self.decode, role, timeline, lambda: None)
        self.turns = 0
        self.dead = False
        self._pair = pair
        self._post_to = pair.post
        self._due_s: float | None = None
        self._wake()

    def die(self) -> None:
        """As a process that is killed: it says and hears nothing more."""
        self.dead = True
        self._post_to.close(self.address.mailbox)
        self.receiver.stop()
        self.sender.close()

    def left_over(self) -> list[str]:
        found = list(self.engine.invariants())
        found += [f"{len(self.book)} attempts"] if len(self.book) else []
        found += [f"{self.receiver.open_grants} grants"] if self.receiver.open_grants else []
        if self.decode.waiting or self.decode.waiting_tokens:
            found.append(f"{self.decode.waiting} waiting, {self.decode.waiting_tokens} tokens")
        return [f"{self.address.name}: {line}" for line in found]

    @property
    def remembered(self) -> int:
        """Attempts that it knows of, though they are over or have not begun."""
        return len(self.book._ended) + len(self.book._early)

    def _post(self, event: TransferEvent) -> None:
        delay_s = self._pair.hand_over_s(event)
        if delay_s > 0:
            self._timeline.after(delay_s, lambda: self._hand_in(event))
        else:
            self._hand_in(event)

    def _hand_in(self, event: TransferEvent) -> None:
        if not self.dead:
            self.loop.post(event)

    def _wake(self) -> None:
        self._at(self._timeline.now())

    def _at(self, time_s: float) -> None:
        if self._due_s is None or time_s < self._due_s:
            self._due_s = time_s
            self._timeline.at(time_s, lambda: self._turn(time_s))

    def _turn(self, due_s: float) -> None:
        if self.dead or self._due_s != due_s:
            return
        self._due_s = None
        self.turns += 1
        rest_s = self.loop.turn()
        self._at(self._timeline.now() + max(rest_s, STEP_S))


@dataclass
class Stream:
    """One attempt, as its gateway sees it."""

    attempt: str
    sampling: SamplingParams
    prompt: list[int]
    workers: tuple[Address, ...]
    tokens: dict[int, int] = field(default_factory=dict)
    last: int | None = None
    failures: list[Failed] = field(default_factory=list)
    cancelled: bool = False
    deadline_s: float = math.inf
    progressed_s: float = 0.0
    ended_s: float | None = None

    @property
    def position(self) -> int:
        position = 0
        while position in self.tokens:
            position += 1
        return position

    def missing_from(self, worker: Address) -> int:
        """The first position that is missing of what this worker makes: of a pair, the prefill side makes the first token."""
        shared = len(self.workers) == 2
        position = 1 if shared and worker == self.workers[0] else 0
        while position in self.tokens:
            position += 1
        return position

    @property
    def complete(self) -> bool:
        return self.last is not None and self.position > self.last


class PairGateway:
    """Wants streams, once each: whatever fails is not tried again."""

    def __init__(self, pair: Pair, name: str = "gateway") -> None:
        self._timeline = pair.timeline
        self.address = Address(name, 1, f"virtual://{name}")
        self._mailbox = pair.post.open(self.address.mailbox)
        self._mailbox.on_arrival = self._read
        self._peers = pair.post.peers(self.address.mailbox)
        self.streams: dict[str, Stream] = {}
        self.dead = False
        self._keep()

    def submit(
        self, prompt: list[int], max_tokens: int, prefill: Address | None, decode: Address, deadline_s: float = 1000.0
    ) -> Stream:
        attempt = f"a{len(self.streams)}"
        sampling = SamplingParams(max_tokens=max_tokens, seed=len(self.streams))
        workers = (decode,) if prefill is None else (decode, prefill)
        stream = self.streams[attempt] = Stream(attempt, sampling, prompt, workers)
        stream.progressed_s = self._timeline.now()
        stream.deadline_s = stream.progressed_s + deadline_s

        def send(worker: Address, stage: str, peer: Address | None) -> None:
            message = Submit(
                attempt=attempt,
                gateway=self.address,
                tokens=pack_tokens(prompt),
                prompt_tokens=len(prompt),
                sampling=sampling,
                stage=stage,
                peer=peer,
                deadline_s=deadline_s,
                ticket=len(self.streams),
            )
            self._peers.send(worker.mailbox, message)

        if prefill is None:
            send(decode, "local", None)
        else:
            send(decode, "decode", prefill)
            send(prefill, "prefill", decode)
        return stream

    def cancel(self, stream: Stream) -> None:
        stream.cancelled = True
        self._end(stream)

    def _end(self, stream: Stream) -> None:
        if stream.ended_s is None:
            stream.ended_s = self._timeline.now()
            if not stream.complete:
                for worker in stream.workers:
                    self._peers.send(worker.mailbox, Cancel(attempt=stream.attempt))

    def _keep(self) -> None:
        if self.dead:
            return
        wanted: dict[Address, list[Wanted]] = {}
        for stream in self.streams.values():
            if stream.ended_s is None:
                for worker in stream.workers:
                    wanted.setdefault(worker, []).append(Wanted(stream.attempt, stream.missing_from(worker)))
        for worker, listed in wanted.items():
            self._peers.send(worker.mailbox, Keep(gateway=self.address, wanted=tuple(listed)))
        self._timeline.after(LEASE_S / 3, self._keep)

    def _read(self) -> None:
        while (message := self._mailbox.receive()) is not None:
            match message:
                case _ if self.dead:
                    continue
                case Tokens():
                    for item in message.items:
                        self._take(self.streams[item.attempt], item)
                case Failed():
                    stream = self.streams[message.attempt]
                    if stream.ended_s is None:
                        stream.failures.append(message)
                        self._end(stream)

    def _take(self, stream: Stream, item: TokenItem) -> None:
        if stream.ended_s is not None:
            return
        before = stream.position
        for offset, token in enumerate(item.tokens):
            assert stream.tokens.setdefault(item.position + offset, token) == token, "a token changed"
        if item.finish is not None:
            stream.last = item.position + len(item.tokens) - 1
        if stream.position > before:
            stream.progressed_s = self._timeline.now()
        if stream.complete:
            self._end(stream)


class Pair:
    """`prefill` and `decode` with a `gateway`; `plan` says what becomes of their mail, `hand_over_s` how long after a transfer's
    threads a loop hears of an event. A step takes `step_s`; where that is not 0, the next is launched before it ends."""

    def __init__(
        self,
        prefill_blocks: int = 64,
        decode_blocks: int = 64,
        plan: Plan | None = None,
        roles: tuple[Role, Role] | None = None,
        layout: KVLayout = LAYOUT,
        step_s: float = 0.0,
    ) -> None:
        self.layout = layout
        self.step_s = step_s
        self.timeline = Timeline()
        self.post = Post(self.timeline, random.Random(5))
        self.post.faults = plan
        self.fabric = Fabric(self.timeline)
        self.hand_over_s: Callable[[TransferEvent], float] = lambda event: 0.0
        first, second = roles or (Role.PREFILL, Role.DECODE)
        self.prefill = Side(self, "prefill", first, prefill_blocks)
        self.decode = Side(self, "decode", second, decode_blocks)
        self.gateway = PairGateway(self)

    def submit(self, prompt_tokens: int = 10, max_tokens: int = 8, **fields: float) -> Stream:
        count = len(self.gateway.streams)
        prompt = [(7 * count + 3 * index + 1) % VOCAB for index in range(prompt_tokens)]
        return self.gateway.submit(prompt, max_tokens, self.prefill.address, self.decode.address, **fields)

    def run(self, seconds: float) -> None:
        self.timeline.run_for(seconds)

    def settle(self, limit_s: float = 1000.0) -> None:
        """Until the gateway waits for nothing, and so long that the latest message has come, done its worst, and been gone."""
        done = self.timeline.run(
            lambda: all(stream.ended_s is not None for stream in self.gateway.streams.values()), self.timeline.now() + limit_s
        )
        assert done, self.gateway.streams
        self.run(7 * LEASE_S)

    def settle_or_give_up(self, limit_s: float) -> None:
        """As a gateway does that hears no heartbeat: it gives up what waits for an instance that is gone."""
        alive = {self.prefill.address, self.decode.address}
        for stream in self.gateway.streams.values():
            if stream.ended_s is None and not set(stream.workers) <= alive:
                self.gateway.cancel(stream)
        self.settle(limit_s)

    def restart(self, side: Side) -> Side:
        """Kill one, and start its next incarnation in its place."""
        side.die()
        blocks = side.engine.num_blocks
        fresh = Side(self, side.address.name, side.loop.progress.role, blocks, side.address.incarnation + 1)
        if side is self.prefill:
            self.prefill = fresh
        else:
            self.decode = fresh
        return fresh

    def check(self, waits_s: float = 0.0) -> None:
        """Each stream ended in exact tokens or in one typed error, soon after it last made progress, or should have, having
        waited `waits_s` for others; nothing is left over."""
        for stream in self.gateway.streams.values():
            assert stream.ended_s is not None
            since_s = stream.deadline_s if stream.ended_s > stream.deadline_s else stream.progressed_s
            assert stream.ended_s - since_s <= 3 * LEASE_S + waits_s, stream
            expected = alone(stream)
            assert all(expected[position] == token for position, token in stream.tokens.items()), stream
            if stream.complete:
                assert len(stream.tokens) == len(expected)
            else:
                assert stream.cancelled or len(stream.failures) == 1, stream
            assert all(failed.code != EngineFault.code for failed in stream.failures), stream.failures
        left = self.prefill.left_over() + self.decode.left_over()
        assert left == []
        assert self.prefill.remembered == self.decode.remembered == 0


def alone(stream: Stream) -> list[int]:
    """What one engine writes by itself."""
    engine = Engine(runner(256), EngineConfig(prefix_cache=False), Timeline())
    engine.add(Sequence("alone", list(stream.prompt), len(stream.prompt), stream.sampling))
    output: list[int] = []
    while engine.has_work:
        output += [token.token for token in engine.step().tokens]
    return output
