"""Least expected time to a running decode, over every (prefill, decode) pair and every local option.

A pair costs `drain(p) + prefill(p) + transfer(p) + wait(d)`: a sum of one term that depends on `p` alone and one that
depends on `d` alone. So within one kind the best pair is the best `p` with the best `d`, and a decision looks at each
instance once instead of at each pair. Ties go to the smaller load, then to the name.

The reported `ttft_s` leaves the transfer out, because the first token goes to the client straight from the prefill
instance; the choice keeps it in, because the second token does not.
"""

from __future__ import annotations

from collections.abc import Iterable

from router.admission import Admission
from router.estimate import decode_step_s, drain_s, slot_wait_s
from router.policy import NOBODY, Assignment, Demand, Rejection, candidates, nobody
from router.state import Instance, InstanceKey, Snapshot

Score = tuple[float, float, int, str]
"""Seconds, seconds per token, load, name: compared in this order."""


class LeastTTFT:
    def __init__(self, admission: Admission, local_prefill_tokens: int = 0) -> None:
        self._admission = admission
        self._local_prefill_tokens = local_prefill_tokens

    def assign(self, demand: Demand, snapshot: Snapshot, avoid: frozenset[InstanceKey] = NOBODY) -> Assignment | Rejection:
        options = candidates(demand, snapshot, avoid, self._local_prefill_tokens)
        if not options.decode and not options.local:
            return nobody(demand, snapshot, avoid)
        tokens = demand.tokens
        prefill = self._best_prefill(options.prefill, tokens)
        decode = self._best_decode(options.decode, tokens)
        choices: list[tuple[Score, Assignment]] = [
            self._pair(prefill[kind], decode[kind], tokens)
            for kind in decode
            if kind in prefill and prefill[kind][1] is not decode[kind][1]  # a mixed instance alone is a local option
        ]
        local = self._best_local(options.local, tokens)
        if local is not None:
            choices.append(local)
        if not choices:
            return self._admission.refuse([*options.prefill, *options.decode, *options.local])
        return min(choices, key=lambda choice: choice[0])[1]

    def _best_prefill(self, instances: Iterable[Instance], tokens: int) -> dict[int, tuple[Score, Instance]]:
        best: dict[int, tuple[Score, Instance]] = {}
        for item in instances:
            if not self._admission.admits(item, tokens):
                continue
            cost = item.beat.cost
            seconds = drain_s(item) + cost.prefill_s(tokens) + cost.transfer_s(tokens * item.kv_bytes_per_token)
            known = best.get(item.kind)
            if known is None or seconds <= known[0][0]:
                score = (seconds, 0.0, item.sequences, item.name)
                if known is None or score < known[0]:
                    best[item.kind] = (score, item)
        return best

    def _best_decode(self, instances: Iterable[Instance], tokens: int) -> dict[int, tuple[Score, Instance]]:
        best: dict[int, tuple[Score, Instance]] = {}
        for item in instances:
            if not self._admission.admits(item, tokens):
                continue
            tpot_s = decode_step_s(item, tokens)
            score = (slot_wait_s(item, tokens, tpot_s), tpot_s, item.sequences, item.name)
            if item.kind not in best or score < best[item.kind][0]:
                best[item.kind] = (score, item)
        return best

    def _best_local(self, instances: Iterable[Instance], tokens: int) -> tuple[Score, Assignment] | None:
        best: tuple[Score, Instance] | None = None
        for item in instances:
            if not self._admission.admits(item, tokens):
                continue
            tpot_s = decode_step_s(item, tokens)
            seconds = drain_s(item) + item.beat.cost.prefill_s(tokens) + slot_wait_s(item, tokens, tpot_s)
            if item.beat.load.running:
                seconds += tpot_s / 2  # the step that is under way
            score = (seconds, tpot_s, item.sequences, item.name)
            if best is None or score < best[0]:
                best = (score, item)
        if best is None:
            return None
        score, item = best
        why = f"least expected TTFT: local on {item.name}, {score[0] * 1e3:.1f} ms"
        return score, Assignment(None, item, score[0], score[1], why)

    def _pair(self, prefill: tuple[Score, Instance], decode: tuple[Score, Instance], tokens: int) -> tuple[Score, Assignment]:
        p, d = prefill[1], decode[1]
        seconds = prefill[0][0] + decode[0][0]
        transfer_s = p.beat.cost.transfer_s(tokens * p.kv_bytes_per_token)
        ttft_s = prefill[0][0] - transfer_s
        why = (
            f"least expected TTFT: prefill on {p.name} {ttft_s * 1e3:.1f} ms, transfer {transfer_s * 1e3:.1f} ms, "
            f"wait on {d.name} {decode[0][0] * 1e3:.1f} ms"
        )
        score = (seconds, decode[0][1], p.sequences + d.sequences, p.name)
        return score, Assignment(p, d, ttft_s, decode[0][1], why)
