"""What the pump tells of attempts, in the order in which it heard it. Heartbeats come between them as they are."""

from __future__ import annotations

from dataclasses import dataclass

from core.messages import Heartbeat
from gateway.text.token_reader import Delta
from router.state import InstanceKey


@dataclass(frozen=True, slots=True)
class Progress:
    attempt: str
    delta: Delta


@dataclass(frozen=True, slots=True)
class Failure:
    """An attempt is over: a worker said so, or (`worker` None) its stream cannot go on."""

    attempt: str
    worker: InstanceKey | None
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Fenced:
    """Nothing more of the attempt will come."""

    attempt: str


Event = Progress | Failure | Fenced | Heartbeat
