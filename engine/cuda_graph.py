"""Decode steps recorded once and replayed: one launch in place of the hundreds that a forward pass makes one by one.

A step in which every sequence computes one token and samples has shapes that depend on the number of sequences alone. So one
graph is recorded per *bucket* of that number, largest first, over memory that never moves; a step copies three integers a
sequence there (its row, its position, and its token where the device did not draw it itself), padded to the next bucket, replays,
and reads its logits from a buffer. Block tables stay on the device from step to step, and only what changes of them is copied.
Sampling stays outside. Prefill and mixed steps, and decode steps beyond the largest bucket, are not taken and run eagerly.

Invariants:
- A padding row computes token 0 at position 0, writes its KV into the scratch block that no sequence owns, and attends to
  that one token. No entry of its block tables, and none past a sequence's own blocks, names a block of anybody else. Left of
  what a sequence's window sees some may: no kernel lets what is there count.
- Inside a graph every host integer is the largest that can occur: the width of block tables, `max_context_len`.
- Logits are valid until the next step: all buckets share their memory.

Graphs in buckets over static buffers are what vLLM, SGLang and nano-vllm do; the memory pool that graphs share is PyTorch's.

Neighbours: `engine.runner_rows` has what is known of rows, `engine.torch_runner` supplies the forward pass and decides who may
be recorded.

What has run where: all but `CudaRecorder` runs in tests on CPUs, through whole engines, with recorders that call the step
again or repeat it tensor operation by tensor operation. `CudaRecorder`, and the CUDA attention backends inside a graph, have
not run yet: they were written without a GPU at hand, and `tests/gpu/test_cuda_graph.py` waits for one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from engine.attention.base import AttentionBatch
from engine.batch import StepBatch
from engine.plan import StepPlan
from engine.runner_rows import RunnerRows, to_device

MAX_BUCKET = 512
"""Larger batches keep the device busy without help."""

_WARM_UPS = 2
_ROW_INTS = 3

Replay = Callable[[], None]
Forward = Callable[[StepBatch], torch.Tensor]
"""The model's logits `[T, vocab]` for every token of a batch."""


class Recorder(Protocol):
    """Makes device work repeatable."""

    def record(self, step: Callable[[], None]) -> Replay:
        """Record what `step` enqueues on the device; the replay enqueues the same on the current stream.

        `step` is called at least once, and must do the same each time, at the same addresses.

        Raises:
            RuntimeError: it did something that cannot be recorded, such as waiting for the device, or memory ran out.
        """


class CudaRecorder:
    """Records CUDA graphs, all in one memory pool: they must be replayed one at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, step: Callable[[], None]) -> Replay:
        """See `Recorder`. Other threads of the process may go on using the device meanwhile."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            outside = torch.cuda.current_stream()
            self._stream.wait_stream(outside)
            # Also gives the thread its stream back when a recording breaks, which torch.cuda.graph does not.
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):  # kernels are loaded and workspaces allocated outside the graph
                    step()
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    step()
            outside.wait_stream(self._stream)
        return graph.replay


def batch_buckets(max_num_seqs: int) -> tuple[int, ...]:
    """1, 2, 4, then every 8, from 256 every 16, up to `max_num_seqs` or `MAX_BUCKET`, which is the last."""
    largest = min(max_num_seqs, MAX_BUCKET)
    steps = [1, 2, 4, *range(8, 256, 8), *range(256, MAX_BUCKET, 16)]
    return (*(size for size in steps if size < largest), largest)


@dataclass(frozen=True)
class Limits:
    """The largest of everything inside a graph.

    Attributes:
        batch: sequences in a step.
        rows: rows that there may be. The one after them is that of padding.
        table_width: blocks of a sequence.
        context_len: tokens of a sequence.
        block_size: tokens of a block.
        scratch_block: where padding writes.
        groups: block tables of a row.
    """

    batch: int
    rows: int
    table_width: int
    context_len: int
    block_size: int
    scratch_block: int
    groups: int = 1


class StaticInputs:
    """A step's integers at fixed addresses, and the block tables of all rows.

    A bucket of `b` uses the first `3 * b` of the integers: tokens (-1 where `drawn` has it), positions, rows.

    Args:
        drawn: int64 `[rows + 1]`, the token drawn last for each row; see `RunnerRows`.
    """

    def __init__(self, limits: Limits, device: torch.device, drawn: torch.Tensor) -> None:
        self._limits = limits
        self._device = device
        self.drawn = drawn
        self._ints = torch.zeros(limits.batch * _ROW_INTS, dtype=torch.int32, device=device)
        shape = limits.groups, limits.rows + 1, limits.table_width
        self._tables = torch.full(shape, limits.scratch_block, dtype=torch.int32, device=device)
        self._query_start = torch.arange(limits.batch + 1, dtype=torch.int32, device=device)
        self._sample_rows = torch.arange(limits.batch, device=device)

    def batch(self, bucket: int) -> StepBatch:
        """What the model reads. To be called inside a recording: it looks up tables and drawn tokens."""
        tokens, positions, rows = self._ints[: _ROW_INTS * bucket].view(_ROW_INTS, bucket)
        rows, places, size = rows.long(), positions.long(), self._limits.block_size
        ids = torch.where(tokens < 0, self.drawn.index_select(0, rows), tokens.long())
        index, offsets, context_lens = places.div(size, rounding_mode="floor")[:, None], places.remainder(size), positions + 1
        attention = []
        for group in range(self._limits.groups):
            tables = self._tables[group].index_select(0, rows)
            attention.append(
                AttentionBatch(
                    query_start=self._query_start[: bucket + 1],
                    context_lens=context_lens,
                    block_tables=tables,
                    slots=tables.gather(1, index)[:, 0].long() * size + offsets,
                    max_query_len=1,
                    max_context_len=self._limits.context_len,
                )
            )
        return StepBatch(ids[None], places[None], tuple(attention), self._sample_rows[:bucket])

    def load(self, bucket: int, step: npt.NDArray[np.int32] | None = None) -> None:
        """Copy the integers `[3, n]` of up to `bucket` sequences in, and padding for the rest; None is all padding."""
        host = torch.empty((_ROW_INTS, bucket), dtype=torch.int32, pin_memory=self._device.type == "cuda")
        ints, live = host.numpy(), 0
        if step is not None:
            live = step.shape[1]
            ints[:, :live] = step
        ints[:, live:] = np.array([[0], [0], [self._limits.rows]])
        self._ints[: host.numel()].copy_(host.view(-1), non_blocking=True)

    def follow(self, plan: StepPlan) -> None:
        """Make a plan's changes to block tables, and no others."""
        limits = self._limits
        fresh = [admitted.row for admitted in plan.admitted if admitted.row < limits.rows]
        places: list[int] = []
        blocks: list[int] = []
        for added in plan.blocks:
            own = added.blocks[: max(0, limits.table_width - added.at)] if added.row < limits.rows else ()
            first = (added.group * (limits.rows + 1) + added.row) * limits.table_width + added.at
            places.extend(range(first, first + len(own)))
            blocks.extend(own)
        if not fresh and not places:
            return
        changes = [np.array(part, dtype=np.int32) for part in (fresh, places, blocks)]
        rows, where, what = to_device(changes, self._device)
        self._tables.index_fill_(1, rows.long(), limits.scratch_block)
        self._tables.view(-1).index_copy_(0, where.long(), what)


class RecordedDecode:
    """Decode steps of one engine, recorded for every bucket on construction.

    Args:
        forward: the model over a cache that has the scratch block. Runs once per recording and never in a step.
        rows: the runner's own. Room is made in it for `limits.rows`.

    Raises:
        RuntimeError: see `Recorder.record`.
    """

    def __init__(self, forward: Forward, rows: RunnerRows, limits: Limits, device: torch.device, recorder: Recorder) -> None:
        rows.reserve(limits.rows + 1)
        self._rows = rows
        self._limits = limits
        self.buckets = batch_buckets(limits.batch)
        self._inputs = StaticInputs(limits, device, rows.drawn)
        self._inputs.load(1)
        sample = forward(self._inputs.batch(1))
        self._logits = sample.new_empty((limits.batch, sample.shape[1]))
        self._replays: dict[int, Replay] = {}
        for bucket in reversed(self.buckets):  # the memory of a large one serves the smaller ones
            self._inputs.load(bucket)
            self._replays[bucket] = recorder.record(self._step(forward, bucket))

    def bucket_for(self, plan: StepPlan) -> int | None:
        """The bucket that the plan is padded to, None if it is not one that was recorded."""
        scheduled, limits = plan.scheduled, self._limits
        if len(scheduled) > limits.batch or self._rows.drawn is not self._inputs.drawn:
            return None
        if not all(item.count == 1 and item.samples and item.row < limits.rows for item in scheduled):
            return None
        rows = [item.row for item in scheduled]
        if any(widths[rows].max() > limits.table_width for widths in self._rows.widths):
            return None
        return next(bucket for bucket in self.buckets if bucket >= len(scheduled))

    def follow(self, plan: StepPlan) -> None:
        """Take a plan's changes in. To be called with every plan, also those that are not replayed."""
        self._inputs.follow(plan)

    def logits(self, plan: StepPlan) -> torch.Tensor | None:
        """Replay a plan whose changes are made already: `[n, vocab]` for its `n` sequences, valid until the next step. None if it
        is not one to replay."""
        bucket = self.bucket_for(plan)
        if bucket is None:
            return None
        self._inputs.load(bucket, self._integers(plan))
        self._replays[bucket]()
        return self._logits[: len(plan.scheduled)]

    def _integers(self, plan: StepPlan) -> npt.NDArray[np.int32]:
        integers = np.empty((_ROW_INTS, len(plan.scheduled)), dtype=np.int32)
        integers[1] = [item.start for item in plan.scheduled]
        integers[2] = [item.row for item in plan.scheduled]
        integers[0] = self._rows.known_at(integers[2], integers[1])
        return integers

    def _step(self, forward: Forward, bucket: int) -> Callable[[], None]:
        inputs, logits = self._inputs, self._logits[:bucket]

        def step() -> None:
            logits.copy_(forward(inputs.batch(bucket)))

        return step
