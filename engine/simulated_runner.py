"""A model that takes the time a `CostModel` says and draws tokens that only look random.

The distribution of the next token is a function of all tokens so far, and the draw from it of `(those tokens, seed)`, so a
replay, a recomputation or a hand-off to another instance goes on exactly as the unfailed run. That is what lets the
cluster, its fault tests and the simulator run without weights. (Splitting the time of a step from its result is the idea of
Vidur's and DistServe's simulators.)

Its device is a timeline: a launched step begins when the step before it is over, and takes the time of its plan, whether
anybody waits for it or not. So with `steps_ahead` the host's work hides behind the device's, in real time and in virtual time.

It writes no KV; where KV must travel, it is paired with a store of plain bytes. Neighbours: `core.cost` has the arithmetic,
`engine.engine` calls.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

from core.clock import Clock, MonotonicClock
from core.cost import CostModel
from core.layout import KVLayout
from core.sampling import SamplingParams
from core.tokens import pack_tokens
from engine.plan import Admitted, Drawn, Handle, LayerListener, Scheduled, StepPlan, StepResult
from engine.results import TokenLogprobs

DIGEST_BYTES = 16


class _Digest(Protocol):
    def copy(self) -> _Digest: ...

    def update(self, data: bytes, /) -> None: ...

    def digest(self) -> bytes: ...


class SimulatedStep:
    """A launched step: drawn already, and over when its time has passed.

    Attributes:
        begins_s, done_at_s: when the device begins and ends it, by the runner's clock; without a clock `begins_s` is 0.
    """

    def __init__(
        self, result: StepResult, begins_s: float, length_s: float, clock: Clock | None, on_layer: LayerListener | None
    ) -> None:
        self.result = result
        self.begins_s = begins_s
        self.done_at_s = begins_s + length_s
        self.on_layer = on_layer
        self._clock = clock

    @property
    def done(self) -> bool:
        return self._clock is None or self._clock.now() >= self.done_at_s


@dataclass(slots=True)
class _Row:
    """A row's tokens, as far as draws depend on them."""

    digest: _Digest
    tokens: int
    prompt_tokens: int
    sampling: SamplingParams


class SimulatedRunner:
    """A `ModelRunner` without a model.

    The i-th most likely token has probability `2 ** -(i + 1)`; greedy sequences take the first, others draw a rank.
    Of the sampling parameters only `temperature` (greedy or not), `seed`, `min_tokens` and `logprobs` matter.

    Args:
        cost: time of a step, by its plan.
        sleep: lets that time pass; None takes none. Virtual time passes its own.
        eos_token_ids: what ends a generation; drawn only if `eos_chance`, the probability at each token, is not 0.
        clock: what `sleep` advances, and what the device's timeline is on. By default the process's monotonic clock if `sleep`
            is the process's own, else none: then every step takes its whole time when it is collected.
        steps_ahead: see `ModelRunner`.
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
        steps_ahead: int = 0,
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
        self._steps_ahead = steps_ahead
        self._busy_until_s = -math.inf
        self._rows: dict[int, _Row] = {}

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

    @property
    def steps_ahead(self) -> int:
        return self._steps_ahead

    def launch(self, plan: StepPlan, on_layer: LayerListener | None = None) -> SimulatedStep:
        for number in plan.dropped:
            del self._rows[number]
        for admitted in plan.admitted:
            self._rows[admitted.row] = _read(admitted)
        result = StepResult(tuple(self._draw(self._rows[item.row]) for item in plan.scheduled if item.samples), {})
        length_s = self.step_s(plan) if self._sleep is not None else 0.0
        begins_s = max(self._clock.now(), self._busy_until_s) if self._clock is not None else 0.0
        step = SimulatedStep(result, begins_s, length_s, self._clock, on_layer)
        self._busy_until_s = step.done_at_s
        return step

    def collect(self, handle: Handle) -> StepResult:
        """Tell the listener of each layer at its time, oversleeping after one made up for after the next; then the result."""
        if not isinstance(handle, SimulatedStep):
            raise TypeError(f"Got a {type(handle).__name__} but expected a step that was launched here")
        layers = len(self._layout.layers) if handle.on_layer is not None else 1
        for layer in range(layers):
            self._wait(handle, (layer + 1) / layers, 1 / layers)
            if handle.on_layer is not None:
                handle.on_layer(layer)
        return handle.result

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

    def _wait(self, step: SimulatedStep, until: float, portion: float) -> None:
        """Until that share of the step is over; without a clock, for that portion of it."""
        length_s = step.done_at_s - step.begins_s
        left_s = length_s * portion if self._clock is None else step.begins_s + length_s * until - self._clock.now()
        if self._sleep is not None and left_s > 0:
            self._sleep(left_s)

    def _draw(self, row: _Row) -> Drawn:
        """The next token of a row, all of whose tokens are computed. From now on it is one of them."""
        drawn = self._drawn(row.digest.copy().digest(), row.tokens - row.prompt_tokens, row.sampling)
        row.digest.update(drawn.token.to_bytes(4, "little"))
        row.tokens += 1
        return drawn

    def _drawn(self, context: bytes, output_tokens: int, sampling: SamplingParams) -> Drawn:
        first = int.from_bytes(context[:8], "little")
        chance = blake2b(context, digest_size=DIGEST_BYTES, key=sampling.seed.to_bytes(8, "little")).digest()
        must_go_on = output_tokens < sampling.min_tokens
        if not must_go_on and self._eos_chance > 0 and int.from_bytes(chance[8:], "little") < self._eos_chance * 2**64:
            top = [self._eos_sorted[first % len(self._eos_sorted)], *self._ranked(first, (sampling.logprobs or 1) - 1)]
            return Drawn(top[0], _logprobs(0, top, sampling.logprobs))
        rank = 0 if sampling.temperature == 0 else _trailing_zeros(int.from_bytes(chance[:8], "little"))
        if must_go_on and sampling.stop_token_ids:
            rank = self._first_allowed(first, rank, frozenset(sampling.stop_token_ids))
        rank %= self._ordinary
        top = self._ranked(first, sampling.logprobs or 0)
        return Drawn(self._token(first, rank), _logprobs(rank, top, sampling.logprobs))

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


def _read(admitted: Admitted) -> _Row:
    digest: _Digest = blake2b(pack_tokens(admitted.tokens), digest_size=DIGEST_BYTES, person=b"hetserve-sim")
    return _Row(digest, len(admitted.tokens), admitted.prompt_tokens, admitted.sampling)


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
