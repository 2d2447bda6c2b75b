"""A gateway in virtual time: the real policy and cluster state, and the rules of delivery, retry and `Keep`, without HTTP."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from core.errors import HetServeError, Overloaded, WorkerLost, from_wire
from core.messages import Address, Cancel, Failed, Heartbeat, Keep, Submit, TokenItem, Tokens, Wanted
from core.request import Request
from core.tokens import pack_tokens
from router.policy import NOBODY, Assignment, RoutingPolicy
from router.state import ClusterState, InstanceKey
from tests.support.virtual.post import Post
from tests.support.virtual.timeline import Timeline

SWEEP_S = 0.1
RETRY_S = 0.2


@dataclass(eq=False)
class Stream:
    """One request: what its client has seen, and how it ended: with `finish`, or with `error`."""

    request: Request
    ticket: int
    submitted_s: float
    tokens: list[int] = field(default_factory=list)
    early: dict[int, TokenItem] = field(default_factory=dict)
    attempt: str | None = None
    assignment: Assignment | None = None
    attempts: int = 0
    failures: int = 0
    decoding: bool = False
    progressed_s: float = 0.0
    ended_s: float | None = None
    finish: str | None = None
    error: HetServeError | None = None

    @property
    def ended(self) -> bool:
        return self.finish is not None or self.error is not None


class VirtualGateway:
    """`submit` requests, and read the streams when they have ended. A retryable failure is tried again elsewhere, at most
    `max_attempts` times; a refusal for want of room is tried again later."""

    def __init__(
        self,
        timeline: Timeline,
        post: Post,
        policy: RoutingPolicy,
        *,
        name: str = "gateway",
        lease_s: float,
        max_attempts: int = 8,
    ) -> None:
        self.address = Address(name, 1, f"virtual://{name}")
        self.streams: list[Stream] = []
        self.state = ClusterState(dead_after_s=1.5, stuck_after_s=3.0)
        self._timeline = timeline
        self._policy = policy
        self._lease_s = lease_s
        self._max_attempts = max_attempts
        self._peers = post.peers(self.address.mailbox)
        self._mailbox = post.open(self.address.mailbox)
        self._mailbox.on_arrival = self._read
        self._by_attempt: dict[str, Stream] = {}
        self._tickets = itertools.count(1)
        self._dead = False
        self._every(lease_s / 3, self._keep)
        self._every(SWEEP_S, self._sweep)

    @property
    def live(self) -> int:
        return sum(not stream.ended for stream in self.streams)

    def submit(self, request: Request) -> Stream:
        now_s = self._timeline.now()
        stream = Stream(request, next(self._tickets), now_s, progressed_s=now_s)
        self.streams.append(stream)
        self._launch(stream, NOBODY)
        return stream

    def cancel(self, stream: Stream) -> None:
        self._stop_attempt(stream)
        self._end(stream, error=HetServeError("cancelled"))

    def die(self) -> None:
        """Send and read nothing more."""
        self._dead = True

    # --- inside -------------------------------------------------------------------------------------------------------

    def _launch(self, stream: Stream, avoid: frozenset[InstanceKey]) -> None:
        if stream.ended or self._dead:
            return
        found = self._policy.assign(stream.request, self.state.snapshot(), avoid)
        if not isinstance(found, Assignment):
            self._timeline.after(RETRY_S, lambda: self._launch(stream, NOBODY))
            return
        stream.attempts += 1
        stream.assignment, stream.decoding = found, found.prefill is None
        stream.early.clear()
        attempt = stream.attempt = f"{stream.request.request_id}-{stream.attempts}"
        self._by_attempt[attempt] = stream
        decode = found.decode.address
        tokens = len(stream.request.prompt) + len(stream.tokens)
        if found.prefill is None:
            self.state.assigned(found.decode.key, self._timeline.now(), tokens, 1, tokens)
            self._send(stream, decode, "local", None)
        else:
            self.state.assigned(found.prefill.key, self._timeline.now(), tokens, 1, 0)
            self.state.assigned(found.decode.key, self._timeline.now(), 0, 1, tokens)
            self._send(stream, decode, "decode", found.prefill.address)
            self._send(stream, found.prefill.address, "prefill", decode)

    def _send(self, stream: Stream, worker: Address, stage: str, peer: Address | None) -> None:
        assert stream.attempt is not None
        request = stream.request
        message = Submit(
            attempt=stream.attempt,
            gateway=self.address,
            tokens=pack_tokens([*request.prompt, *stream.tokens]),
            prompt_tokens=len(request.prompt),
            sampling=request.sampling,
            stage=stage,
            peer=peer,
            salt=request.salt,
            ticket=stream.ticket,
        )
        self._peers.send(worker.mailbox, message)

    def _read(self) -> None:
        while (message := self._mailbox.receive()) is not None:
            if self._dead:
                continue
            if isinstance(message, Heartbeat):
                replaced = self.state.observe(message, self._timeline.now())
                if replaced is not None:
                    self._lost(replaced)
            elif isinstance(message, Tokens):
                for item in message.items:
                    self._take(message.worker, item)
            elif isinstance(message, Failed):
                self._failed(message)

    def _take(self, worker: Address, item: TokenItem) -> None:
        stream = self._by_attempt.get(item.attempt)
        if stream is None or not self._serves(stream, worker):
            return
        assert stream.assignment is not None
        if worker == stream.assignment.decode.address:
            stream.decoding = True
        stream.early[item.position] = item
        while not stream.ended:
            ready = [at for at, early in stream.early.items() if at <= len(stream.tokens) <= at + len(early.tokens)]
            if not ready:
                return
            early = stream.early.pop(ready[0])
            fresh = early.tokens[len(stream.tokens) - ready[0] :]
            if fresh or early.finish:
                stream.progressed_s = self._timeline.now()
            stream.tokens += fresh
            if early.finish is not None:
                self._forget(stream)
                self._end(stream, finish=early.finish.value)

    def _failed(self, message: Failed) -> None:
        stream = self._by_attempt.get(message.attempt)
        if stream is None or not self._serves(stream, message.worker):
            return
        assert stream.assignment is not None
        if stream.decoding and stream.assignment.prefill is not None and message.worker == stream.assignment.prefill.address:
            return
        self._attempt_failed(stream, from_wire(message.code, message.message))

    def _attempt_failed(self, stream: Stream, error: HetServeError) -> None:
        self._stop_attempt(stream)
        stream.failures += 1
        if not (error.retryable or isinstance(error, Overloaded)) or stream.failures >= self._max_attempts:
            self._end(stream, error=error)
        else:
            self._timeline.after(RETRY_S if isinstance(error, Overloaded) else 0.0, lambda: self._launch(stream, NOBODY))

    def _serves(self, stream: Stream, worker: Address) -> bool:
        found = stream.assignment
        return found is not None and worker in [item.address for item in (found.decode, found.prefill) if item is not None]

    def _stop_attempt(self, stream: Stream) -> None:
        found, attempt = stream.assignment, stream.attempt
        if found is not None and attempt is not None:
            for item in (found.decode, found.prefill):
                if item is not None:
                    self._peers.send(item.address.mailbox, Cancel(attempt=attempt))
        self._forget(stream)

    def _forget(self, stream: Stream) -> None:
        if stream.attempt is not None:
            self._by_attempt.pop(stream.attempt, None)
        stream.attempt = stream.assignment = None

    def _end(self, stream: Stream, *, finish: str | None = None, error: HetServeError | None = None) -> None:
        stream.finish, stream.error, stream.ended_s = finish, error, self._timeline.now()

    def _lost(self, key: InstanceKey) -> None:
        for stream in list(self._by_attempt.values()):
            found = stream.assignment
            if found is None:
                continue
            if key == found.decode.key or (found.prefill is not None and key == found.prefill.key and not stream.decoding):
                self._attempt_failed(stream, WorkerLost(f"{key[0]} is gone"))

    def _keep(self) -> None:
        wanted: dict[Address, list[Wanted]] = {}
        for attempt, stream in self._by_attempt.items():
            found = stream.assignment
            assert found is not None
            wanted.setdefault(found.decode.address, []).append(Wanted(attempt, len(stream.tokens)))
            if found.prefill is not None and not stream.decoding:
                wanted.setdefault(found.prefill.address, []).append(Wanted(attempt, len(stream.tokens)))
        for worker, items in wanted.items():
            self._peers.send(worker.mailbox, Keep(gateway=self.address, wanted=tuple(items)))

    def _sweep(self) -> None:
        for key in self.state.sweep(self._timeline.now()):
            self._lost(key)

    def _every(self, period_s: float, what: Callable[[], None]) -> None:
        def again() -> None:
            if not self._dead:
                what()
                self._timeline.after(period_s, again)

        self._timeline.after(period_s, again)
