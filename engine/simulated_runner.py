"""A model that takes the time a `CostModel` says and draws tokens that only look random.

The distribution of the next token is a function of all tokens so far, and the draw from it of `(those tokens, seed)`, so a
replay, a recomputation or a hand-off to another instance goes on exactly as the unfailed run. That is what lets the
cluster, its fault tests and the simulator run without weights. (Splitting the time of a step from its result is the idea of
Vidur's and DistServe's simulators.)

It writes no KV; where KV must travel, it is paired with a store of plain bytes. Neighbours: `core.cost` has the arithmetic,
`engine.engine` calls.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from hashlib import blake2b
from typing import Protocol
from weakref import WeakKeyDictionary

from core.clock import Clock, MonotonicClock
from core.cost import CostModel
from core.layout import KVLayout
from core.tokens import pack_tokens
from engine.plan import Drawn, LayerListener, Scheduled, StepPlan, StepResult
from engine.results import TokenLogprobs
from engine.sequence import Sequence

DIGEST_BYTES = 16


class _Digest(Protocol):
    def copy(self) -> _Digest: ...

    def update(self, data: bytes, /) -> None: ...

    def digest(self) -> bytes: ...


class SimulatedRunner:
    """A `ModelRunner` without a model.

    The i-th most likely token has probability `2 ** -(i + 1)`; greedy sequences take the first, others draw a rank.
    Of the sampling parameters only `temperature` (greedy or not), `seed`, `min_tokens` and `logprobs` matter.

    Args:
        cost: time of a step, by its plan.
        sleep: lets that time pass; None takes none. Virtual time passes its own.
        eos_token_ids: what ends a generation; drawn only if `eos_chance`, the probability at each token, is not 0.
        clock: what `sleep` advances. With it, oversleeping after one layer is made up for after the next. By default the
            process's monotonic clock if `sleep` is the process's own, else none.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        max_model_len: int,
        vocab_size: int,
        cost: CostModel,
        sleep: Callable[[float], None] | None = time.sleep,
        eos_token_ids: frozenset[int] = frozenset(),
        *,
        eos_chance: float = 0.0,
        clock: Clock | None = None,
    ) -> None:
        if not all(0 <= token < vocab_size for token in eos_token_ids) or len(eos_token_ids) >= vocab_size:
            raise ValueError(f"Got {eos_token_ids = } but expected some, not all, of a vocabulary of {vocab_size}")
        if not 0 <= eos_chance <= 1 or (eos_chance > 0 and not eos_token_ids):
            raise ValueError(f"Got {eos_chance = }, {len(eos_token_ids)} eos tokens but expected a chance in [0, 1] of some")
        self._layout = layout
        self._num_blocks = num_blocks
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._cost = cost
        self._sleep = sleep
        self._eos_token_ids = eos_token_ids
        self._eos_sorted = sorted(eos_token_ids)
        self._ordinary = vocab_size - len(eos_token_ids)
        self._eos_chance = eos_chance
        self._clock = MonotonicClock() if clock is None and sleep is time.sleep else clock
        self._read: WeakKeyDictionary[Sequence, tuple[int, _Digest]] = WeakKeyDictionary()

    @property
    def layout(self) -> KVLayout:
        return self._layout

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self._eos_token_ids

    def run(self, plan: StepPlan, on_layer: LayerListener | None = None) -> StepResult:
        self._pass_time(self.step_s(plan), on_layer)
        return StepResult(tuple(self._draw(item.sequence) for item in plan.scheduled if item.samples), {})

    def step_s(self, plan: StepPlan) -> float:
        """Seconds that the cost model gives a plan."""
        prefill: list[tuple[int, int]] = []
        batch = context_tokens = 0
        for item in plan.scheduled:
            if _decodes(item):
                batch += 1
                context_tokens += item.start + 1
            else:
                prefill.append((item.count, item.start))
        return self._cost.mixed_s(prefill, batch, context_tokens)

    def _pass_time(self, total_s: float, on_layer: LayerListener | None) -> None:
        if on_layer is None:
            self._wait(total_s)
            return
        layers = len(self._layout.layers)
        begun_s = self._clock.now() if self._clock is not None else 0.0
        for layer in range(layers):
            if self._clock is None:
                self._wait(total_s / layers)
            else:
                self._wait(begun_s + total_s * (layer + 1) / layers - self._clock.now())
            on_layer(layer)

    def _wait(self, seconds: float) -> None:
        if self._sleep is not None and seconds > 0:
            self._sleep(seconds)

    def _draw(self, sequence: Sequence) -> Drawn:
        """The next token of a sequence, all of whose tokens are computed."""
        sampling = sequence.sampling
        context = self._digest(sequence)
        first = int.from_bytes(context[:8], "little")
        chance = blake2b(context, digest_size=DIGEST_BYTES, key=sampling.seed.to_bytes(8, "little")).digest()
        must_go_on = sequence.output_tokens < sampling.min_tokens
        if not must_go_on and self._eos_chance > 0 and int.from_bytes(chance[8:], "little") < self._eos_chance * 2**64:
            top = [self._eos_sorted[first % len(self._eos_sorted)], *self._ranked(first, (sampling.logprobs or 1) - 1)]
            return Drawn(top[0], _logprobs(0, top, sampling.logprobs))
        rank = 0 if sampling.temperature == 0 else _trailing_zeros(int.from_bytes(chance[:8], "little"))
        if must_go_on and sampling.stop_token_ids:
            rank = self._first_allowed(first, rank, frozenset(sampling.stop_token_ids))
        rank %= self._ordinary
        top = self._ranked(first, sampling.logprobs or 0)
        return Drawn(self._token(first, rank), _logprobs(rank, top, sampling.logprobs))

    def _digest(self, sequence: Sequence) -> bytes:
        """Digest of all tokens, by reading only those that came since the last call."""
        count, digest = self._read.get(sequence, (0, None))
        if digest is None or count > len(sequence.tokens):
            count, digest = 0, blake2b(digest_size=DIGEST_BYTES, person=b"hetserve-sim")
        digest.update(pack_tokens(sequence.tokens[count:]))
        self._read[sequence] = (len(sequence.tokens), digest)
        return digest.copy().digest()

    def _token(self, first: int, rank: int) -> int:
        """The token of a rank: the vocabulary without its ends of sequence, read around from `first`."""
        token = (first + rank) % self._ordinary
        for eos in self._eos_sorted:
            token += token >= eos
        return token

    def _ranked(self, first: int, count: int) -> list[int]:
        return [self._token(first, rank) for rank in range(min(count, self._ordinary))]

    def _first_allowed(self, first: int, rank: int, banned: frozenset[int]) -> int:
        """The best rank, from `rank` on, of a token that is not banned; `rank` itself if all are."""
        ranks = range(rank, rank + len(banned) + 1)
        return next((other for other in ranks if self._token(first, other) not in banned), rank)


def _decodes(item: Scheduled) -> bool:
    return item.samples and item.count == 1 and item.start > 0


def _logprobs(rank: int, top: list[int], wanted: int | None) -> TokenLogprobs | None:
    if wanted is None:
        return None
    ranked = tuple((token, _logprob(place)) for place, token in enumerate(top[:wanted]))
    return TokenLogprobs(_logprob(rank), ranked)


def _logprob(rank: int) -> float:
    return -(rank + 1) * math.log(2)


def _trailing_zeros(number: int) -> int:
    """Geometric for uniform numbers: n with probability `2 ** -(n + 1)`."""
    return (number & -number).bit_length() - 1 if number else 63
