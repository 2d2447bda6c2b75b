"""A gateway in virtual time: the real life cycle, policy, cluster state, readers and keeps, without threads and HTTP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from core.errors import HetServeError, Overloaded, TransferError, Unavailable
from core.messages import Address, Cancel, Failed, Heartbeat, TokenItem, Tokens
from core.request import Request
from gateway.serving.actions import Action, Close, Deliver, End, Fence, Launch, Stop
from gateway.serving.awaited import Awaited, AwaitedAttempts
from gateway.serving.events import Event, Failure, Fenced, Progress
from gateway.serving.generation import Attempt, Generation, submits
from gateway.serving.journal import Journal
from gateway.serving.lifecycle import LifeCycle, Limits
from gateway.text.token_reader import TextOptions, TokenReader
from router.policy import RoutingPolicy
from router.state import ClusterState
from tests.support.virtual.post import Post
from tests.support.virtual.timeline import Timeline

SWEEP_S = 0.1
RETRY_S = 0.2
TIMEOUT_S = 3600.0


@dataclass(eq=False)
class Stream:
    """One request, and its client: what that has seen, and how it ended: with `finish`, or with `error`."""

    request: Request
    submitted_s: float
    reader: TokenReader
    tokens: list[int] = field(default_factory=list)
    generation: Generation | None = None
    progressed_s: float = 0.0
    longest_silence_s: float = 0.0
    finish: str | None = None
    error: HetServeError | None = None
    cancelled: bool = False

    @property
    def ended(self) -> bool:
        return self.cancelled or self.finish is not None or self.error is not None

    @property
    def attempts(self) -> int:
        return 0 if self.generation is None else len(self.generation.entry.assignments)

    def progress(self, now_s: float) -> None:
        self.longest_silence_s = max(self.longest_silence_s, now_s - self.progressed_s)
        self.progressed_s = now_s


class VirtualGateway:
    """`submit` requests, and read the streams when they have ended. A client that is refused for now comes again."""

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
        self.life = LifeCycle(policy, self.state, Journal(), Limits(TIMEOUT_S, max_attempts))
        self._timeline = timeline
        self._peers = post.peers(self.address.mailbox)
        self._mailbox = post.open(self.address.mailbox)
        self._mailbox.on_arrival = self._read
        self._by_id: dict[str, Stream] = {}
        self._dead = False
        self._awaited = AwaitedAttempts(self.address, lease_s, timeline.now())
        self._every(self._awaited.tick_s, self._keep)
        self._every(SWEEP_S, lambda: self._do(self.life.tick(self._timeline.now())))

    @property
    def live(self) -> int:
        return sum(not stream.ended for stream in self.streams)

    def submit(self, request: Request) -> Stream:
        now_s = self._timeline.now()
        reader = TokenReader(request.prompt, TextOptions(decode=lambda ids: ""))
        stream = Stream(request, now_s, reader, progressed_s=now_s)
        self.streams.append(stream)
        self._by_id[request.request_id] = stream
        self._arrive(stream)
        return stream

    def cancel(self, stream: Stream) -> None:
        stream.cancelled = True
        if stream.generation is not None:
            self._do(self.life.cancel(stream.generation, self._timeline.now()))

    def die(self) -> None:
        """Send and read nothing more."""
        self._dead = True

    # --- inside -------------------------------------------------------------------------------------------------------

    def _arrive(self, stream: Stream) -> None:
        if stream.ended or self._dead:
            return
        try:
            stream.generation, actions = self.life.arrive(stream.request, self._timeline.now())
        except (Overloaded, Unavailable):
            self._timeline.after(RETRY_S, lambda: self._arrive(stream))
        else:
            self._do(actions)

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Launch(generation, attempt):
                    self._launch(generation, attempt)
                case Stop(attempt):
                    for worker in attempt.workers:
                        self._peers.send(worker.mailbox, Cancel(attempt=attempt.attempt_id))
                case Fence(attempt, _):
                    self._awaited.drop(attempt.attempt_id)
                    self._timeline.after(0.0, lambda fenced=attempt.attempt_id: self._take(Fenced(fenced)))
                case Close(attempt):
                    self._awaited.drop(attempt.attempt_id)
                case Deliver(generation, delta, _):
                    stream = self._by_id[generation.generation_id]
                    stream.tokens += delta.tokens
                    stream.progress(self._timeline.now())
                case End(generation, error):
                    stream = self._by_id.pop(generation.generation_id)
                    stream.progress(self._timeline.now())
                    stream.finish, stream.error = generation.entry.finish if error is None else None, error

    def _launch(self, generation: Generation, attempt: Attempt) -> None:
        reader, now_s = self._by_id[generation.generation_id].reader, self._timeline.now()
        reader.forget_early()
        prefill = attempt.assignment.prefill
        awaited = Awaited(
            reader, attempt.assignment.decode.address, None if prefill is None else prefill.address, now_s, reader.next_position
        )
        self._awaited.open(attempt.attempt_id, awaited)
        for worker, submit in submits(generation, attempt, self.address, now_s):
            self._peers.send(worker.mailbox, submit)

    def _take(self, event: Event) -> None:
        if not self._dead:
            self._do(self.life.take(event, self._timeline.now()))

    def _read(self) -> None:
        while (message := self._mailbox.receive()) is not None:
            if self._dead:
                continue
            if isinstance(message, Heartbeat):
                self._take(message)
            elif isinstance(message, Tokens):
                for item in message.items:
                    self._tokens(message.worker, item)
            elif isinstance(message, Failed) and self._awaited.find(message.attempt, message.worker) is not None:
                worker = (message.worker.name, message.worker.incarnation)
                self._take(Failure(message.attempt, worker, message.code, message.message))

    def _tokens(self, worker: Address, item: TokenItem) -> None:
        awaited = self._awaited.find(item.attempt, worker)
        if awaited is None:
            return
        delta = awaited.reader.take((worker.name, worker.incarnation), item)
        self._awaited.took(item.attempt, delta, self._timeline.now())
        if delta is not None:
            self._take(Progress(item.attempt, delta))

    def _keep(self) -> None:
        for worker, keep in self._awaited.keeps(self._timeline.now()):
            self._peers.send(worker.mailbox, keep)
        for attempt in self._awaited.lost(self._timeline.now()):
            self._awaited.drop(attempt)
            self._take(Failure(attempt, None, TransferError.code, "tokens were lost on the way from the worker"))

    def _every(self, period_s: float, what: Callable[[], None]) -> None:
        def again() -> None:
            if not self._dead:
                what()
                self._timeline.after(period_s, again)

        self._timeline.after(period_s, again)
