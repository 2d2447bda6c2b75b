"""What one step does: decided by the scheduler, carried out by a `ModelRunner`.

A plan is the whole interface between the two: the scheduler knows no tensors, the runner knows no queues.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from core.layout import KVLayout
from engine.results import TokenLogprobs
from engine.sequence import Sequence


@dataclass(frozen=True)
class Scheduled:
    """Compute tokens `[start, start + count)` of a sequence; `samples` when that reaches its last token, so that one new
    token is drawn. `sequence.blocks` already has room."""

    sequence: Sequence
    start: int
    count: int
    samples: bool


@dataclass(frozen=True)
class StepPlan:
    """Never empty. `preempted` sequences lost their blocks to make room and wait again."""

    scheduled: tuple[Scheduled, ...]
    preempted: tuple[Sequence, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(item.count for item in self.scheduled)


@dataclass(frozen=True)
class Drawn:
    """The token drawn for one sampling entry of a plan."""

    token: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class StepResult:
    """`drawn[i]` belongs to the i-th entry of the plan that `samples`. `faults` maps plan indexes of entries whose result
    is unusable (for instance all logits not finite) to why; such entries are still in `drawn`, with a token of -1."""

    drawn: tuple[Drawn, ...]
    faults: dict[int, str]


LayerListener = Callable[[int], None]
"""Called with a layer's index as soon as that layer's new KV is written (on CUDA: enqueued on the current stream)."""


class ModelRunner(Protocol):
    """Runs one step of the model. Not thread-safe: one thread steps an engine."""

    @property
    def layout(self) -> KVLayout: ...

    @property
    def num_blocks(self) -> int: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_token_ids(self) -> frozenset[int]: ...

    def run(self, plan: StepPlan, on_layer: LayerListener | None = None) -> StepResult:
        """Compute the plan's tokens, write their KV, draw where asked."""
