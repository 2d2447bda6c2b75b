"""The `ModelRunner` that runs a real model: plan to tensors, one forward pass, tokens drawn.

On CUDA a launch only enqueues: the forward pass, the draws, and an event behind both. Drawn tokens stay on the device, where the
next step reads them (`engine.runner_rows`), and come to the host when the step is collected. On a CPU a launch computes.

`TorchRunner.load` puts the parts together: the model (`engine.model`), an attention backend (`engine.attention.select`), the
KV cache (`engine.kv_cache`), on CUDA decode steps recorded for replay (`engine.cuda_graph`), and a check that the assembled
engine computes what the model alone computes (`engine.self_check`). Nothing here knows queues, requests or wires.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Rows
from functools import partial
from pathlib import Path

import torch

from core.config import EngineConfig
from core.cost import ModelShape
from core.groups import layer_groups
from core.layout import KVLayout
from engine.attention.base import AttentionBackend, LayerCache
from engine.attention.interface import NAME, StepContext, register
from engine.attention.select import Selection, select
from engine.batch import BatchBuilder, StepBatch
from engine.cpu_modules import accelerate_for_cpu
from engine.cuda_graph import MAX_BUCKET, CudaRecorder, Limits, RecordedDecode, Recorder
from engine.kv_cache import KVCache, affordable_blocks, allocate, layout_of
from engine.model import LoadedModel, load_model
from engine.plan import Handle, LayerListener, StepPlan, StepResult, trial_plan
from engine.runner_rows import RunnerRows
from engine.sampling.sampler import Draws, Sampler
from engine.self_check import CHECK_TOKENS, check_against, differences, more_than_rounding, reference_logits

_BLOCK_TOKENS = 16
_CHECKED_ROWS = 32
log = logging.getLogger(__name__)


class TorchStep:
    """A launched step. `sampling` are the plan indexes of `draws`, which are None where nothing is drawn."""

    def __init__(self, draws: Draws | None, sampling: list[int], device: torch.device) -> None:
        self._draws = draws
        self._sampling = sampling
        # Behind all that the launch enqueued, so that also a step that draws nothing is over only once its KV is written.
        self._over = mark_end(device)

    @property
    def done(self) -> bool:
        """Whether the device is done with it."""
        return self._over is None or bool(self._over.query())  # type: ignore[no-untyped-call]

    def result(self) -> StepResult:
        """Wait for it."""
        if self._over is not None:
            self._over.synchronize()
        if self._draws is None:
            return StepResult((), {})
        drawn, faults = self._draws.read()
        return StepResult(drawn, {self._sampling[row]: reason for row, reason in faults.items()})


class TorchRunner:
    """Runs steps of one model on one device. Not thread-safe.

    Attributes:
        accelerated: how many modules of each kind were swapped for faster ones.
        refused_backends: attention backends preferred to the one in use, and why each could not serve the model.
        not_captured: why decode steps are not replayed from recordings, where that was asked for.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        selection: Selection,
        cache: KVCache,
        accelerated: dict[str, int] | None = None,
        *,
        steps_ahead: int | None = None,
    ) -> None:
        """`steps_ahead` is 1 on CUDA and 0 elsewhere, unless given."""
        is_cuda = loaded.device.type == "cuda"
        self._loaded = loaded
        self._backend = selection.backend
        self._cache = cache
        groups = cache.groups
        self._groups = [groups.group_of(layer) for layer in range(len(loaded.layers))]
        self._rows = RunnerRows(loaded.device, len(groups.groups))
        self._builder = BatchBuilder(cache.layout.block_size, loaded.device, self._rows)
        self._sampler = Sampler(loaded.vocab_size, loaded.eos_token_ids, loaded.device)
        self._steps_ahead = int(is_cuda) if steps_ahead is None else steps_ahead
        self.accelerated = accelerated or {}
        self.refused_backends = selection.refused
        self.not_captured: str | None = None
        self._recorded: RecordedDecode | None = None
        register()
        loaded.model.set_attn_implementation(NAME)

    @classmethod
    def load(
        cls,
        model: str | Path,
        engine: EngineConfig,
        *,
        dtype: str = "auto",
        device: torch.device | str | None = None,
        max_model_len: int | None = None,
    ) -> TorchRunner:
        """Load a model and everything it needs to run.

        Args:
            model: a folder or a hub id.
            device: None takes the current GPU where there is one, else the CPU.

        Raises:
            ModelError: see `load_model`; or the assembled engine does not compute what the model alone computes.
            ConfigError: a wrong `max_model_len`, attention backend, block size or cache size.
        """
        if engine.threads is not None:
            torch.set_num_threads(engine.threads)
        chosen = torch.device(device) if device is not None else _default_device()
        loaded = load_model(model, dtype=dtype, device=chosen, max_model_len=max_model_len)
        expected = reference_logits(loaded)
        selection = select(engine.attention, loaded.layers, loaded.dtype, chosen, block_size=engine.block_size)
        swapped = accelerate_for_cpu(loaded.model, loaded.dtype) if engine.accelerate and chosen.type == "cpu" else {}
        layout = layout_of(loaded.layers, loaded.dtype, _block_size(engine.block_size, selection.backend))
        trial = cls(loaded, selection, allocate(layout, _trial_blocks(layout, engine, loaded), chosen), swapped)
        check_against(expected, loaded, trial.logits, layout.blocks_for(CHECK_TOKENS), trial.num_groups)
        activation_bytes = trial.measure_step(engine) if chosen.type == "cuda" and engine.kv_bytes is None else 0
        del trial
        capture = engine.capture and chosen.type == "cuda"
        if capture:
            activation_bytes *= 2  # what recorded steps compute in is theirs alone
        blocks = affordable_blocks(layout, engine, chosen, loaded.max_model_len, activation_bytes)
        runner = cls(loaded, selection, allocate(layout, blocks, chosen, scratch=capture), swapped)
        if capture:
            runner.capture_decode(min(engine.max_num_seqs, engine.max_num_batched_tokens), CudaRecorder(chosen))
        return runner

    @property
    def layout(self) -> KVLayout:
        """Shape of the KV cache, with this engine's block size."""
        return self._cache.layout

    @property
    def num_blocks(self) -> int:
        """Blocks in the cache."""
        return self._cache.num_blocks

    @property
    def num_groups(self) -> int:
        """Groups of layers with a block table each."""
        return len(self._cache.groups.groups)

    @property
    def max_model_len(self) -> int:
        """Longest context, in tokens."""
        return self._loaded.max_model_len

    @property
    def vocab_size(self) -> int:
        """Rows of the output head."""
        return self._loaded.vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a generation."""
        return self._loaded.eos_token_ids

    @property
    def fingerprint(self) -> str:
        """Equal on two engines that hold the same weights in the same dtype."""
        return self._loaded.fingerprint

    @property
    def shape(self) -> ModelShape:
        """Sizes for the cost model."""
        return self._loaded.shape

    @property
    def layers(self) -> tuple[LayerCache, ...]:
        """The cache's pages, for transfers. Write to them only between steps, and only into reserved blocks."""
        return self._cache.layers

    @property
    def device(self) -> torch.device:
        """Where the model and the cache live."""
        return self._loaded.device

    @property
    def backend_name(self) -> str:
        """The attention backend in use."""
        return self._backend.name

    @property
    def captured_batch_sizes(self) -> tuple[int, ...]:
        """The numbers of sequences that decode steps are padded to and replayed at; none if all steps run eagerly."""
        return self._recorded.buckets if self._recorded is not None else ()

    @property
    def steps_ahead(self) -> int:
        """How many further steps may be launched before the oldest is collected."""
        return self._steps_ahead

    @torch.inference_mode()
    def launch(self, plan: StepPlan, on_layer: LayerListener | None = None) -> TorchStep:
        """Compute the plan's tokens, write their KV, draw where asked; on CUDA enqueue all that.

        What it raises, it raises once the device is done with all that was enqueued: the blocks of a step that broke are handed
        out as soon as that is known, perhaps to a transfer that no stream orders behind it.
        """
        try:
            return self._launch(plan, on_layer)
        except BaseException:
            end = mark_end(self.device)
            if end is not None:
                end.synchronize()
            raise

    def _launch(self, plan: StepPlan, on_layer: LayerListener | None) -> TorchStep:
        self._rows.apply(plan)
        for row in plan.dropped:
            self._sampler.drop(row)
        for admitted in plan.admitted:
            self._sampler.admit(admitted.row, admitted.tokens, admitted.prompt_tokens, admitted.sampling)
        logits = self._logits(plan, on_layer)
        sampling = [index for index, item in enumerate(plan.scheduled) if item.samples]
        draws = None
        if sampling:
            items = [plan.scheduled[index] for index in sampling]
            rows = [item.row for item in items]
            draws = self._sampler.draw(logits, rows, self._rows.output_positions(items))
            self._rows.keep_drawn(rows, draws.tokens)
        return TorchStep(draws, sampling, self.device)

    def collect(self, handle: Handle) -> StepResult:
        """Wait for a launched step; see `ModelRunner`."""
        if not isinstance(handle, TorchStep):
            raise TypeError(f"Got a {type(handle).__name__} but expected a step that was launched here")
        return handle.result()

    @torch.inference_mode()
    def logits(self, plan: StepPlan, on_layer: LayerListener | None = None) -> torch.Tensor:
        """Make the plan's changes, compute its tokens and write their KV; return `[n, vocab]` for its `n` sampling entries, valid
        until the next step. Draws nothing.

        A replayed step calls `on_layer` for every layer once all of them are enqueued.
        """
        self._rows.apply(plan)
        return self._logits(plan, on_layer)

    def _logits(self, plan: StepPlan, on_layer: LayerListener | None) -> torch.Tensor:
        """`logits` of a plan whose changes to rows are made."""
        replayed = None
        if self._recorded is not None:
            self._recorded.follow(plan)
            replayed = self._recorded.logits(plan)
        if replayed is None:
            return self._forward(self._cache.layers, self._builder.build(plan), on_layer)
        if on_layer is not None:
            for layer in range(len(self._cache.layers)):
                on_layer(layer)
        return replayed

    @torch.inference_mode()
    def capture_decode(self, max_num_seqs: int, recorder: Recorder) -> None:
        """Replay decode steps from now on, where that can be done; otherwise `not_captured` says why not, and so does the log.

        Each recording must compute what an eager step computes. To be called before the first sequence comes: its trials
        write to the cache, and leave it zeroed.

        Raises:
            ValueError: the cache has no scratch block.
        """
        self.not_captured = self._record(max_num_seqs, recorder)
        if self.not_captured is not None:
            self._recorded = None
            log.warning("decode steps of %s run eagerly: %s", self._loaded.name, self.not_captured)

    def _record(self, max_num_seqs: int, recorder: Recorder) -> str | None:
        """Try to; say why not."""
        layers, layout = self._cache.layers_with_scratch, self.layout
        if layers is None:
            raise ValueError("recording decode steps needs a cache with a scratch block")
        if not self._backend.capturable:
            return f"the attention backend {self._backend.name} cannot be captured"
        limits = Limits(
            batch=min(max_num_seqs, MAX_BUCKET),
            rows=min(max_num_seqs, 2 * MAX_BUCKET),
            table_width=min(layout.blocks_for(self.max_model_len), self.num_blocks),
            context_len=self.max_model_len,
            block_size=layout.block_size,
            scratch_block=self.num_blocks,
            groups=self.num_groups,
        )
        forward = partial(self._forward, layers)
        self._rows.reserve(max_num_seqs + 2)  # and one for a sign of life: what recordings read must not move
        try:
            self._recorded = RecordedDecode(forward, self._rows, limits, self.device, recorder)
            return self._check_recorded(self._recorded)
        except RuntimeError as error:
            return f"{type(error).__name__}: {error}"
        finally:
            for layer in layers:
                layer.key.zero_()
                layer.value.zero_()

    def _check_recorded(self, recorded: RecordedDecode) -> str | None:
        """What is wrong with the recordings: each bucket against an eager step, with tokens and places unlike those of the
        recording."""
        blocks = self.layout.blocks_for(2)
        try:
            for bucket in recorded.buckets:
                rows = min(bucket, self.num_blocks // (blocks * self.num_groups))
                plan = _decode_plan(rows, blocks, self.num_groups, self.vocab_size)
                if not rows:
                    continue
                self._rows.clear()
                self._rows.apply(plan)
                recorded.follow(plan)
                replayed = recorded.logits(plan)
                if replayed is None:
                    continue
                stride = -(-rows // _CHECKED_ROWS)
                got = replayed[::stride].clone()
                eager = self._forward(self._cache.layers, self._builder.build(plan))
                wrong = more_than_rounding(differences(got, eager[::stride]), self._loaded.dtype)
                if wrong is not None:
                    return f"replayed logits of {rows} sequences differ from eager ones by {wrong}"
        finally:
            self._rows.clear()
        return None

    def measure_step(self, engine: EngineConfig) -> int:
        """Peak device memory, in bytes, of the largest step that `engine` allows (CUDA only)."""
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self.collect(self.launch(_largest_plan(engine, self.layout, self.max_model_len, self.num_blocks, self.num_groups)))
        torch.cuda.synchronize(self.device)
        return int(torch.cuda.max_memory_allocated(self.device) - before)

    def _forward(self, caches: Rows[LayerCache], batch: StepBatch, on_layer: LayerListener | None = None) -> torch.Tensor:
        """`[n, vocab]`: the logits of the batch's `sample_rows`."""
        loaded = self._loaded
        context = StepContext(self._backend, loaded.layers, caches, self._groups, batch.attention, on_layer)
        rows = batch.sample_rows
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False, "paged": context}
        if rows.numel() == 0:
            loaded.model.base_model(**inputs)
            return batch.input_ids.new_empty((0, loaded.vocab_size), dtype=loaded.dtype)
        if loaded.keeps_logits and rows.numel() < batch.input_ids.numel():
            kept: torch.Tensor = loaded.model(**inputs, logits_to_keep=rows).logits[0]
            return kept
        every: torch.Tensor = loaded.model(**inputs).logits[0]
        return every if rows.numel() == every.shape[0] else every[rows]


def _decode_plan(sequences: int, blocks: int, groups: int, vocab_size: int) -> StepPlan:
    """Each at its second token, unlike one another, in blocks of its own."""
    tokens = [tuple((7 * row + 3 + offset) % vocab_size for offset in range(2)) for row in range(sequences)]
    return trial_plan(tokens, blocks, groups, start=1)


def mark_end(device: torch.device) -> torch.cuda.Event | None:
    """An event behind all that is enqueued on the current stream, waiting for which sleeps; None on a CPU, which is done."""
    if device.type != "cuda":
        return None
    event: torch.cuda.Event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def _default_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _block_size(wanted: int | None, backend: AttentionBackend) -> int:
    multiple = backend.block_size_multiple
    return wanted if wanted is not None else -(-_BLOCK_TOKENS // multiple) * multiple


def _trial_blocks(layout: KVLayout, engine: EngineConfig, loaded: LoadedModel) -> int:
    """Enough for the self-check, and on CUDA for the largest step."""
    blocks = 2 * layout.blocks_for(CHECK_TOKENS)
    if loaded.device.type == "cuda":
        blocks = max(blocks, layout.blocks_for(engine.max_num_batched_tokens) + engine.max_num_seqs)
    return blocks * len(layer_groups(layout).groups)


def _largest_plan(engine: EngineConfig, layout: KVLayout, max_model_len: int, num_blocks: int, groups: int) -> StepPlan:
    """`max_num_batched_tokens` tokens shared by as many sampling sequences as may run."""
    sequences = min(engine.max_num_seqs, engine.max_num_batched_tokens)
    length = min(max_model_len, engine.max_num_batched_tokens // sequences)
    blocks = layout.blocks_for(length)
    sequences = min(sequences, num_blocks // (blocks * groups))
    return trial_plan([(0,) * length] * sequences, blocks, groups)
