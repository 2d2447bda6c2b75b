"""Each in turn, whatever the load: the baseline that every other policy is measured against."""

from __future__ import annotations

from collections.abc import Sequence

from core.config import Role
from router.admission import Admission
from router.estimate import decode_step_s, drain_s
from router.policy import NOBODY, Assignment, Demand, Rejection, candidates, nobody
from router.state import Instance, InstanceKey, Snapshot


class RoundRobin:
    """Rotates over decode instances and, independently, over the prefill instances that can feed the chosen one."""

    def __init__(self, admission: Admission, local_prefill_tokens: int = 0) -> None:
        self._admission = admission
        self._local_prefill_tokens = local_prefill_tokens
        self._decode_turn = 0
        self._prefill_turn = 0

    def assign(self, demand: Demand, snapshot: Snapshot, avoid: frozenset[InstanceKey] = NOBODY) -> Assignment | Rejection:
        options = candidates(demand, snapshot, avoid, self._local_prefill_tokens)
        everyone = sorted({item.key: item for item in (*options.decode, *options.local)}.values(), key=lambda item: item.key)
        if not everyone:
            return nobody(demand, snapshot, avoid)
        tokens = demand.tokens
        decoders = [item for item in everyone if self._admission.admits(item, tokens)]
        if not decoders:
            return self._admission.refuse(everyone)
        decode = decoders[self._decode_turn % len(decoders)]
        prefillers = [] if decode.role is Role.MIXED else [item for item in options.prefill if item.kind == decode.kind]
        if not prefillers:
            self._decode_turn += 1
            ttft_s = drain_s(decode) + decode.beat.cost.prefill_s(tokens)
            return Assignment(None, decode, ttft_s, decode_step_s(decode, tokens), "round robin, local prefill")
        ready = sorted((item for item in prefillers if self._admission.admits(item, tokens)), key=lambda item: item.key)
        if not ready:
            return self._admission.refuse(prefillers)
        prefill = self._turn(ready)
        self._decode_turn += 1
        ttft_s = drain_s(prefill) + prefill.beat.cost.prefill_s(tokens)
        return Assignment(prefill, decode, ttft_s, decode_step_s(decode, tokens), "round robin")

    def _turn(self, ready: Sequence[Instance]) -> Instance:
        prefill = ready[self._prefill_turn % len(ready)]
        self._prefill_turn += 1
        return prefill
