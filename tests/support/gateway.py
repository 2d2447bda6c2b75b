"""A gateway without HTTP: submits attempts to instances over real mailboxes and gathers what comes back."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from core.messages import (
    Address,
    Cancel,
    Failed,
    Heartbeat,
    Keep,
    ServedBy,
    Submit,
    TokenItem,
    TokenLogprobs,
    Tokens,
    Wanted,
)
from core.request import FinishReason
from core.sampling import SamplingParams
from core.tokens import pack_tokens
from mail.door import Door
from mail.keys import ClusterKeys
from mail.mailbox import Mailbox
from mail.peers import Peers


@dataclass
class Generation:
    """What arrived for one attempt."""

    attempt: str
    first: int = 0
    workers: tuple[Address, ...] = ()
    tokens: dict[int, int] = field(default_factory=dict)
    by: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    served: dict[str, ServedBy] = field(default_factory=dict)
    finish: FinishReason | None = None
    last: int = -1
    failures: list[Failed] = field(default_factory=list)
    repeated: int = 0

    @property
    def output(self) -> list[int]:
        return [self.tokens[position] for position in sorted(self.tokens)]

    @property
    def position(self) -> int:
        """The first output position that is missing."""
        position = self.first
        while position in self.tokens:
            position += 1
        return position

    @property
    def complete(self) -> bool:
        return self.finish is not None and self.position > self.last

    @property
    def ended(self) -> bool:
        return self.complete or bool(self.failures)


KEEP_S = 0.1


class ScriptedGateway:
    """Use as a context manager. All waiting is bounded by `timeout_s`. While it waits it tells workers what it still wants,
    unless `keeps` is False."""

    def __init__(self, keys: ClusterKeys, name: str = "gateway") -> None:
        self._door = Door(keys)
        self._mailbox = Mailbox(self._door)
        self.peers = Peers(self._door)
        self.address = Address(name, 1, self._mailbox.endpoint)
        self.generations: dict[str, Generation] = {}
        self.heartbeats: dict[str, Heartbeat] = {}
        self.keeps = True
        self._ids = itertools.count()
        self._tickets = itertools.count(1)
        self._kept_s = 0.0

    def submit(
        self,
        prompt: list[int],
        sampling: SamplingParams,
        *,
        prefill: Address | None,
        decode: Address,
        delivered: list[int] | None = None,
        salt: bytes = b"",
        deadline_s: float = 60.0,
    ) -> str:
        """Send one attempt to a pair, or to `decode` alone when `prefill` is None. Returns its id."""
        attempt, ticket = f"a{next(self._ids)}", next(self._tickets)
        workers = (decode,) if prefill is None else (decode, prefill)
        self.generations[attempt] = Generation(attempt, len(delivered or []), workers)
        tokens = pack_tokens(prompt + (delivered or []))

        def message(stage: str, peer: Address | None) -> Submit:
            return Submit(
                attempt=attempt,
                gateway=self.address,
                tokens=tokens,
                prompt_tokens=len(prompt),
                sampling=sampling,
                stage=stage,
                peer=peer,
                salt=salt,
                deadline_s=deadline_s,
                ticket=ticket,
            )

        if prefill is None:
            self.peers.send(decode.mailbox, message("local", None))
        else:
            self.peers.send(decode.mailbox, message("decode", prefill))
            self.peers.send(prefill.mailbox, message("prefill", decode))
        return attempt

    def cancel(self, attempt: str, *workers: Address) -> None:
        self.generations[attempt].workers = ()
        for worker in workers:
            self.peers.send(worker.mailbox, Cancel(attempt=attempt))

    def keep(self) -> None:
        """Tell each worker what is still wanted of it."""
        wanted: dict[Address, list[Wanted]] = {}
        for generation in self.generations.values():
            if not generation.ended:
                for worker in generation.workers:
                    wanted.setdefault(worker, []).append(Wanted(generation.attempt, generation.position))
        for worker, listed in wanted.items():
            self.peers.send(worker.mailbox, Keep(gateway=self.address, wanted=tuple(listed)))

    def wait(self, *attempts: str, timeout_s: float = 60.0) -> list[Generation]:
        """Until all of them have ended (all known attempts if none is named)."""
        wanted = [self.generations[attempt] for attempt in attempts or tuple(self.generations)]
        until_s = time.monotonic() + timeout_s
        while not all(generation.ended for generation in wanted):
            if time.monotonic() > until_s:
                raise TimeoutError(f"still waiting for {[g for g in wanted if not g.ended]}")
            self.pump(0.05)
        return wanted

    def pump(self, wait_s: float = 0.0) -> None:
        if self.keeps and time.monotonic() - self._kept_s > KEEP_S:
            self._kept_s = time.monotonic()
            self.keep()
        self._mailbox.wait(wait_s)
        while (message := self._mailbox.receive()) is not None:
            match message:
                case Tokens():
                    for item in message.items:
                        self._item(message.worker, item)
                case Failed():
                    self.generations[message.attempt].failures.append(message)
                case Heartbeat():
                    self.heartbeats[message.worker.name] = message

    def wait_for_token(self, attempt: str, count: int = 1, timeout_s: float = 30.0) -> None:
        until_s = time.monotonic() + timeout_s
        while len(self.generations[attempt].tokens) < count:
            if time.monotonic() > until_s:
                raise TimeoutError(f"{attempt} has {len(self.generations[attempt].tokens)} tokens, not {count}")
            self.pump(0.01)

    def _item(self, worker: Address, item: TokenItem) -> None:
        generation = self.generations[item.attempt]
        for offset, token in enumerate(item.tokens):
            position = item.position + offset
            generation.repeated += position in generation.tokens
            generation.tokens[position] = token
            generation.by[position] = worker.name
            if item.logprobs:
                generation.logprobs[position] = item.logprobs[offset]
        if item.served is not None:
            generation.served[worker.name] = item.served
        if item.finish is not None:
            generation.finish = item.finish
            generation.last = item.position + len(item.tokens) - 1

    def close(self) -> None:
        self.peers.close()
        self._mailbox.close()
        self._door.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
