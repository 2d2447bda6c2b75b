"""A gateway in virtual time: the real policy, cluster state, readers and routes, and the rules of retry, without HTTP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from core.errors import HetServeError, Overloaded, TransferError, Unavailable, WorkerLost, from_wire
from core.messages import Address, Cancel, Failed, Heartbeat, Submit, TokenItem, Tokens
from core.request import Request
from core.tokens import pack_tokens
from gateway.serving.awaited import Awaited, AwaitedAttempts
from gateway.text.token_reader import TextOptions, TokenReader
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
    reader: TokenReader
    tokens: list[int] = field(default_factory=list)
    attempt: str | None = None
    assignment: Assignment | None = None
    attempts: int = 0
    attempt_tokens: int = 0
    failures: int = 0
    progressed_s: float = 0.0
    longest_silence_s: float = 0.0
    finish: str | None = None
    error: HetServeError | None = None

    @property
    def ended(self) -> bool:
        return self.finish is not None or self.error is not None

    def progress(self, now_s: float) -> None:
        self.longest_silence_s = max(self.longest_silence_s, now_s - self.progressed_s)
        self.progressed_s = now_s


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
        self._newest_ticket = 0
        self._dead = False
        self._routes = AwaitedAttempts(self.address, lease_s, timeline.now())
        self._every(self._routes.tick_s, self._keep)
        self._every(SWEEP_S, self._sweep)

    @property
    def live(self) -> int:
        return sum(not stream.ended for stream in self.streams)

    def submit(self, request: Request) -> Stream:
        now_s = self._timeline.now()
        reader = TokenReader(request.prompt, TextOptions(decode=lambda ids: ""))
        self._newest_ticket += 1
        stream = Stream(request, self._newest_ticket, now_s, reader, progressed_s=now_s)
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
        stream.attempt_tokens = 0
        stream.assignment = found
        stream.reader.forget_early()
        attempt = stream.attempt = f"{stream.request.request_id}-{stream.attempts}"
        self._by_attempt[attempt] = stream
        decode, prefill = found.decode.address, None if found.prefill is None else found.prefill.address
        self._routes.open(attempt, Awaited(stream.reader, decode, prefill, self._timeline.now(), stream.reader.next_position))
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
                self._newest_ticket = max(self._newest_ticket, message.load.newest_ticket)
                replaced = self.state.observe(message, self._timeline.now())
                if replaced is not None:
                    self._lost(replaced)
            elif isinstance(message, Tokens):
                for item in message.items:
                    self._take(message.worker, item)
            elif isinstance(message, Failed):
                self._failed(message)

    def _take(self, worker: Address, item: TokenItem) -> None:
        route = self._routes.find(item.attempt, worker)
        if route is None:
            return
        stream, now_s = self._by_attempt[item.attempt], self._timeline.now()
        delta = stream.reader.take((worker.name, worker.incarnation), item)
        self._routes.took(item.attempt, delta, now_s)
        if delta is None:
            return
        stream.progress(now_s)
        stream.tokens += delta.tokens
        stream.attempt_tokens += len(delta.tokens)
        if delta.finish is not None:
            self._forget(stream)
            self._end(stream, finish=delta.finish.value)

    def _failed(self, message: Failed) -> None:
        route = self._routes.find(message.attempt, message.worker)
        if route is not None and not (route.decoding and message.worker == route.prefill):
            stream, error = self._by_attempt[message.attempt], from_wire(message.code, message.message)
            if type(error) is Unavailable and not stream.attempt_tokens:
                self._refused(stream, (message.worker.name, message.worker.incarnation))
            else:
                self._attempt_failed(stream, error)

    def _refused(self, stream: Stream, worker: InstanceKey) -> None:
        """It takes no such work any more, and said so before it did any: that costs the request nothing but time."""
        self.state.refused(worker)
        self._stop_attempt(stream)
        self._timeline.after(0.0, lambda: self._launch(stream, NOBODY))

    def _attempt_failed(self, stream: Stream, error: HetServeError) -> None:
        self._stop_attempt(stream)
        stream.failures += 1
        if not (error.retryable or isinstance(error, Overloaded)) or stream.failures >= self._max_attempts:
            self._end(stream, error=error)
        else:
            self._timeline.after(RETRY_S if isinstance(error, Overloaded) else 0.0, lambda: self._launch(stream, NOBODY))

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
            self._routes.drop(stream.attempt)
        stream.attempt = stream.assignment = None

    def _end(self, stream: Stream, *, finish: str | None = None, error: HetServeError | None = None) -> None:
        stream.progress(self._timeline.now())
        stream.finish, stream.error = finish, error

    def _lost(self, key: InstanceKey) -> None:
        for attempt, stream in list(self._by_attempt.items()):
            found = stream.assignment
            assert found is not None
            route = self._routes.find(attempt, found.decode.address)
            reading = found.prefill is not None and not (route is not None and route.decoding)
            if key == found.decode.key or (found.prefill is not None and reading and key == found.prefill.key):
                self._attempt_failed(stream, WorkerLost(f"{key[0]} is gone"))

    def _keep(self) -> None:
        for worker, keep in self._routes.keeps(self._timeline.now()):
            self._peers.send(worker.mailbox, keep)
        for attempt in self._routes.lost(self._timeline.now()):
            self._attempt_failed(self._by_attempt[attempt], TransferError("tokens were lost on the way from the worker"))

    def _sweep(self) -> None:
        for key in self.state.sweep(self._timeline.now()):
            self._lost(key)

    def _every(self, period_s: float, what: Callable[[], None]) -> None:
        def again() -> None:
            if not self._dead:
                what()
                self._timeline.after(period_s, again)

        self._timeline.after(period_s, again)
