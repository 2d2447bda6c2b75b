"""What one step does, as plain data: decided by the scheduler, laid out by the engine, carried out by a `ModelRunner`.

A plan is the whole interface between the two. It names sequences by *row*, a small number that stands for a sequence as long as
it is in the batch, and says only what changed since the last plan, so that it can be sent to every rank of a gang, and so that
a step can be laid out before the tokens of the last one are known. A runner keeps the rest for each row: its tokens, also
those that it drew itself, its block table, its penalty counts.

Invariants, of the plans of one engine in the order of their numbers:
- Of one plan, `dropped` comes first, then `admitted`, then `blocks`, then the computation: a row may be dropped and given to
  somebody else at once.
- A row is admitted with all its tokens known. Afterwards only the runner adds to them: one for each `Scheduled` that samples.
- A row has blocks for all that is scheduled of it.

Plans that carry changes, and a device that keeps the tokens that it drew, are what vLLM V1's and SGLang's overlapped
schedulers send.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows
from typing import Protocol

import msgspec

from core.layout import KVLayout
from core.sampling import SamplingParams
from engine.results import TokenLogprobs


class Scheduled(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Compute tokens `[start, start + count)` of a row; `samples` when that reaches its last token, so that one new token is
    drawn."""

    row: int
    start: int
    count: int
    samples: bool


class Admitted(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """From now on `row` is a sequence with these tokens, prompt and output; `prompt_tokens` of them are the prompt."""

    row: int
    tokens: tuple[int, ...]
    prompt_tokens: int
    sampling: SamplingParams


class BlocksAdded(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """`blocks` follow the first `at` of the row's block table for a group of layers. An admitted row begins with none.

    Nothing says what a window has left: no token that is scheduled from then on sees it, so a runner may keep what it was told.
    A row may be admitted with a table that begins further right, at `at`; what is to the left of that is never seen.
    """

    row: int
    at: int
    blocks: tuple[int, ...]
    group: int = 0


class StepPlan(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One step, at least one row of which is scheduled. `step` counts up by one from plan to plan of an engine."""

    step: int
    scheduled: tuple[Scheduled, ...]
    dropped: tuple[int, ...] = ()
    admitted: tuple[Admitted, ...] = ()
    blocks: tuple[BlocksAdded, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(item.count for item in self.scheduled)


class Drawn(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The token drawn for one sampling entry of a plan."""

    token: int
    logprobs: TokenLogprobs | None = None


class StepResult(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """`drawn[i]` belongs to the i-th entry of the plan that `samples`. `faults` maps plan indexes of entries whose result
    is unusable (for instance all logits not finite) to why; such entries are still in `drawn`, with a token of -1."""

    drawn: tuple[Drawn, ...]
    faults: dict[int, str]


LayerListener = Callable[[int], None]
"""Called with a layer's index as soon as that layer's new KV is written (on CUDA: enqueued on the current stream)."""


class Handle(Protocol):
    """A launched step."""

    @property
    def done(self) -> bool:
        """Whether `ModelRunner.collect` would return, or raise, at once."""


class ModelRunner(Protocol):
    """Runs steps of the model in the order of their launches.

    Not thread-safe, but for one thing: one thread may launch while another collects.
    """

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

    @property
    def steps_ahead(self) -> int:
        """How many further steps may be launched before the oldest is collected. 0 where nothing computes meanwhile."""

    def launch(self, plan: StepPlan, on_layer: LayerListener | None = None) -> Handle:
        """Begin to compute the plan's tokens, write their KV, and draw where asked.

        The changes to rows are made even if the computation fails; what it raises, it raises once nothing of the step reads or
        writes KV any more. `on_layer` is called before `collect` returns, by the
        thread that launches or the one that collects.
        """

    def collect(self, handle: Handle) -> StepResult:
        """Wait for a launched step, each once and in the order of their launches. When it returns, the device is done with the
        step: nothing of it reads or writes KV any more. Raises whatever broke the step."""


def trial_plan(tokens: Rows[tuple[int, ...]], width: int, groups: int, start: int = 0) -> StepPlan:
    """A plan of new rows that compute their tokens from `start` on and draw one, for checks of a runner by itself.

    Each has `width` blocks for each of `groups` groups of layers, in turns with the others, from block 0 on.
    """
    params = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.1, presence_penalty=0.1)  # what needs most memory
    numbers, stride = range(len(tokens)), len(tokens) * groups
    return StepPlan(
        0,
        tuple(Scheduled(row, start, len(own) - start, True) for row, own in zip(numbers, tokens, strict=True)),
        admitted=tuple(Admitted(row, own, len(own), params) for row, own in zip(numbers, tokens, strict=True)),
        blocks=tuple(
            BlocksAdded(row, 0, tuple(range(row * groups + group, width * stride, stride)), group)
            for row in numbers
            for group in range(groups)
        ),
    )
