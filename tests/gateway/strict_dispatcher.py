"""Carries out what a life cycle decides as the real dispatcher does, and refuses what that one could not carry out."""

from __future__ import annotations

from dataclasses import dataclass, field

from core.errors import HetServeError
from core.messages import Address
from core.tokens import unpack_tokens
from gateway.serving.actions import Action, Close, Deliver, End, Fence, Launch, Stop
from gateway.serving.generation import Attempt, Generation, submits
from gateway.serving.lifecycle import LifeCycle
from router.state import InstanceKey

GATEWAY = Address("gateway", 1, "tcp://gateway")


@dataclass(eq=False)
class Client:
    """What one generation's client has seen."""

    generation: Generation
    tokens: list[int] = field(default_factory=list)
    gaps_s: list[float | None] = field(default_factory=list)
    ended: bool = False
    error: HetServeError | None = None


class StrictDispatcher:
    """`launched` holds every attempt there ever was, and of which generation; `open` ones are listened to, `fencing` ones are to
    be answered with `Fenced`. A Submit to one of `unreachable` cannot be sent."""

    def __init__(self, life: LifeCycle) -> None:
        self.life = life
        self.clients: dict[str, Client] = {}
        self.launched: dict[str, tuple[Generation, Attempt]] = {}
        self.open: set[str] = set()
        self.fencing: dict[str, HetServeError] = {}
        self.stopped: set[str] = set()
        self.unreachable: set[InstanceKey] = set()
        self.log: list[str] = []

    def begin(self, generation: Generation) -> None:
        assert generation.generation_id not in self.clients
        self.clients[generation.generation_id] = Client(generation)

    def do(self, actions: list[Action], now_s: float) -> None:
        for action in actions:
            match action:
                case Launch(generation, attempt):
                    self.log.append(f"launch {attempt.attempt_id}")
                    self._launch(generation, attempt, now_s)
                case Stop(attempt):
                    self.log.append(f"stop {attempt.attempt_id}")
                    assert attempt.attempt_id in self.open, "only what is under way can be stopped"
                    assert attempt.attempt_id not in self.stopped, "stopped twice"
                    self.stopped.add(attempt.attempt_id)
                case Fence(attempt, error):
                    self.log.append(f"fence {attempt.attempt_id}")
                    self.open.remove(attempt.attempt_id)
                    self.fencing[attempt.attempt_id] = error
                case Close(attempt):
                    self.log.append(f"close {attempt.attempt_id}")
                    self.open.remove(attempt.attempt_id)
                case Deliver(generation, delta, gap_s):
                    client = self.clients[generation.generation_id]
                    assert not client.ended, "a delta after the end"
                    client.tokens += delta.tokens
                    client.gaps_s += [gap_s] if delta.tokens else []
                case End(generation, error):
                    self.log.append(f"end {generation.generation_id}")
                    client = self.clients[generation.generation_id]
                    assert not client.ended, "ended twice"
                    client.ended, client.error = True, error
                case _:
                    raise AssertionError(action)

    def _launch(self, generation: Generation, attempt: Attempt, now_s: float) -> None:
        client = self.clients[generation.generation_id]
        assert not client.ended, "an attempt after the end"
        assert attempt.attempt_id not in self.launched, "an attempt id was used twice"
        of_this = [each for each, (owner, _) in self.launched.items() if owner is generation]
        assert not any(each in self.open or each in self.fencing for each in of_this), "the last attempt is not fenced yet"
        self.launched[attempt.attempt_id] = generation, attempt
        self.open.add(attempt.attempt_id)
        for worker, submit in submits(generation, attempt, GATEWAY, now_s):
            assert unpack_tokens(submit.tokens) == [*generation.entry.request.prompt, *client.tokens]
            assert (submit.attempt, submit.ticket) == (attempt.attempt_id, generation.ticket)
            assert 0 < submit.deadline_s <= max(generation.expires_s - now_s, 1e-3)
            key = worker.name, worker.incarnation
            if key in self.unreachable:
                self.do(self.life.unreachable(attempt.attempt_id, key, now_s), now_s)
                return
