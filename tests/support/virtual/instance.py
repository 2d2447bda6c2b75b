"""An instance in virtual time: the real loop, roles, attempts, engine and transfer sessions around a simulated device."""

from __future__ import annotations

import random
from collections.abc import Iterable

from core.config import EngineConfig, Role
from core.cost import CostModel
from core.layout import KVLayout, LayerShape
from core.messages import Address, Heartbeat
from decode.worker import DecodeWorker
from engine.engine import Engine
from instance.loop import EngineLoop, TransferEvent
from kv_transfer.byte_store import ByteStore
from mail.attempt_book import AttemptBook
from mail.outbox import Outbox
from prefill.worker import PrefillWorker
from tests.support.virtual.device import VirtualDevice
from tests.support.virtual.fabric import Fabric, VirtualReceiver, VirtualSender
from tests.support.virtual.post import Post
from tests.support.virtual.timeline import Timeline

VOCAB = 1000
BLOCK_SIZE = 16
HEARTBEAT_S = 0.2
COST = CostModel(step_s=5e-3, prefill_token_s=5e-5, attention_s=0.0, decode_sequence_s=1e-4, decode_context_s=0.0)
LATE_EVENTS = 0.02
LAYOUT = KVLayout.whole(layers=(LayerShape(1, 4, 4),) * 2, dtype="float32", block_size=BLOCK_SIZE)


class VirtualInstance:
    """Turns whenever something happened that its loop would have been woken for."""

    def __init__(
        self,
        timeline: Timeline,
        post: Post,
        fabric: Fabric,
        name: str,
        role: Role,
        *,
        gateways: Iterable[Address],
        num_blocks: int,
        lease_s: float,
        incarnation: int = 1,
        steps_ahead: int = 1,
        cost: CostModel = COST,
        max_model_len: int = 4096,
        layout: KVLayout = LAYOUT,
        **engine: object,
    ) -> None:
        self.address = Address(name, incarnation, f"virtual://{name}/{incarnation}")
        self._timeline = timeline
        self._post = post
        self._gateways = tuple(gateways)
        self._cost = cost
        self._config = EngineConfig.model_validate({"max_num_batched_tokens": 512, "max_num_seqs": 64, **engine})
        self._runner = VirtualDevice(timeline, self.wake, layout, num_blocks, max_model_len, VOCAB, cost, steps_ahead)
        self.engine = Engine(self._runner, self._config, timeline)
        store = ByteStore(layout, num_blocks)
        self._mailbox = post.open(self.address.mailbox)
        self._peers = post.peers(self.address.mailbox)
        self._dice = random.Random(f"{name}/{incarnation}")
        self._late_s = lease_s
        self.sender = VirtualSender(fabric, store, self._hand_over)
        self.receiver = VirtualReceiver(fabric, f"kv://{name}/{incarnation}", store, self._hand_over)
        self.book = AttemptBook(self.address, Outbox(self.address, self._peers, timeline), self._peers, timeline, lease_s)
        self.prefill = PrefillWorker(self.engine, self.sender, self.book, timeline)
        self.decode = DecodeWorker(
            self.engine,
            self.receiver,
            self.book,
            self._peers,
            self.address,
            timeline,
            lease_s,
            self._config.max_waiting_tokens,
        )
        self.loop = EngineLoop(self.engine, self._mailbox, self.book, self.prefill, self.decode, role, timeline, lambda: None)
        self._dead = False
        self._due_s: float | None = None
        self._mailbox.on_arrival = self.wake
        self._beat()
        self.wake()

    def wake(self) -> None:
        """Turn at this moment, after whatever else happens in it."""
        self._turn_at(self._timeline.now())

    def die(self) -> None:
        """As by SIGKILL: nothing is said to anybody."""
        self._dead = True
        self._post.close(self.address.mailbox)
        self.receiver.stop()
        self.sender.closed = True

    def set_role(self, role: Role) -> None:
        self.loop.set_role(role)
        self.wake()

    def invariants(self) -> list[str]:
        """What should not be here once nobody asks for anything."""
        found = list(self.engine.invariants())
        if len(self.book):
            found.append(f"{len(self.book)} attempts are still here")
        if self.receiver.open_grants:
            found.append(f"{self.receiver.open_grants} grants are still open")
        return [f"{self.address.name}: {line}" for line in found]

    def _hand_over(self, event: TransferEvent) -> None:
        """A transfer's thread tells the loop of an event; now and then it has to wait for a processor first."""
        delay_s = self._dice.uniform(0, self._late_s) if self._dice.random() < LATE_EVENTS else 0.0
        self._timeline.after(delay_s, lambda: None if self._dead else self.loop.post(event))

    def _turn_at(self, time_s: float) -> None:
        if self._dead or (self._due_s is not None and self._due_s <= time_s):
            return
        self._due_s = time_s
        self._timeline.at(time_s, self._turn)

    def _turn(self) -> None:
        if self._dead or self._due_s is None or self._due_s > self._timeline.now():
            return
        self._due_s = None
        rest_s = self.loop.turn()
        self._turn_at(self._timeline.now() + max(rest_s, 1e-6))

    def _beat(self) -> None:
        if self._dead:
            return
        message = Heartbeat(
            worker=self.address,
            role=self.loop.progress.role.value,
            accelerator="CPU",
            model="model",
            fingerprint="virtual",
            layout=self._runner.layout,
            total_blocks=self._runner.num_blocks,
            capacity_tokens=self.engine.capacity_tokens,
            max_model_len=self._runner.max_model_len,
            max_num_seqs=self._config.max_num_seqs,
            kv_endpoint=self.receiver.endpoint,
            cost=self._cost,
            load=self.loop.load(),
        )
        for gateway in self._gateways:
            self._peers.send(gateway.mailbox, message)
        self._timeline.after(HEARTBEAT_S, self._beat)
