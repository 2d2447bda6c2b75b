"""Replayed decode steps, with recorders that need no GPU: buckets, padding, addresses, and the tokens of whole engines."""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.clock import ManualClock
from core.config import EngineConfig
from core.sampling import SamplingParams
from engine.attention.cpu import CpuAttention
from engine.attention.flash import FlashAttention
from engine.attention.sdpa import SdpaAttention
from engine.attention.select import Selection
from engine.attention.varlen import VarlenAttention
from engine.batch import BatchBuilder
from engine.cuda_graph import Limits, RecordedDecode, batch_buckets
from engine.engine import Engine
from engine.kv_cache import allocate, layout_of
from engine.model import load_model
from engine.plan import Scheduled, StepPlan
from engine.sequence import Sequence
from engine.torch_runner import TorchRunner
from tests.support.recorders import AgainRecorder, TapeRecorder

CPU = torch.device("cpu")
BLOCK = 4
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


class RecordableSdpa(SdpaAttention):
    """Its shapes are those of the batch, so with short contexts it can be recorded."""

    capturable = True


class RecordableCpu(CpuAttention):
    capturable = True


BACKENDS = {"tape": (TapeRecorder, RecordableSdpa), "again": (AgainRecorder, RecordableCpu)}


def runner_of(folder, recorder=None, *, backend=None, num_blocks=40, max_num_seqs=6, **options):
    loaded = load_model(folder, max_model_len=128, **options)
    cache = allocate(layout_of(loaded.layers, loaded.dtype, BLOCK), num_blocks, CPU, scratch=True)
    runner = TorchRunner(loaded, Selection(backend or RecordableSdpa()), cache)
    if recorder is not None:
        runner.capture_decode(max_num_seqs, recorder)
    return runner


def sequence(name: str, tokens: list[int], blocks: list[int]) -> Sequence:
    return Sequence(name, tokens, len(tokens), GREEDY, blocks=blocks)


def decoding(contexts: list[int], first_block: int = 0) -> list[Scheduled]:
    """Sequences at their last token, with blocks dealt out in reverse, from `first_block` on."""
    counts = [-(-context // BLOCK) for context in contexts]
    free = list(range(first_block, first_block + sum(counts)))
    return [
        Scheduled(sequence(f"s{i}", [5 + i + j for j in range(n)], [free.pop() for _ in range(count)]), n - 1, 1, True)
        for i, (n, count) in enumerate(zip(contexts, counts, strict=True))
    ]


def fill(runner: TorchRunner, scheduled: list[Scheduled]) -> None:
    """Compute all but the last token of each."""
    items = [Scheduled(item.sequence, 0, item.start, False) for item in scheduled if item.start]
    if items:
        runner.logits(StepPlan(tuple(items)))


# --- buckets -----------------------------------------------------------------------------------------------------------


def test_buckets_grow_from_one_to_the_most_sequences_and_no_further_than_512():
    assert batch_buckets(1) == (1,)
    assert batch_buckets(3) == (1, 2, 3)
    assert batch_buckets(12) == (1, 2, 4, 8, 12)
    assert batch_buckets(32) == (1, 2, 4, 8, 16, 24, 32)
    assert batch_buckets(65536)[-3:] == (480, 496, 512)
    assert len(batch_buckets(65536)) == 51


@given(st.integers(1, 2000))
def test_every_batch_up_to_the_largest_bucket_has_one_that_wastes_less_than_half(size):
    buckets = batch_buckets(size)
    assert list(buckets) == sorted(set(buckets))
    for count in range(1, buckets[-1] + 1):
        assert next(bucket for bucket in buckets if bucket >= count) < 2 * count


def test_only_the_kernels_that_read_lengths_on_the_device_may_be_recorded():
    assert [backend.capturable for backend in (FlashAttention(), VarlenAttention())] == [True, True]
    assert [backend.capturable for backend in (SdpaAttention(), CpuAttention())] == [False, False]


# --- padding -----------------------------------------------------------------------------------------------------------

LIMITS = Limits(batch=6, table_width=5, context_len=20, block_size=BLOCK, scratch_block=90)


class Seen:
    """A forward pass that remembers what it was given; its logits say which token and position they came from."""

    def __init__(self) -> None:
        self.batches = []

    def __call__(self, batch):
        self.batches.append(batch)
        return torch.stack([batch.input_ids[0], batch.position_ids[0]], dim=1).float()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=6), min_size=1, max_size=6))
def test_over_any_steps_padding_names_only_the_scratch_block_and_live_rows_only_their_own(steps):
    forward, recorder = Seen(), AgainRecorder()
    recorded = RecordedDecode(forward, BatchBuilder(BLOCK, CPU), LIMITS, CPU, recorder)
    assert recorded.buckets == (1, 2, 4, 6)
    addresses = {}
    for contexts in steps:
        scheduled = decoding(contexts)
        logits = recorded.logits(StepPlan(tuple(scheduled)))
        batch, bucket = forward.batches[-1], next(b for b in recorded.buckets if b >= len(contexts))
        attention, live = batch.attention, len(contexts)
        assert logits.tolist() == [[item.sequence.tokens[-1], item.start] for item in scheduled]
        assert (attention.max_query_len, attention.max_context_len) == (1, 20)
        assert attention.block_tables.shape == (bucket, 5)
        assert attention.query_start.tolist() == list(range(bucket + 1))
        assert batch.sample_rows.tolist() == list(range(bucket))
        assert attention.context_lens.tolist() == contexts + [1] * (bucket - live)
        own = [item.sequence.blocks[item.start // BLOCK] * BLOCK + item.start % BLOCK for item in scheduled]
        assert attention.slots.tolist() == own + [90 * BLOCK] * (bucket - live)
        assert batch.input_ids[0, live:].tolist() == batch.position_ids[0, live:].tolist() == [0] * (bucket - live)
        tables = [item.sequence.blocks + [90] * (5 - len(item.sequence.blocks)) for item in scheduled]
        assert attention.block_tables.tolist() == tables + [[90] * 5] * (bucket - live)
        places = [tensor.data_ptr() for tensor in (attention.context_lens, attention.block_tables, attention.query_start)]
        assert addresses.setdefault(bucket, places) == places


def test_what_does_not_fit_a_recording_is_not_taken():
    recorded = RecordedDecode(Seen(), BatchBuilder(BLOCK, CPU), LIMITS, CPU, AgainRecorder())
    one = decoding([9])[0]
    assert recorded.bucket_for(StepPlan((one,))) == 1
    assert recorded.bucket_for(StepPlan(tuple(decoding([3] * 6)))) == 6
    assert recorded.bucket_for(StepPlan(tuple(decoding([3] * 7)))) is None
    assert recorded.bucket_for(StepPlan((one, Scheduled(sequence("p", [1, 2], [50]), 0, 2, True)))) is None
    assert recorded.bucket_for(StepPlan((one, Scheduled(sequence("p", [1, 2], [50]), 0, 1, False)))) is None
    assert recorded.bucket_for(StepPlan((decoding([21])[0],))) is None, "wider than the recorded tables"
    assert recorded.logits(StepPlan(tuple(decoding([3] * 7)))) is None


def test_large_buckets_are_recorded_first():
    forward = Seen()
    RecordedDecode(forward, BatchBuilder(BLOCK, CPU), LIMITS, CPU, AgainRecorder())
    assert [batch.input_ids.shape[1] for batch in forward.batches] == [1, 6, 4, 2, 1]


# --- one step of a real model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", BACKENDS)
@pytest.mark.parametrize("contexts", [[7], [9, 1], [9, 4, 5], [9, 4, 5, 12], [3, 9, 4, 5, 12], [1] * 6, [2] * 7], ids=len)
def test_a_replayed_step_computes_the_eager_logits_and_writes_nobody_elses_slots(model_folder, mode, contexts):
    recorder, backend = BACKENDS[mode]
    folder = model_folder("mistral", sliding_window=8)
    eager = runner_of(folder, backend=backend())
    replaying = runner_of(folder, recorder := recorder(), backend=backend())
    assert replaying.captured_batch_sizes == (1, 2, 4, 6)
    scheduled = decoding(contexts, first_block=3)
    used = {block for item in scheduled for block in item.sequence.blocks}
    others = [block for block in range(40) if block not in used]
    pages = {}
    for runner in (eager, replaying):
        for layer in runner.layers:
            layer.key[others] = layer.value[others] = float("nan")
        fill(runner, scheduled)
        pages[runner] = [tensor.clone() for layer in runner.layers for tensor in (layer.key, layer.value)]
    before = recorder.replayed
    plan = StepPlan(tuple(scheduled))
    got, wanted = replaying.logits(plan), eager.logits(plan)
    assert recorder.replayed == before + (len(contexts) <= 6)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    slots = sorted(item.sequence.blocks[item.start // BLOCK] * BLOCK + item.start % BLOCK for item in scheduled)
    for runner, kept in pages.items():
        now = [tensor for layer in runner.layers for tensor in (layer.key, layer.value)]
        for old, new in zip(kept, now, strict=True):
            same = torch.eq(old, new) | (old.isnan() & new.isnan())
            assert (~same).flatten(2).any(-1).flatten().nonzero().flatten().tolist() == slots


def test_the_listener_hears_every_layer_in_order_once_a_replayed_step_has_written_it(model_folder):
    runner = runner_of(model_folder("llama"), recorder := TapeRecorder())
    scheduled = decoding([6, 2])
    fill(runner, scheduled)
    before, heard = recorder.replayed, []
    slot = scheduled[1].sequence.blocks[0], 1

    def listen(layer: int) -> None:
        heard.append((layer, bool(runner.layers[layer].key[slot].any())))

    result = runner.run(StepPlan(tuple(scheduled)), listen)
    assert (recorder.replayed, heard) == (before + 1, [(0, True), (1, True)])
    assert len(result.drawn) == 2


def test_a_sequence_whose_kv_turned_to_nan_faults_alone_in_a_replayed_step(model_folder):
    runner = runner_of(model_folder("llama"), TapeRecorder())
    scheduled = decoding([6, 6, 6])
    fill(runner, scheduled)
    plan = StepPlan(tuple(scheduled))
    healthy = [drawn.token for drawn in runner.run(plan).drawn]
    runner.layers[1].value[scheduled[1].sequence.blocks[0], 1] = float("nan")
    sick = runner.run(plan)
    assert sick.faults == {1: "the logits are not finite"}
    assert [drawn.token for drawn in sick.drawn] == [healthy[0], -1, healthy[2]]


def test_recording_leaves_the_cache_zeroed_and_its_scratch_block_out_of_sight(model_folder):
    runner = runner_of(model_folder("llama"), TapeRecorder(), num_blocks=10)
    assert runner.num_blocks == 10
    assert [len(pages) for layer in runner.layers for pages in (layer.key, layer.value)] == [10] * 4
    assert all(pages.is_contiguous() and not pages.any() for layer in runner.layers for pages in (layer.key, layer.value))


# --- what cannot be recorded -------------------------------------------------------------------------------------------


def run_alone(runner: TorchRunner, prompt: list[int]) -> list[int]:
    engine, only = Engine(runner, EngineConfig(), ManualClock()), Sequence("a", list(prompt), len(prompt), GREEDY)
    engine.add(only)
    while engine.has_work:
        assert engine.step().failed == ()
    return only.tokens


def stays_eager(runner: TorchRunner, folder, caplog, reason: str) -> None:
    assert runner.captured_batch_sizes == ()
    assert reason in (runner.not_captured or "")
    assert len([record for record in caplog.records if record.name == "engine.torch_runner"]) == 1
    assert run_alone(runner, [7, 8, 9]) == run_alone(runner_of(folder), [7, 8, 9])
    assert len([record for record in caplog.records if record.name == "engine.torch_runner"]) == 1


def test_a_forward_pass_that_waits_for_the_device_is_run_eagerly(model_folder, caplog):
    class Waits(RecordableSdpa):
        def attend(self, query, cache, batch, spec, sinks=None):
            assert batch.context_lens.max().item() > 0
            return super().attend(query, cache, batch, spec, sinks)

    folder = model_folder("llama")
    with caplog.at_level(logging.WARNING):
        stays_eager(runner_of(folder, TapeRecorder(), backend=Waits()), folder, caplog, "waits for the device")


def test_a_recording_that_breaks_halfway_leaves_an_eager_runner(model_folder, caplog):
    class Breaks(TapeRecorder):
        def record(self, step):
            if self.recorded == 2:
                raise torch.OutOfMemoryError("no memory left")
            return super().record(step)

    folder = model_folder("llama")
    stays_eager(runner_of(folder, Breaks()), folder, caplog, "OutOfMemoryError: no memory left")


def test_a_replay_that_computes_something_else_is_never_used(model_folder, caplog):
    class Forgets(TapeRecorder):
        """As if the sequence's numbers had been read on the host while recording."""

        def record(self, step):
            super().record(step)
            return lambda: None

    folder = model_folder("llama")
    stays_eager(runner_of(folder, Forgets()), folder, caplog, "replayed logits of 1 sequences differ from eager ones")


def test_a_backend_that_cannot_be_recorded_is_named(model_folder, caplog):
    folder, recorder = model_folder("llama"), TapeRecorder()
    stays_eager(runner_of(folder, recorder, backend=SdpaAttention()), folder, caplog, "the attention backend sdpa cannot")
    assert recorder.recorded == 0


def test_recording_without_a_scratch_block_is_a_mistake_of_the_caller(model_folder):
    loaded = load_model(model_folder("llama"))
    runner = TorchRunner(loaded, Selection(RecordableSdpa()), allocate(layout_of(loaded.layers, loaded.dtype, BLOCK), 4, CPU))
    with pytest.raises(ValueError, match="scratch block"):
        runner.capture_decode(2, TapeRecorder())


def test_on_a_cpu_the_setting_changes_nothing(model_folder):
    for capture in (True, False):
        runner = TorchRunner.load(model_folder("llama"), EngineConfig(capture=capture, kv_bytes=1 << 20))
        assert (runner.captured_batch_sizes, runner.not_captured) == ((), None)


# --- whole engines -----------------------------------------------------------------------------------------------------


def crowd(count: int) -> list[Sequence]:
    """Prompts of 2 to 40 tokens, a third of which share their beginning, with outputs of 1 to 24 tokens: the batch grows,
    shrinks and never has the same members for long."""
    rng = random.Random(1)
    shared = [rng.randrange(5, 500) for _ in range(18)]
    sequences = []
    for index in range(count):
        own = [rng.randrange(5, 500) for _ in range(rng.randint(2, 22))]
        prompt = shared + own if index % 3 == 0 else own
        params = SamplingParams(temperature=0.0, max_tokens=rng.randint(1, 24), ignore_eos=True)
        sequences.append(Sequence(str(index), prompt, len(prompt), params))
    return sequences


def serve(runner: TorchRunner, sequences: list[Sequence]) -> set[int]:
    """Everybody through one engine, a few arriving at a time; the numbers of sequences that decoded together."""
    config = EngineConfig(max_num_seqs=9, max_num_batched_tokens=40, headroom_tokens=0)
    engine, arriving, sizes = Engine(runner, config, ManualClock()), list(sequences), set()
    while arriving or engine.has_work:
        for _ in range(2):
            if arriving:
                engine.add(arriving.pop(0))
        output = engine.step()
        assert output.failed == ()
        if output.plan is not None and all(item.count == 1 and item.samples for item in output.plan.scheduled):
            sizes.add(len(output.plan.scheduled))
    assert engine.invariants() == []
    return sizes


@pytest.mark.parametrize("mode", BACKENDS)
@pytest.mark.parametrize(
    ("architecture", "options"),
    [("llama", {}), ("mistral", {"sliding_window": 8}), ("gemma3_text", {"sliding_window": 8}), ("mixtral", {})],
)
def test_an_engine_that_replays_gives_the_eager_tokens_under_preemption_and_prefix_hits(
    model_folder, mode, architecture, options
):
    recorder, backend = BACKENDS[mode]
    folder = model_folder(architecture, **options)
    eager, replayed = crowd(18), crowd(18)
    serve(runner_of(folder, backend=backend(), num_blocks=22), eager)
    runner = runner_of(folder, recorder := recorder(), backend=backend(), num_blocks=22)
    assert runner.captured_batch_sizes == (1, 2, 4, 6)
    checked = recorder.replayed
    sizes = serve(runner, replayed)
    assert [s.tokens for s in replayed] == [s.tokens for s in eager]
    assert len({token for s in eager for token in s.tokens[s.prompt_tokens :]}) > 30
    assert sum(s.preemptions for s in replayed) > 0
    assert sum(s.cached_tokens for s in replayed) > 0
    assert recorder.replayed - checked > 10
    assert {1, 4} <= sizes
    assert len(sizes) > 4
    assert not any(np.isnan(layer.key.float().numpy()).any() for layer in runner.layers)
