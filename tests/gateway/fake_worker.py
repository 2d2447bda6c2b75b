"""A worker without an engine: answers over a real mailbox with tokens that depend on the prompt, the seed and the position
alone, as a real one's do, and misbehaves on request. What it said of an attempt it says again when a `Keep` shows that it did
not arrive, as a real one does."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from core.cost import CostModel
from core.errors import AttemptLost
from core.layout import KVLayout, LayerShape
from core.messages import (
    Address,
    Cancel,
    Failed,
    Heartbeat,
    Keep,
    Load,
    ServedBy,
    Submit,
    TokenItem,
    TokenLogprobs,
    Tokens,
    Wanted,
)
from core.request import FinishReason
from core.tokens import unpack_tokens
from mail.door import Door
from mail.keys import ClusterKeys
from mail.mailbox import Mailbox
from mail.peers import MessageSender, Peers

LETTERS = "abcdefghijklmnopqrstuvwxyz "
BEAT_S = 0.03


def letter(prompt: list[int], seed: int, position: int) -> str:
    """The letter at an output position: the oracle that every test compares with."""
    return LETTERS[(sum(prompt) * 7 + seed * 13 + position * 31 + position * position) % len(LETTERS)]


def expected_text(prompt: list[int], seed: int, tokens: int) -> str:
    return "".join(letter(prompt, seed, position) for position in range(tokens))


@dataclass
class Told:
    """What the gateway was told of an attempt. `by_last_keep` is how much of it was on its way when it last asked."""

    asked_s: float
    messages: list[TokenItem | Failed] = field(default_factory=list)
    by_last_keep: int = 0
    known: bool = True
    over: bool = False


class FakeWorker(threading.Thread):
    """One instance on a thread of its own.

    `behave(worker, submit)` replaces the plain answer when given. `submits`, `cancels` and `keeps` record what came in,
    `repaired` what was said again, `expired` the attempts that nobody asked for during a lease.
    """

    def __init__(
        self,
        keys: ClusterKeys,
        gateway: Address,
        name: str,
        role: str,
        letters: dict[str, int],
        *,
        incarnation: int = 1,
        behave: Callable[[FakeWorker, Submit], None] | None = None,
        max_model_len: int = 512,
        lease_s: float = 600.0,
        make_peers: Callable[[Door], MessageSender] = Peers,
        **load: object,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._door = Door(keys)
        self._mailbox = Mailbox(self._door)
        self._peers = make_peers(self._door)
        self.gateway = gateway
        self.address = Address(name, incarnation, self._mailbox.endpoint)
        self.role = role
        self.letters = letters
        self.behave = behave or FakeWorker.answer
        self.max_model_len = max_model_len
        self.load = load
        self.beating = True
        self.submits: list[Submit] = []
        self.cancels: list[str] = []
        self.keeps: list[Keep] = []
        self.repaired: list[TokenItem | Failed] = []
        self.expired: list[str] = []
        self.told: dict[str, Told] = {}
        self._lease_s = lease_s
        self._beats = 0
        self._todo: deque[Callable[[], None]] = deque()
        self._dead = threading.Event()
        self.start()

    def run(self) -> None:
        next_beat_s = 0.0
        while not self._dead.is_set():
            self._mailbox.wait(BEAT_S / 2)
            if self.beating and time.monotonic() >= next_beat_s:
                self._beats += 1
                self._peers.send(self.gateway.mailbox, self.heartbeat())
                next_beat_s = time.monotonic() + BEAT_S
            while self._todo:
                self._todo.popleft()()
            while not self._dead.is_set() and (message := self._mailbox.receive()) is not None:
                self._handle(message)
            self._expire()
        self._peers.close()
        self._mailbox.close()
        self._door.close()

    def _handle(self, message: object) -> None:
        if isinstance(message, Submit):
            if message.attempt not in self.told:  # a repeated one, or one that its end overtook, changes nothing
                self.told[message.attempt] = Told(time.monotonic())
                self.submits.append(message)
                self.behave(self, message)
        elif isinstance(message, Cancel):
            self.told.setdefault(message.attempt, Told(time.monotonic())).over = True
            self.cancels.append(message.attempt)
        elif isinstance(message, Keep):
            self.keeps.append(message)
            for wanted in message.wanted:
                self._repair(message.gateway, wanted)

    def _repair(self, gateway: Address, wanted: Wanted) -> None:
        told = self.told.setdefault(wanted.attempt, Told(time.monotonic(), known=False))
        told.asked_s = time.monotonic()
        if not told.known:
            told.messages = [
                Failed(worker=self.address, attempt=wanted.attempt, code=AttemptLost.code, message="never heard of it")
            ]
            told.by_last_keep = 1
        due = told.messages[: told.by_last_keep]
        told.by_last_keep = len(told.messages)
        items = [said for said in due if isinstance(said, TokenItem) and said.position + len(said.tokens) > wanted.position]
        failures = [said for said in due if isinstance(said, Failed)]
        if items:
            self._peers.send(gateway.mailbox, Tokens(worker=self.address, items=tuple(items)))
        for failed in failures:
            self._peers.send(gateway.mailbox, failed)
        self.repaired += items + failures

    def _expire(self) -> None:
        for attempt, told in self.told.items():
            if not told.over and time.monotonic() - told.asked_s > self._lease_s:
                told.over = True
                self.expired.append(attempt)

    @property
    def working(self) -> list[str]:
        """Attempts that the gateway neither cancelled nor ceased to ask for."""
        return [attempt for attempt, told in self.told.items() if not told.over]

    def heartbeat(self) -> Heartbeat:
        return Heartbeat(
            worker=self.address,
            role=self.role,
            accelerator="CPU",
            model="tiny",
            fingerprint="f",
            layout=KVLayout.whole(layers=(LayerShape(2, 8, 8),), dtype="float32", block_size=16),
            total_blocks=1000,
            capacity_tokens=16_000,
            max_model_len=self.max_model_len,
            max_num_seqs=64,
            kv_endpoint="127.0.0.1:1",
            cost=CostModel(),
            load=Load(**{"free_blocks": 1000, "steps": self._beats, **self.load}),
            node="node-a",
        )

    # --- what behaviours are made of

    def item(self, submit: Submit, position: int, count: int = 1) -> TokenItem:
        """The item for `count` tokens from `position` on, as this attempt should produce it."""
        prompt = unpack_tokens(submit.tokens)[: submit.prompt_tokens]
        seed, last = submit.sampling.seed, submit.sampling.max_tokens - 1
        tokens = tuple(self.letters[letter(prompt, seed, position + index)] for index in range(count))
        logprobs = ()
        if submit.sampling.logprobs is not None:
            top = tuple(
                (token, -0.5 - rank) for rank, token in enumerate(sorted(self.letters.values())[: submit.sampling.logprobs])
            )
            logprobs = tuple(TokenLogprobs(logprob=-0.25, top=top) for _ in tokens)
        first = submit.stage != "decode" and position == self.begin(submit)
        decoded = submit.stage == "decode" and position == self.begin(submit) + 1
        served = ServedBy(cached_tokens=2) if first else ServedBy(kv_bytes=4096, transfer_s=0.001) if decoded else None
        finish = FinishReason.LENGTH if position + count - 1 >= last else None
        return TokenItem(
            attempt=submit.attempt, position=position, tokens=tokens, logprobs=logprobs, finish=finish, served=served
        )

    def begin(self, submit: Submit) -> int:
        """The first output position that the attempt has to produce."""
        return len(submit.tokens) // 4 - submit.prompt_tokens

    def send(self, *items: TokenItem, worker: Address | None = None) -> None:
        for item in items:
            if worker is None and item.attempt in self.told:
                self.told[item.attempt].messages.append(item)
        self._peers.send(self.gateway.mailbox, Tokens(worker=worker or self.address, items=items))

    def fail(self, submit: Submit, code: str, message: str = "scripted") -> None:
        failed = Failed(worker=self.address, attempt=submit.attempt, code=code, message=message)
        self.told[submit.attempt].messages.append(failed)
        self._peers.send(self.gateway.mailbox, failed)

    def positions(self, submit: Submit) -> range:
        """Output positions that are this worker's to produce."""
        begin, end = self.begin(submit), submit.sampling.max_tokens
        if submit.stage == "prefill":
            return range(begin, begin + 1)
        return range(begin + (submit.stage == "decode"), end)

    def answer(self, submit: Submit) -> None:
        """All tokens, one message each."""
        for position in self.positions(submit):
            self.send(self.item(submit, position))

    def later(self, action: Callable[[], None]) -> None:
        """Do something on the worker's own thread, soon. Safe from any thread."""
        self._todo.append(action)
        self._mailbox.wake()

    def die(self) -> None:
        """Vanish without a word."""
        self._dead.set()

    def stop(self) -> None:
        self._dead.set()
        self.join()
