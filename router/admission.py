"""Bounded queues: who may still be given work, and when to come back if nobody may.

The bound is per instance and in tokens as well as requests, because a queue of long prompts is a long queue.
An instance without a queue always takes one more, however long the prompt: otherwise a prompt above the bound would
starve forever.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from router.estimate import drain_s
from router.policy import Rejection
from router.state import Instance

MIN_RETRY_S = 1.0
MAX_RETRY_S = 30.0


@dataclass(frozen=True, slots=True)
class Admission:
    """Limits of one instance's queue: prompt tokens that wait, and sequences beyond those that run at once."""

    max_waiting_tokens: int
    max_waiting_requests: int = 1024

    def admits(self, instance: Instance, tokens: int) -> bool:
        """Whether `tokens` more may queue there."""
        waiting_tokens = instance.waiting_tokens
        if waiting_tokens and waiting_tokens + tokens > self.max_waiting_tokens:
            return False
        return instance.sequences < instance.beat.max_num_seqs + self.max_waiting_requests

    def refuse(self, instances: Iterable[Instance]) -> Rejection:
        """The refusal when all of `instances` are full: come back when the shortest queue should have drained."""
        shortest_s = min(drain_s(item) for item in instances)
        return Rejection("every queue is full", min(max(shortest_s, MIN_RETRY_S), MAX_RETRY_S))
