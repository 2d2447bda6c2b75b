"""From a request to tokens, however many attempts it takes.

    start ──▶ attempt ──tokens──▶ inbox ──▶ finished
                │ worker lost, retryable failure, refused
                ▼
             fencing ──▶ retry (prompt + delivered tokens) ──no capacity──▶ stranded ──▶ retry or error

Invariants:
- Every started generation ends exactly once: completed, failed with one typed error, or cancelled.
- An attempt id is used once. A retry begins only after the pump has fenced the last attempt, so its replay holds every
  token that the client may have seen, and nothing of the old attempt can follow.
- Workers of an attempt that ends early are told with a `Cancel`, the dead as well: one that wakes up must stop.
- A request's ticket is larger than that of any older request that this gateway or a worker has heard of (Lamport, 1978), and
  stays with it through its retries: workers admit by it.
- A worker that turns an attempt away because it drains or changed its role has not failed: that costs patience, not an attempt.

Runs in the event loop's thread; never blocks. Neighbours: `router` decides, `pump` receives, `journal` remembers. Replaying
delivered tokens into a new attempt is the idea of Dynamo's migration; drawing by (seed, position) is what makes it exact here.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import structlog

from core.clock import Clock
from core.errors import (
    DeadlineExceeded,
    HetServeError,
    Overloaded,
    ProtocolError,
    TransferError,
    Unavailable,
    WorkerLost,
    from_wire,
)
from core.messages import Address, Cancel, Heartbeat
from core.request import Request
from core.request_times import Stage
from gateway.serving.generation import Attempt, Generation, submits
from gateway.serving.inbox import Inbox
from gateway.serving.journal import Entry, Journal, Outcome
from gateway.serving.metrics import Metrics
from gateway.serving.pump import Event, Failure, Fenced, Progress, Pump
from gateway.text.token_reader import Delta, TextOptions, TokenReader
from mail.peers import MessageSender
from router.policy import Assignment, Rejection, RoutingPolicy
from router.state import ClusterState, InstanceKey, Snapshot

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class DispatchLimits:
    """`patience_s` bounds how long a request waits for an instance to come back, once all that could serve it are gone, and how
    long it goes from one that turns it away to the next."""

    request_timeout_s: float = 600.0
    max_attempts: int = 3
    max_concurrent: int = 4096
    patience_s: float = 30.0


class Dispatcher:
    """Serves generations through workers.

    Args:
        address: this gateway's mailbox, told to workers with every `Submit`.
        peers: connections to workers, owned by the loop's thread.
    """

    def __init__(
        self,
        *,
        address: Address,
        peers: MessageSender,
        pump: Pump,
        policy: RoutingPolicy,
        cluster: ClusterState,
        journal: Journal,
        metrics: Metrics,
        clock: Clock,
        limits: DispatchLimits,
    ) -> None:
        self._address = address
        self._peers = peers
        self._pump = pump
        self._policy = policy
        self._cluster = cluster
        self.journal = journal
        self._metrics = metrics
        self._clock = clock
        self._limits = limits
        self._live: set[Generation] = set()
        self._attempts: dict[str, Generation] = {}
        self._at: dict[InstanceKey, set[Generation]] = {}
        self._stranded: set[Generation] = set()
        self._newest_ticket = 0
        self.draining = False

    # --- for the HTTP side

    @property
    def in_flight(self) -> int:
        return len(self._live)

    @property
    def max_concurrent(self) -> int:
        """More generations than these are never in flight at once."""
        return self._limits.max_concurrent

    def snapshot(self) -> Snapshot:
        return self._cluster.snapshot()

    def admit(self, generations: int) -> None:
        """Raises Unavailable while draining, Overloaded when the gateway itself is full."""
        if self.draining:
            raise Unavailable("the gateway is draining")
        if len(self._live) + generations > self._limits.max_concurrent:
            raise Overloaded(f"{len(self._live)} generations are in flight already", retry_after_s=1.0)

    def start(self, request: Request, options: TextOptions, inbox: Inbox, index: int) -> Generation:
        """Begin a generation whose deltas go to `inbox` under `index`.

        Raises:
            Overloaded, Unavailable: the router refuses it now.
        """
        snapshot = self._cluster.snapshot()
        found = self._policy.assign(request, snapshot)
        if isinstance(found, Rejection) and not (snapshot.settling and found.retry_after_s is None):
            raise found.error()
        now_s = self._clock.now()
        expires_s = now_s + self._limits.request_timeout_s
        reader = TokenReader(request.prompt, options)
        self._newest_ticket += 1
        generation = Generation(self.journal.begin(request), reader, inbox, index, self._newest_ticket, expires_s)
        self._live.add(generation)
        generation.timer = asyncio.get_running_loop().call_later(expires_s - now_s, self._expire, generation)
        self._metrics.accepted(len(request.prompt))
        if isinstance(found, Rejection):
            self._strand(generation, found)
        else:
            self._launch(generation, found)
        return generation

    def close(self, generation: Generation) -> None:
        """The client no longer wants it."""
        if not generation.done:
            self._abort_attempt(generation)
            self._end(generation, Outcome.CANCELLED)

    def close_all(self, error: HetServeError) -> None:
        for generation in list(self._live):
            self._fail(generation, error)

    # --- events

    def deliver(self, events: list[Event]) -> None:
        """Take in what the pump received, in order."""
        for event in events:
            try:
                self._take(event)
            except Exception:  # a bug met in one event must not lose the events of other requests behind it
                log.exception("cannot handle event", kind=type(event).__name__)
                generation = None if isinstance(event, Heartbeat) else self._attempts.get(event.attempt)
                if generation is not None and not generation.done:
                    self._fail(generation, HetServeError("the gateway failed to handle the answer of a worker"))

    def sweep(self) -> None:
        """Notice the dead and the stuck, retry the stranded. Call several times a second."""
        for key in self._cluster.sweep(self._clock.now()):
            self._lost(key, "fell silent or made no progress")
        for generation in list(self._stranded):
            self._stranded.discard(generation)
            if not generation.done:
                self._retry(generation)

    def was_deaf(self, seconds: float) -> None:
        """This process was stopped, or its loop was held up, for so long, up to now: what workers said meanwhile is still to be
        heard. To be called before `sweep`."""
        self._cluster.was_deaf(seconds, self._clock.now())

    def worker_lost(self, key: InstanceKey) -> None:
        """Somebody who knows says that this incarnation is gone for good."""
        self._cluster.lose(key)
        self._lost(key, "was reported dead")

    def _take(self, event: Event) -> None:
        if isinstance(event, Heartbeat):
            try:
                replaced = self._cluster.observe(event, self._clock.now())
            except ProtocolError as error:
                log.warning("heartbeat refused", worker=event.worker.name, reason=str(error))
                return
            self._newest_ticket = max(self._newest_ticket, event.load.newest_ticket)
            if replaced is not None:
                self._lost(replaced, "was restarted")
            return
        generation = self._attempts.get(event.attempt)
        if isinstance(event, Fenced):
            self._attempts.pop(event.attempt, None)
            if generation is not None and not generation.done:
                self._retry(generation)
        elif generation is not None and not generation.done:
            if isinstance(event, Progress):
                self._progress(generation, event.delta)
            else:
                self._failure(generation, event)

    def _progress(self, generation: Generation, delta: Delta) -> None:
        entry, now_s = generation.entry, self._clock.now()
        if delta.tokens:
            before_s = entry.times.marks_s.get(Stage.LAST_TOKEN)
            entry.tokens.extend(delta.tokens)
            entry.times.token(now_s, len(delta.tokens))
            self._metrics.tokens(entry, len(delta.tokens), None if before_s is None else now_s - before_s)
        for key, report in delta.served:
            entry.served[key] = report
        attempt = generation.attempt
        if attempt is not None and delta.tokens:
            attempt.heard.add(delta.worker)
            generation.refused_until_s = 0.0
        generation.inbox.put(generation.index, delta)
        if delta.finish is not None:
            entry.finish = delta.finish.value
            if delta.cut:
                self._abort_attempt(generation)
            else:
                self._forget_attempt(generation)
            self._end(generation, Outcome.COMPLETED)

    def _failure(self, generation: Generation, event: Failure) -> None:
        attempt = generation.attempt
        if attempt is None or attempt.attempt_id != event.attempt:
            return  # already being fenced
        prefill, decode = attempt.assignment.prefill, attempt.assignment.decode
        if prefill is not None and event.worker == prefill.key and attempt.decoding:
            return
        error = from_wire(event.code, event.message)
        if type(error) is Unavailable and event.worker is not None and event.worker not in attempt.heard:
            self._refused(generation, event.worker, error)
            return
        avoid = attempt.keys if event.worker is None else frozenset({event.worker})
        if isinstance(error, TransferError) and prefill is not None and event.worker is not None:
            # Whoever reports a broken transfer is alive to say so: suspect the other side first, then both.
            other = prefill.key if event.worker == decode.key else decode.key
            avoid = frozenset({other}) if generation.failures == 0 else attempt.keys
        self._attempt_failed(generation, error, avoid)

    def _refused(self, generation: Generation, worker: InstanceKey, error: Unavailable) -> None:
        """The worker takes no such work any more, and the gateway did not know yet."""
        self._cluster.refused(worker)
        now_s = self._clock.now()
        generation.refused_until_s = generation.refused_until_s or now_s + self._limits.patience_s
        if now_s >= generation.refused_until_s:
            self._attempt_failed(generation, error, frozenset({worker}))
        else:
            self._move(generation, error)

    def _lost(self, key: InstanceKey, how: str) -> None:
        for generation in list(self._at.get(key, ())):
            attempt = generation.attempt
            if attempt is None:
                continue
            prefill = attempt.assignment.prefill
            if prefill is not None and prefill.key == key and attempt.decoding:
                continue
            self._attempt_failed(generation, WorkerLost(f"{key[0]} {how}"), frozenset({key}))

    def _expire(self, generation: Generation) -> None:
        timeout_s = self._limits.request_timeout_s
        self._fail(generation, DeadlineExceeded(f"the request took longer than {timeout_s:g} s"))

    # --- attempts

    def _launch(self, generation: Generation, assignment: Assignment) -> None:
        entry = generation.entry
        entry.assignments.append(assignment)
        now_s = self._clock.now()
        entry.times.mark(Stage.ASSIGNED, now_s)
        attempt = Attempt(f"{generation.generation_id}-{len(entry.assignments)}", assignment)
        generation.attempt = attempt
        self._attempts[attempt.attempt_id] = generation
        for key in attempt.keys:
            self._at.setdefault(key, set()).add(generation)
        prefill = None if assignment.prefill is None else assignment.prefill.address
        self._pump.open(attempt.attempt_id, generation.reader, assignment.decode.address, prefill)
        self._count(entry, assignment, now_s)
        for worker, submit in submits(generation, attempt, self._address, generation.expires_s - now_s):
            if not self._peers.send(worker.mailbox, submit):
                key = (worker.name, worker.incarnation)
                self._attempt_failed(generation, WorkerLost(f"{worker.name} takes no messages"), frozenset({key}))
                return

    def _count(self, entry: Entry, assignment: Assignment, now_s: float) -> None:
        tokens = len(entry.request.prompt) + len(entry.tokens)
        if assignment.prefill is None:
            self._cluster.assigned(assignment.decode.key, now_s, tokens, 1, tokens)
        else:
            self._cluster.assigned(assignment.prefill.key, now_s, tokens, 1, 0)
            self._cluster.assigned(assignment.decode.key, now_s, 0, 1, tokens)

    def _attempt_failed(self, generation: Generation, error: HetServeError, avoid: frozenset[InstanceKey]) -> None:
        generation.failures += 1
        generation.avoid |= avoid
        may_retry = error.retryable or isinstance(error, Overloaded)
        if not may_retry or generation.failures >= self._limits.max_attempts:
            self._fail(generation, error)
            return
        self._move(generation, error)

    def _move(self, generation: Generation, error: HetServeError) -> None:
        """End the attempt because of `error`, and try again once it is fenced."""
        attempt = generation.attempt
        assert attempt is not None, "only a running attempt fails"
        self._metrics.retried(error.code)
        log.info("attempt failed", attempt=attempt.attempt_id, code=error.code, reason=str(error))
        self._abort_attempt(generation, fence=True)

    def _retry(self, generation: Generation) -> None:
        try:
            self._try_elsewhere(generation)
        except Exception:  # it has no attempt, and waits for nothing: nobody else would end it
            log.exception("cannot try again", request=generation.generation_id)
            self._fail(generation, HetServeError("the gateway failed to try the request elsewhere"))

    def _try_elsewhere(self, generation: Generation) -> None:
        """Where everybody left has failed it already, try those again; where nobody is left, wait."""
        request = generation.entry.request
        found = self._policy.assign(request, self._cluster.snapshot(), generation.avoid)
        if isinstance(found, Rejection) and generation.avoid:
            found = self._policy.assign(request, self._cluster.snapshot())
        if isinstance(found, Assignment):
            generation.stranded_until_s = 0.0
            self._launch(generation, found)
            return
        self._strand(generation, found)

    def _strand(self, generation: Generation, found: Rejection) -> None:
        """Nobody can serve it now: try again at the next sweep, for as long as patience lasts."""
        now_s = self._clock.now()
        generation.stranded_until_s = generation.stranded_until_s or now_s + self._limits.patience_s
        if now_s >= generation.stranded_until_s:
            self._fail(generation, found.error())
        else:
            self._stranded.add(generation)

    def _abort_attempt(self, generation: Generation, fence: bool = False) -> None:
        """Tell the workers to stop; with `fence`, come back through `Fenced`."""
        attempt = generation.attempt
        if attempt is not None:
            for worker in attempt.workers:
                self._peers.send(worker.mailbox, Cancel(attempt=attempt.attempt_id))
        self._forget_attempt(generation, fence)

    def _forget_attempt(self, generation: Generation, fence: bool = False) -> None:
        attempt = generation.attempt
        if attempt is None:
            return
        generation.attempt = None
        for key in attempt.keys:
            there = self._at.get(key)
            if there is not None:
                there.discard(generation)
                if not there:
                    del self._at[key]
        if fence:
            self._pump.fence(attempt.attempt_id)
        else:
            self._attempts.pop(attempt.attempt_id, None)
            self._pump.close(attempt.attempt_id)

    # --- the end of a generation

    def _fail(self, generation: Generation, error: HetServeError) -> None:
        if generation.done:
            return
        self._abort_attempt(generation)
        generation.inbox.fail(error)
        self._end(generation, Outcome.FAILED, error)

    def _end(self, generation: Generation, outcome: Outcome, error: HetServeError | None = None) -> None:
        self._live.discard(generation)
        self._stranded.discard(generation)
        if generation.timer is not None:
            generation.timer.cancel()
        self.journal.end(generation.entry, outcome, self._clock.now(), None if error is None else error.code)
        self._metrics.ended(generation.entry)

    def invariants(self) -> dict[str, int]:
        """Counts that must all be back at rest once nothing runs."""
        outcomes = self.journal.outcomes
        return {
            "accepted": self.journal.accepted,
            "completed": outcomes[Outcome.COMPLETED],
            "failed": outcomes[Outcome.FAILED],
            "cancelled": outcomes[Outcome.CANCELLED],
            "in_flight": len(self._live),
            "journal_open": len(self.journal.open),
            "attempts": len(self._attempts),
            "instances_with_work": len(self._at),
            "stranded": len(self._stranded),
            "pump_attempts": self._pump.open_attempts,
        }
