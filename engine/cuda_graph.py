"""Decode steps recorded once and replayed: one launch in place of the hundreds that a forward pass makes one by one.

A step in which every sequence computes one token and samples has shapes that depend on the number of sequences alone. So one
graph is recorded per *bucket* of that number, largest first, over memory that never moves; a step copies its integers there
in one piece, padded to the next bucket, replays, and reads its logits from a buffer. Sampling stays outside. Prefill and
mixed steps, and decode steps beyond the largest bucket, are not taken and run eagerly.

Invariants:
- A padding row computes token 0 at position 0, writes its KV into the scratch block that no sequence owns, and attends to
  that one token. No entry of its block table, and none past a sequence's own blocks, names a block of anybody else.
- Inside a graph every host integer is the largest that can occur: the width of block tables, `max_context_len`.
- Logits are valid until the next step: all buckets share their memory.

Graphs in buckets over static buffers are what vLLM, SGLang and nano-vllm do; the memory pool that graphs share is PyTorch's.

Neighbours: `engine.batch` builds the integers, `engine.torch_runner` supplies the forward pass and decides who may be
recorded.

What has run where: all but `CudaRecorder` runs in tests on CPUs, through whole engines, with recorders that call the step
again or repeat it tensor operation by tensor operation. `CudaRecorder`, and the CUDA attention backends inside a graph, have
not run yet: they were written without a GPU at hand, and `tests/gpu/test_cuda_graph.py` waits for one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from engine.attention.base import AttentionBatch
from engine.batch import BatchBuilder, StepArrays, StepBatch
from engine.plan import StepPlan

MAX_BUCKET = 512
"""Larger batches keep the device busy without help."""

_WARM_UPS = 2
_ROW_INTS = 4

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
        table_width: blocks of a sequence.
        context_len: tokens of a sequence.
        block_size: tokens of a block.
        scratch_block: where padding writes.
    """

    batch: int
    table_width: int
    context_len: int
    block_size: int
    scratch_block: int


class StaticInputs:
    """A step's integers at fixed addresses.

    A bucket of `b` uses the first `b * (4 + table_width)` of them: tokens, positions, slots, context lengths, block tables.
    """

    def __init__(self, limits: Limits, device: torch.device) -> None:
        self._limits = limits
        self._device = device
        self._ints = torch.zeros(limits.batch * (_ROW_INTS + limits.table_width), dtype=torch.int32, device=device)
        self._query_start = torch.arange(limits.batch + 1, dtype=torch.int32, device=device)
        self._sample_rows = torch.arange(limits.batch, device=device)

    def batch(self, bucket: int) -> StepBatch:
        """What the model reads. To be called inside a recording: it converts ids, positions and slots to int64."""
        tokens, positions, slots, contexts = self._ints[: _ROW_INTS * bucket].view(_ROW_INTS, bucket)
        attention = AttentionBatch(
            query_start=self._query_start[: bucket + 1],
            context_lens=contexts,
            block_tables=self._ints[_ROW_INTS * bucket : self._size(bucket)].view(bucket, -1),
            slots=slots.long(),
            max_query_len=1,
            max_context_len=self._limits.context_len,
        )
        return StepBatch(tokens.long()[None], positions.long()[None], attention, self._sample_rows[:bucket])

    def load(self, bucket: int, step: StepArrays | None = None) -> None:
        """Copy a step of up to `bucket` sequences in, and padding for the rest; None is all padding."""
        host = torch.empty(self._size(bucket), dtype=torch.int32, pin_memory=self._device.type == "cuda")
        ints, limits = host.numpy(), self._limits
        rows, tables = ints[: _ROW_INTS * bucket].reshape(_ROW_INTS, bucket), ints[_ROW_INTS * bucket :].reshape(bucket, -1)
        rows[:] = np.array([[0], [0], [limits.scratch_block * limits.block_size], [1]])
        tables.fill(limits.scratch_block)
        if step is not None:
            count, width = step.block_tables.shape
            rows[:, :count] = step.tokens, step.positions, step.slots, step.context_lens
            own = np.arange(width) * limits.block_size < step.context_lens[:, None]
            np.copyto(tables[:count, :width], step.block_tables, where=own)
        self._ints[: len(ints)].copy_(host, non_blocking=True)

    def _size(self, bucket: int) -> int:
        return bucket * (_ROW_INTS + self._limits.table_width)


class RecordedDecode:
    """Decode steps of one engine, recorded for every bucket on construction.

    Args:
        forward: the model over a cache that has the scratch block. Runs once per recording and never in a step.
        builder: the engine's own, which knows the block tables of living sequences.

    Raises:
        RuntimeError: see `Recorder.record`.
    """

    def __init__(self, forward: Forward, builder: BatchBuilder, limits: Limits, device: torch.device, recorder: Recorder) -> None:
        self._builder = builder
        self._limits = limits
        self.buckets = batch_buckets(limits.batch)
        self._inputs = StaticInputs(limits, device)
        self._inputs.load(1)
        sample = forward(self._inputs.batch(1))
        self._logits = sample.new_empty((limits.batch, sample.shape[1]))
        self._replays: dict[int, Replay] = {}
        for bucket in reversed(self.buckets):  # the memory of a large one serves the smaller ones
            self._inputs.load(bucket)
            self._replays[bucket] = recorder.record(self._step(forward, bucket))

    def bucket_for(self, plan: StepPlan) -> int | None:
        """The bucket that the plan is padded to, None if it is not one that was recorded."""
        scheduled, width = plan.scheduled, self._limits.table_width
        if len(scheduled) > self._limits.batch:
            return None
        if not all(item.count == 1 and item.samples and len(item.sequence.blocks) <= width for item in scheduled):
            return None
        return next(bucket for bucket in self.buckets if bucket >= len(scheduled))

    def logits(self, plan: StepPlan) -> torch.Tensor | None:
        """Replay the plan: `[n, vocab]` for its `n` sequences, valid until the next step. None if it is not one to replay."""
        bucket = self.bucket_for(plan)
        if bucket is None:
            return None
        self._inputs.load(bucket, self._builder.arrays(plan))
        self._replays[bucket]()
        return self._logits[: len(plan.scheduled)]

    def _step(self, forward: Forward, bucket: int) -> Callable[[], None]:
        inputs, logits = self._inputs, self._logits[:bucket]

        def step() -> None:
            logits.copy_(forward(inputs.batch(bucket)))

        return step
