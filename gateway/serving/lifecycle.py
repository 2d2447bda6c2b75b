"""The life of a gateway's generations, as decisions alone: events in, actions out.

    arrive ──nobody has room now──▶ HELD ◀─────nobody can serve it─────┐
       │                             │ somebody can                    │
       └──────────assigned─────────▶ RUNNING ──failed, lost──▶ FENCING ┤ fenced
                                     │    ▲                            │
                                     │    └───────assigned again───────┘
                                     └──finished──▶ ENDED        cancelled, expired, failed for good: ENDED from anywhere

Invariants:
- A generation that has arrived ends exactly once: completed, failed with one typed error, or cancelled.
- An attempt id is used once. The next attempt begins only after the last one was fenced, so that it replays every token that the
  client may have seen, and nothing of the old one can follow.
- The workers of an attempt that ends early are told (`Stop`), the dead as well: one that wakes up must stop.
- A generation's ticket is larger than that of any older one that this gateway or a worker has heard of (Lamport, 1978), and stays
  with it through its attempts: workers admit by it.
- A worker that turns an attempt away because it drains or changed its role has not failed: that costs patience, not an attempt.
- Of those that are held, whoever is due first is tried first, and no arrival overtakes one that the policy holds and that is due
  earlier; at most `max_held` arrivals are held.

Pure: no clock is read, nothing is sent, and nothing is waited for. `gateway.serving.dispatcher` carries the actions out; a
simulator can as well. Replaying delivered tokens into a new attempt is the idea of Dynamo's migration; drawing by (seed,
position) is what makes it exact here.
"""

from __future__ import annotations

import heapq
from bisect import insort
from dataclasses import dataclass

from core.errors import (
    DeadlineExceeded,
    HetServeError,
    Overloaded,
    TransferError,
    Unavailable,
    WorkerLost,
    from_wire,
)
from core.messages import Heartbeat
from core.request import Request
from core.request_times import Stage
from gateway.serving.actions import Action, Close, Deliver, End, Fence, Launch, Stop
from gateway.serving.events import Event, Failure, Fenced, Progress
from gateway.serving.generation import Attempt, Generation, State
from gateway.serving.journal import Entry, Journal, Outcome
from gateway.text.token_reader import Delta
from router.policy import NOBODY, Assignment, Decision, Hold, Rejection, RoutingPolicy
from router.state import ClusterState, InstanceKey

BEHIND = Hold("requests that are due earlier wait", retry_after_s=1.0)
SPARE_DEADLINES = 64
"""So many more than twice the living are remembered before those of the ended are cleared away."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a generation may cost the gateway.

    Attributes:
        request_timeout_s: from its arrival to its end.
        max_attempts: so many may fail. One that failed is forgiven once `forgiven_by_tokens` more were delivered, so that a long
            stream outlives more deaths than a request that kills whoever takes it.
        max_concurrent: generations under way, held ones among them.
        max_held: arrivals that wait here because the policy says so.
        patience_s: how long one waits for an instance to come back once all that could serve it are gone, and how long it goes
            from one that turns it away to the next.
    """

    request_timeout_s: float = 600.0
    max_attempts: int = 3
    forgiven_by_tokens: int = 32
    max_concurrent: int = 4096
    max_held: int = 1024
    patience_s: float = 30.0


class LifeCycle:
    """All generations of a gateway. What a method returns is to be carried out, in order, before the next call.

    Args:
        policy: asked for every attempt.
        cluster: what the policy is shown; fed by heartbeats and by what is launched.
        journal: what happened to each generation.
    """

    def __init__(self, policy: RoutingPolicy, cluster: ClusterState, journal: Journal, limits: Limits) -> None:
        self.journal = journal
        self.cluster = cluster
        self._policy = policy
        self._limits = limits
        self._live: dict[str, Generation] = {}
        self._attempts: dict[str, Generation] = {}
        self._at: dict[InstanceKey, set[Generation]] = {}
        self._held: list[tuple[float, int, Generation]] = []
        self._deadlines: list[tuple[float, int, Generation]] = []
        self._newest_ticket = 0
        self._actions: list[Action] = []

    def __len__(self) -> int:
        return len(self._live)

    @property
    def max_concurrent(self) -> int:
        return self._limits.max_concurrent

    # --- events -------------------------------------------------------------------------------------------------------

    def admit(self, generations: int) -> None:
        """Raises Overloaded if so many more may not be under way."""
        if len(self._live) + generations > self._limits.max_concurrent:
            raise Overloaded(f"{len(self._live)} generations are in flight already", retry_after_s=1.0)

    def arrive(self, request: Request, now_s: float) -> tuple[Generation, list[Action]]:
        """A generation begins.

        Raises:
            Overloaded, Unavailable: the policy refuses it now, or has it held where nobody more may be. Nothing has changed.
        """
        generation = Generation(Entry(request), self._newest_ticket + 1, now_s + self._limits.request_timeout_s)
        found = self._policy.assign(generation.demand, self.cluster.snapshot(), NOBODY)
        if isinstance(found, Rejection) and not (self.cluster.snapshot().settling and found.retry_after_s is None):
            raise found.error()
        if isinstance(found, Assignment) and self._overtakes(generation):
            found = BEHIND
        if isinstance(found, Hold) and self._held_arrivals() >= self._limits.max_held:
            raise found.error()
        self._newest_ticket += 1
        self.journal.begin(generation.entry)
        self._live[generation.generation_id] = generation
        heapq.heappush(self._deadlines, (generation.expires_s, generation.ticket, generation))
        self._follow(generation, found, now_s)
        return generation, self._taken()

    def take(self, event: Event, now_s: float) -> list[Action]:
        """What the pump heard.

        Raises:
            ProtocolError: a heartbeat that says nonsense.
        """
        if isinstance(event, Heartbeat):
            self._heartbeat(event, now_s)
            return self._taken()
        generation = self._attempts.get(event.attempt)
        if generation is None:
            return []
        if isinstance(event, Fenced):
            del self._attempts[event.attempt]
            if generation.state is State.FENCING:
                self._place(generation, now_s)
        elif generation.attempt is not None and generation.attempt.attempt_id == event.attempt:
            if isinstance(event, Progress):
                self._progress(generation, generation.attempt, event.delta, now_s)
            else:
                self._failure(generation, generation.attempt, event, now_s)
        elif isinstance(event, Progress) and generation.state is State.FENCING:
            self._late(generation, event.delta, now_s)
        if generation.done:
            self._released(now_s)
        return self._taken()

    def unreachable(self, attempt_id: str, worker: InstanceKey, now_s: float) -> list[Action]:
        """A worker of the attempt takes no messages."""
        generation = self._attempts.get(attempt_id)
        if generation is not None and generation.attempt is not None and generation.attempt.attempt_id == attempt_id:
            self._fail_attempt(generation, WorkerLost(f"{worker[0]} takes no messages"), frozenset({worker}), now_s)
        return self._taken()

    def lose(self, key: InstanceKey, now_s: float) -> list[Action]:
        """Somebody who knows says that this incarnation is gone for good."""
        self.cluster.lose(key)
        self._lost(key, "was reported dead", now_s)
        return self._taken()

    def tick(self, now_s: float) -> list[Action]:
        """Time has passed: notice the dead, the stuck and the overdue; try those that are held. Call several times a second."""
        for key in self.cluster.sweep(now_s):
            self._lost(key, "fell silent or made no progress", now_s)
        while self._deadlines and self._deadlines[0][0] <= now_s:
            generation = heapq.heappop(self._deadlines)[2]
            if not generation.done:
                late = f"the request took longer than {self._limits.request_timeout_s:g} s"
                self._fail(generation, DeadlineExceeded(late), now_s)
        self._try_held(now_s, waiting=True)
        return self._taken()

    def cancel(self, generation: Generation, now_s: float) -> list[Action]:
        """The client no longer wants it."""
        if not generation.done:
            ran = generation.attempt is not None
            self._abandon(generation)
            self._end(generation, Outcome.CANCELLED, None, now_s)
            if ran:
                self._released(now_s)
        return self._taken()

    def fail(self, generation_id: str, error: HetServeError, now_s: float) -> list[Action]:
        """It cannot go on, for a reason of the caller's."""
        generation = self._live.get(generation_id)
        if generation is not None:
            self._fail(generation, error, now_s)
            self._released(now_s)
        return self._taken()

    def close(self, error: HetServeError, now_s: float) -> list[Action]:
        """Everything ends."""
        for generation in list(self._live.values()):
            self._fail(generation, error, now_s)
        return self._taken()

    def serving(self, attempt_id: str) -> str | None:
        """Which generation an attempt is of."""
        generation = self._attempts.get(attempt_id)
        return None if generation is None else generation.generation_id

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
            "held": len(self._held),
        }

    # --- what they mean -----------------------------------------------------------------------------------------------

    def _heartbeat(self, beat: Heartbeat, now_s: float) -> None:
        replaced = self.cluster.observe(beat, now_s)
        self._newest_ticket = max(self._newest_ticket, beat.load.newest_ticket)
        if replaced is not None:
            self._lost(replaced, "was restarted", now_s)

    def _progress(self, generation: Generation, attempt: Attempt, delta: Delta, now_s: float) -> None:
        self._record(generation, delta, now_s)
        if delta.tokens:
            attempt.heard.add(delta.worker)
            generation.refused_until_s = 0.0
        if delta.finish is not None:
            if delta.cut:
                self._abandon(generation)
            else:
                self._forget(generation)
                self._close(attempt)
            self._end(generation, Outcome.COMPLETED, None, now_s)

    def _late(self, generation: Generation, delta: Delta, now_s: float) -> None:
        """Of an attempt that is being fenced: what came before the fence counts, the end too."""
        self._record(generation, delta, now_s)
        if delta.finish is not None:
            self._end(generation, Outcome.COMPLETED, None, now_s)

    def _record(self, generation: Generation, delta: Delta, now_s: float) -> None:
        entry, gap_s = generation.entry, None
        if delta.tokens:
            before_s = entry.times.marks_s.get(Stage.LAST_TOKEN)
            gap_s = None if before_s is None else now_s - before_s
            entry.tokens.extend(delta.tokens)
            entry.times.token(now_s, len(delta.tokens))
        for key, report in delta.served:
            entry.served[key] = report
        if delta.finish is not None:
            entry.finish = delta.finish.value
        self._actions.append(Deliver(generation, delta, gap_s))

    def _failure(self, generation: Generation, attempt: Attempt, event: Failure, now_s: float) -> None:
        if event.worker is not None and not attempt.needs(event.worker):
            return
        error = from_wire(event.code, event.message)
        if type(error) is Unavailable and event.worker is not None and event.worker not in attempt.heard:
            self._refused(generation, event.worker, error, now_s)
            return
        avoid = attempt.keys if event.worker is None else frozenset({event.worker})
        prefill, decode = attempt.assignment.prefill, attempt.assignment.decode
        if isinstance(error, TransferError) and prefill is not None and event.worker is not None:
            # Whoever reports a broken transfer is alive to say so: suspect the other side first, then both.
            other = prefill.key if event.worker == decode.key else decode.key
            avoid = frozenset({other}) if generation.failures == 0 else attempt.keys
        self._fail_attempt(generation, error, avoid, now_s)

    def _refused(self, generation: Generation, worker: InstanceKey, error: Unavailable, now_s: float) -> None:
        """The worker takes no such work any more, and the gateway did not know yet."""
        self.cluster.refused(worker)
        generation.refused_until_s = generation.refused_until_s or now_s + self._limits.patience_s
        if now_s >= generation.refused_until_s:
            self._fail_attempt(generation, error, frozenset({worker}), now_s)
        else:
            self._move(generation, error)

    def _lost(self, key: InstanceKey, how: str, now_s: float) -> None:
        for generation in sorted(self._at.get(key, ()), key=lambda each: each.ticket):
            if generation.attempt is not None and generation.attempt.needs(key):
                self._fail_attempt(generation, WorkerLost(f"{key[0]} {how}"), frozenset({key}), now_s)

    # --- attempts -----------------------------------------------------------------------------------------------------

    def _place(self, generation: Generation, now_s: float) -> None:
        """Begin the next attempt if somebody can serve it. Where everybody left has failed it already, try those again."""
        try:
            found = self._policy.assign(generation.demand, self.cluster.snapshot(), generation.avoid)
            if isinstance(found, Rejection) and generation.avoid:
                found = self._policy.assign(generation.demand, self.cluster.snapshot(), NOBODY)
        except Exception as error:  # the policy's fault; it has no attempt and waits for nothing, so nobody else would end it
            failed = HetServeError("the gateway failed to try the request elsewhere")
            failed.__cause__ = error
            self._fail(generation, failed, now_s)
        else:
            self._follow(generation, found, now_s)

    def _follow(self, generation: Generation, found: Decision, now_s: float) -> None:
        if isinstance(found, Assignment):
            self._launch(generation, found, now_s)
        elif isinstance(found, Hold):
            generation.patience_until_s = 0.0
            self._hold(generation)
        else:
            generation.patience_until_s = generation.patience_until_s or now_s + self._limits.patience_s
            if now_s >= generation.patience_until_s:
                self._fail(generation, found.error(), now_s)
            else:
                self._hold(generation)

    def _launch(self, generation: Generation, assignment: Assignment, now_s: float) -> None:
        entry = generation.entry
        entry.assignments.append(assignment)
        entry.times.mark(Stage.ASSIGNED, now_s)
        attempt = Attempt(f"{generation.generation_id}-{len(entry.assignments)}", assignment)
        generation.state, generation.attempt, generation.patience_until_s = State.RUNNING, attempt, 0.0
        self._attempts[attempt.attempt_id] = generation
        for key in attempt.keys:
            self._at.setdefault(key, set()).add(generation)
        tokens = generation.demand.tokens
        if assignment.prefill is None:
            self.cluster.assigned(assignment.decode.key, now_s, tokens, 1, tokens)
        else:
            self.cluster.assigned(assignment.prefill.key, now_s, tokens, 1, 0)
            self.cluster.assigned(assignment.decode.key, now_s, 0, 1, tokens)
        self._actions.append(Launch(generation, attempt))

    def _fail_attempt(self, generation: Generation, error: HetServeError, avoid: frozenset[InstanceKey], now_s: float) -> None:
        delivered = len(generation.entry.tokens)
        if delivered - generation.failed_at_tokens >= self._limits.forgiven_by_tokens:
            generation.failures = 0
        generation.failures += 1
        generation.failed_at_tokens = delivered
        generation.avoid |= avoid
        may_retry = error.retryable or isinstance(error, Overloaded)
        error.exhausted = generation.failures >= self._limits.max_attempts
        if error.exhausted or not may_retry:
            self._fail(generation, error, now_s)
        else:
            self._move(generation, error)

    def _move(self, generation: Generation, error: HetServeError) -> None:
        """End the attempt because of `error`, and try again once it is fenced."""
        attempt = generation.attempt
        assert attempt is not None, "only a running attempt fails"
        self._forget(generation)
        generation.state = State.FENCING
        self._actions += (Stop(attempt), Fence(attempt, error))

    def _abandon(self, generation: Generation) -> None:
        """Nobody wants its attempt any more."""
        attempt = generation.attempt
        if attempt is not None:
            self._forget(generation)
            self._actions.append(Stop(attempt))
            self._close(attempt)

    def _forget(self, generation: Generation) -> None:
        attempt, generation.attempt = generation.attempt, None
        assert attempt is not None
        for key in attempt.keys:
            there = self._at[key]
            there.discard(generation)
            if not there:
                del self._at[key]

    def _close(self, attempt: Attempt) -> None:
        del self._attempts[attempt.attempt_id]
        self._actions.append(Close(attempt))

    # --- who is held --------------------------------------------------------------------------------------------------

    def _hold(self, generation: Generation) -> None:
        generation.state = State.HELD
        insort(self._held, (_due_s(generation), generation.ticket, generation))

    def _overtakes(self, generation: Generation) -> bool:
        """Whether the policy holds another one that is due earlier."""
        first = next((item for item in self._held if not item[2].patience_until_s), None)
        return first is not None and first[:2] < (_due_s(generation), generation.ticket)

    def _held_arrivals(self) -> int:
        """How many have never been tried because the policy says so."""
        return sum(not (held.patience_until_s or held.entry.assignments) for _, _, held in self._held)

    def _released(self, now_s: float) -> None:
        """There is room: try those whom the policy holds. It brings nobody back: who waits for that, and many may, is not asked
        about."""
        self._try_held(now_s, waiting=False)

    def _try_held(self, now_s: float, *, waiting: bool) -> None:
        """Those that are due first, until the policy holds one again; those who wait for somebody to come back only if `waiting`.
        These are in nobody's way, and whoever stands before them does not make them wait longer than their patience."""
        held, self._held = self._held, []
        stopped = False
        for item in held:
            generation = item[2]
            due = not stopped
            if generation.patience_until_s:
                due = waiting and (due or generation.patience_until_s <= now_s)
            if due:
                self._place(generation, now_s)
                stopped |= generation.state is State.HELD and not generation.patience_until_s
            else:
                self._held.append(item)

    # --- the end ------------------------------------------------------------------------------------------------------

    def _fail(self, generation: Generation, error: HetServeError, now_s: float) -> None:
        self._abandon(generation)
        self._end(generation, Outcome.FAILED, error, now_s)

    def _end(self, generation: Generation, outcome: Outcome, error: HetServeError | None, now_s: float) -> None:
        if generation.state is State.HELD:
            self._held = [item for item in self._held if item[2] is not generation]
        generation.state = State.ENDED
        del self._live[generation.generation_id]
        if len(self._deadlines) > 2 * len(self._live) + SPARE_DEADLINES:
            self._deadlines = [item for item in self._deadlines if not item[2].done]
            heapq.heapify(self._deadlines)
        self.journal.end(generation.entry, outcome, now_s, None if error is None else error.code)
        self._actions.append(End(generation, error))

    def _taken(self) -> list[Action]:
        actions, self._actions = self._actions, []
        return actions


def _due_s(generation: Generation) -> float:
    """By when it should be served: its first token's target, or if it has none, or had that token already, its deadline."""
    request = generation.entry.request
    if request.slo.ttft_s is None or generation.entry.tokens:
        return generation.expires_s
    return min(generation.expires_s, request.arrived_s + request.slo.ttft_s)
