"""A tiny pool whose blocks change hands all the time: whoever receives, receives its own bytes, and nothing is left over."""

from __future__ import annotations

import queue
import random
import threading

import numpy as np
import pytest

from core.layout import LayerShape
from kv_transfer.byte_store import ByteStore
from kv_transfer.events import Broken, Delivered, Received, SendFailed
from kv_transfer.sessions import SendSession
from kv_transfer.terms import Terms
from kv_transfer.transports.fault import Delay, Drop, Duplicate, Fault, FlipBit, Message, Reorder, Truncate
from tests.kv_transfer.conformance.ways import Way, Wires, over_all_ways, over_quick_ways
from tests.kv_transfer.rig import layout

SHAPE = [LayerShape(2, 64, 64)] * 3
SOURCE_SIZE, TARGET_SIZE, BLOCKS_EACH, LANES = 8, 16, 2, 3
TOKENS = SOURCE_SIZE * 3
ATTEMPTS = 150


class Churn:
    """Each lane owns two blocks of a pool of six and gives them to one attempt after another, without a pause.

    Every attempt's KV is one byte value all over, so that a late write of an earlier attempt shows.
    """

    def __init__(self, wires: Wires, seed: int) -> None:
        self.dice = random.Random(seed)
        self.source = ByteStore(layout(SOURCE_SIZE, shapes=SHAPE), 256 * 3)
        for key, value in self.source.pages:
            for mark in range(256):
                key[mark * 3 : mark * 3 + 3], value[mark * 3 : mark * 3 + 3] = mark, mark
        self.target = ByteStore(layout(TARGET_SIZE, shapes=SHAPE), LANES * BLOCKS_EACH)
        self.ended: dict[int, queue.SimpleQueue[Received | Broken]] = {}
        self.sent: list[Delivered | SendFailed] = []
        self.receiver = wires.receiver(self.target, lambda event: self.ended[event.grant].put(event))
        self.sender = wires.sender(self.source, self.sent.append)
        self.wrong: list[str] = []
        self.received = self.taken_back = 0
        self.count = threading.Lock()

    def run(self) -> None:
        lanes = [threading.Thread(target=self._lane, args=(lane, self.dice.getrandbits(32))) for lane in range(LANES)]
        for thread in lanes:
            thread.start()
        for thread in lanes:
            thread.join(120)
            assert not thread.is_alive()
        left = self.receiver.open_grants
        self.sender.close()
        self.receiver.stop()
        assert left == 0
        assert self.wrong == []

    def _lane(self, lane: int, seed: int) -> None:
        dice = random.Random(seed)
        blocks = [lane * BLOCKS_EACH, lane * BLOCKS_EACH + 1]
        for turn in range(ATTEMPTS // LANES):
            grant, mark = turn * LANES + lane, 1 + (turn * LANES + lane) % 255
            self.ended[grant] = queue.SimpleQueue()
            self.receiver.open(Terms(grant, f"a{grant}", 0, TOKENS, 0.2), [blocks])
            source_blocks = [mark * 3, mark * 3 + 1, mark * 3 + 2]
            session = self.sender.begin(Terms(grant, f"a{grant}", 0, TOKENS, 0.2), [self.receiver.endpoint], [source_blocks])
            sending = threading.Thread(target=self._send, args=(session, dice.getrandbits(32)))
            sending.start()
            if dice.random() < 0.4:
                threading.Event().wait(dice.random() * 0.002)
                self._take_back(grant, blocks)
            else:
                self._await(grant, blocks, mark)
            sending.join(20)

    def _send(self, session: SendSession, seed: int) -> None:
        dice = random.Random(seed)
        pushes = [(layer, start, 6) for layer in range(len(SHAPE)) for start in range(0, TOKENS, 6)]
        dice.shuffle(pushes)
        for push in pushes:
            session.push(*push)
            if dice.random() < 0.02:
                session.abort("preempted")
        session.finish(b"")

    def _take_back(self, grant: int, blocks: list[int]) -> None:
        """Close, then scribble: what is written now belongs to somebody else."""
        if self.receiver.close(grant, "reassigned"):
            with self.count:
                self.taken_back += 1
            for key, value in self.target.pages:
                key[blocks], value[blocks] = 0, 0
            threading.Event().wait(0.001)
            if any(bool(page[blocks].any()) for pair in self.target.pages for page in pair):
                self.wrong.append(f"grant {grant} was written after close")

    def _await(self, grant: int, blocks: list[int], mark: int) -> None:
        event = self.ended[grant].get(timeout=60)
        if isinstance(event, Received):
            with self.count:
                self.received += 1
            for page in (page for pair in self.target.pages for page in pair):
                tokens = page[blocks].reshape(-1, page.shape[-1])[:TOKENS]
                if not np.array_equal(tokens, np.full_like(tokens, mark)):
                    self.wrong.append(f"grant {grant} holds bytes of another")


@over_all_ways
def test_blocks_that_change_hands_never_hold_another_attempts_bytes(way: Way) -> None:
    churn = Churn(way.wires(), seed=5)
    churn.run()
    assert churn.received > 10
    assert churn.taken_back > 10


@over_quick_ways
@pytest.mark.parametrize("seed", [1, 2])
def test_nor_on_a_wire_that_loses_damages_doubles_swaps_and_cuts(way: Way, seed: int) -> None:
    def plan(message: Message) -> Fault | None:
        # The handshake goes through, so that faults meet frames; the choice depends on nothing but the message.
        dice = random.Random(f"{seed} {message}")
        if message.index < 2 or dice.random() > 0.03:
            return None
        faults = [Drop(), Duplicate(), Reorder(), FlipBit(dice.randrange(10_000)), Truncate(dice.randrange(3000)), Delay(0.01)]
        return dice.choice(faults)

    churn = Churn(way.wires(plan), seed)
    churn.run()
    assert churn.received > 5
