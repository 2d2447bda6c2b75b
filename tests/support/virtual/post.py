"""Mail in virtual time. Messages are encoded and decoded as on the real wire, so that what it refuses is refused here too."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

from core.messages import Message
from core.wire import decode, encode
from mail.faults import FaultyPeers, Plan
from mail.peers import MessageSender
from tests.support.virtual.timeline import Timeline


class VirtualMailbox:
    """What `mail.mailbox.Mailbox` is to a loop, without the socket. `on_arrival` is told of mail and of `wake`."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.rejected = 0
        self.on_arrival: Callable[[], None] = lambda: None
        self._messages: deque[bytes] = deque()

    def put(self, packed: bytes) -> None:
        self._messages.append(packed)
        self.on_arrival()

    def receive(self) -> Message | None:
        return decode(self._messages.popleft()) if self._messages else None

    def wake(self) -> None:
        self.on_arrival()

    def wait(self, timeout_s: float) -> None:
        raise AssertionError("nobody waits in virtual time")


class Post:
    """Carries messages between mailboxes, each pair in order; whom `faults` is set for, through `mail.faults`."""

    def __init__(self, timeline: Timeline, dice: random.Random, latency_s: float = 2e-4) -> None:
        self._timeline = timeline
        self._dice = dice
        self._latency_s = latency_s
        self._boxes: dict[str, VirtualMailbox] = {}
        self._last_s: dict[tuple[str, str], float] = {}
        self.faults: Plan | None = None
        self.sent: dict[str, int] = {}

    def open(self, endpoint: str) -> VirtualMailbox:
        box = self._boxes[endpoint] = VirtualMailbox(endpoint)
        return box

    def close(self, endpoint: str) -> None:
        self._boxes.pop(endpoint, None)
        self._last_s = {pair: due_s for pair, due_s in self._last_s.items() if endpoint not in pair}

    def peers(self, sender: str) -> MessageSender:
        sound = VirtualPeers(self, sender)
        return sound if self.faults is None else FaultyPeers(sound, self.faults, self._timeline.after, sender)

    def carry(self, sender: str, receiver: str, message: Message) -> bool:
        packed = encode(message)
        kind = type(message).__name__
        self.sent[kind] = self.sent.get(kind, 0) + 1
        due_s = self._timeline.now() + self._latency_s * (0.5 + self._dice.random())
        due_s = max(due_s, self._last_s.get((sender, receiver), 0.0))
        if sender in self._boxes and receiver in self._boxes:
            self._last_s[sender, receiver] = due_s
        self._timeline.at(due_s, lambda: self._arrive(receiver, packed))
        return True

    def _arrive(self, receiver: str, packed: bytes) -> None:
        box = self._boxes.get(receiver)
        if box is not None:
            box.put(packed)


class VirtualPeers:
    """What `mail.peers.Peers` is to a sender."""

    lost = 0

    def __init__(self, post: Post, sender: str) -> None:
        self._post = post
        self._sender = sender

    def send(self, endpoint: str, message: Message) -> bool:
        return self._post.carry(self._sender, endpoint, message)

    def forget(self, endpoint: str) -> None:
        pass

    def close(self, linger_s: float = 0.0) -> None:
        pass
