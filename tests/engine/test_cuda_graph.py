"""Replayed decode steps, with recorders that need no GPU: buckets, padding, addresses, and the tokens of whole engines."""

from __future__ import annotations

import logging
import random

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.clock import ManualClock
from core.config import EngineConfig
from core.groups import layer_groups
from core.sampling import SamplingParams
from engine.attention.cpu import CpuAttention
from engine.attention.flash import FlashAttention
from engine.attention.sdpa import SdpaAttention
from engine.attention.select import Selection
from engine.attention.varlen import VarlenAttention
from engine.cuda_graph import Limits, RecordedDecode, batch_buckets
from engine.decision import Part
from engine.engine import Engine
from engine.kv_cache import allocate, layout_of
from engine.model import load_model
from engine.plan import Admitted, BlocksAdded, Scheduled, StepPlan
from engine.runner_rows import RunnerRows
from engine.sequence import Sequence
from engine.torch_runner import TorchRunner
from tests.support.plans import Plans, run
from tests.support.recorders import AgainRecorder, CopiedInts, TapeRecorder

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
    layout = layout_of(loaded.layers, loaded.dtype, BLOCK)
    more = 2 * num_blocks * (len(layer_groups(layout).groups) - 1)
    cache = allocate(layout, num_blocks + more, CPU, scratch=True)
    runner = TorchRunner(loaded, Selection(backend or RecordableSdpa()), cache)
    if recorder is not None:
        runner.capture_decode(max_num_seqs, recorder)
    return runner


def sequence(name: str, tokens: list[int], blocks: list[int]) -> Sequence:
    return Sequence(name, tokens, len(tokens), GREEDY, tables=[blocks])


def decoding(contexts: list[int], first_block: int = 0) -> list[Part]:
    """Sequences at their last token, with blocks dealt out in reverse, from `first_block` on."""
    counts = [-(-context // BLOCK) for context in contexts]
    free = list(range(first_block, first_block + sum(counts)))
    return [
        Part(sequence(f"s{i}", [5 + i + j for j in range(n)], [free.pop() for _ in range(count)]), n - 1, 1, True)
        for i, (n, count) in enumerate(zip(contexts, counts, strict=True))
    ]


def fill(runner: TorchRunner, parts: list[Part], plan: Plans) -> None:
    """Compute all but the last token of each."""
    items = [Part(part.sequence, 0, part.start, False) for part in parts if part.start]
    if items:
        runner.logits(plan(*items))


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

LIMITS = Limits(batch=6, rows=9, table_width=5, context_len=20, block_size=BLOCK, scratch_block=90)


class Seen:
    """A forward pass that remembers what it was given; its logits say which token and position they came from."""

    def __init__(self) -> None:
        self.batches = []

    def __call__(self, batch):
        self.batches.append(batch)
        return torch.stack([batch.input_ids[0], batch.position_ids[0]], dim=1).float()


class Recorded:
    """Recorded steps, told of each plan as a runner tells them."""

    def __init__(self, recorder=None) -> None:
        self.forward, self.rows = Seen(), RunnerRows(CPU)
        self.decode = RecordedDecode(self.forward, self.rows, LIMITS, CPU, recorder or AgainRecorder())

    def follow(self, plan: StepPlan) -> StepPlan:
        self.rows.apply(plan)
        self.decode.follow(plan)
        return plan

    def logits(self, plan: StepPlan):
        return self.decode.logits(self.follow(plan))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=6), min_size=1, max_size=6))
def test_over_any_steps_padding_names_only_the_scratch_block_and_live_rows_only_their_own(steps):
    recorded, plans = Recorded(), Plans()
    assert recorded.decode.buckets == (1, 2, 4, 6)
    addresses = {}
    for contexts in steps:
        parts = decoding(contexts)
        logits = recorded.logits(plans(*parts))
        batch, bucket = recorded.forward.batches[-1], next(b for b in recorded.decode.buckets if b >= len(contexts))
        (attention,), live = batch.attention, len(contexts)
        assert logits.tolist() == [[part.sequence.tokens[-1], part.start] for part in parts]
        assert (attention.max_query_len, attention.max_context_len) == (1, 20)
        assert attention.block_tables.shape == (bucket, 5)
        assert attention.query_start.tolist() == list(range(bucket + 1))
        assert batch.sample_rows.tolist() == list(range(bucket))
        assert attention.context_lens.tolist() == contexts + [1] * (bucket - live)
        own = [part.sequence.tables[0][part.start // BLOCK] * BLOCK + part.start % BLOCK for part in parts]
        assert attention.slots.tolist() == own + [90 * BLOCK] * (bucket - live)
        assert batch.input_ids[0, live:].tolist() == batch.position_ids[0, live:].tolist() == [0] * (bucket - live)
        tables = [part.sequence.tables[0] + [90] * (5 - len(part.sequence.tables[0])) for part in parts]
        assert attention.block_tables.tolist() == tables + [[90] * 5] * (bucket - live)
        assert addresses.setdefault(bucket, attention.query_start.data_ptr()) == attention.query_start.data_ptr()


def test_a_row_reads_the_token_it_drew_last_and_the_blocks_it_got_since():
    recorded = Recorded()
    (part,) = decoding([8])
    recorded.logits(Plans()(part))
    recorded.rows.keep_drawn([0], torch.tensor([77]))
    logits = recorded.logits(StepPlan(2, (Scheduled(0, 8, 1, True),), blocks=(BlocksAdded(0, 2, (33,)),)))
    (attention,) = recorded.forward.batches[-1].attention
    assert logits.tolist() == [[77, 8]]
    assert attention.block_tables.tolist() == [[*part.sequence.tables[0], 33, 90, 90]]
    assert attention.slots.tolist() == [33 * BLOCK]


def test_each_group_of_layers_has_its_own_tables_and_what_a_window_left_is_no_block_of_its_own():
    limits = Limits(batch=2, rows=3, table_width=5, context_len=20, block_size=BLOCK, scratch_block=90, groups=2)
    rows, forward = RunnerRows(CPU, 2), Seen()
    recorded = RecordedDecode(forward, rows, limits, CPU, AgainRecorder())
    plan = StepPlan(
        1,
        (Scheduled(2, 9, 1, True),),
        admitted=(Admitted(2, tuple(range(10)), 10, GREEDY),),
        blocks=(BlocksAdded(2, 0, (3, 4, 5)), BlocksAdded(2, 1, (6, 7), 1)),
    )
    later = StepPlan(2, (Scheduled(2, 12, 1, True),), blocks=(BlocksAdded(2, 3, (8,)), BlocksAdded(2, 3, (9,), 1)))
    seen = []
    for step in (plan, later):
        rows.apply(step)
        recorded.follow(step)
        assert recorded.logits(step) is not None
        seen.append([(group.block_tables.tolist(), group.slots.tolist()) for group in forward.batches[-1].attention])
    assert seen[0] == [([[3, 4, 5, 90, 90]], [5 * BLOCK + 1]), ([[90, 6, 7, 90, 90]], [7 * BLOCK + 1])]
    assert seen[1] == [([[3, 4, 5, 8, 90]], [8 * BLOCK]), ([[90, 6, 7, 9, 90]], [9 * BLOCK])]


def test_only_what_changes_of_the_block_tables_is_copied():
    wide = Limits(batch=4, rows=4, table_width=5000, context_len=20000, block_size=BLOCK, scratch_block=90)
    rows = RunnerRows(CPU)
    recorded = RecordedDecode(Seen(), rows, wide, CPU, AgainRecorder())
    plan = Plans()(*decoding([9, 4, 5]))
    rows.apply(plan)
    later = [
        StepPlan(2, tuple(Scheduled(row, context, 1, True) for row, context in enumerate([9, 4, 5]))),
        StepPlan(3, tuple(Scheduled(row, context + 1, 1, True) for row, context in enumerate([9, 4, 5]))),
    ]
    later[0] = msgspec.structs.replace(later[0], blocks=(BlocksAdded(1, 1, (40,)),))
    recorded.follow(plan)
    recorded.logits(plan)
    for step in later:
        with CopiedInts() as copied:
            rows.apply(step)
            recorded.follow(step)
            recorded.logits(step)
        assert copied.count < 40, "the tables have 20,000 entries"


def test_what_does_not_fit_a_recording_is_not_taken():
    recorded, plans = Recorded(), Plans()
    one = decoding([9])[0]

    def bucket(*parts: Part) -> int | None:
        return recorded.decode.bucket_for(recorded.follow(plans(*parts)))

    assert bucket(one) == 1
    assert bucket(*decoding([3] * 6)) == 6
    assert bucket(*decoding([3] * 7)) is None
    assert bucket(one, Part(sequence("p", [1, 2], [50]), 0, 2, True)) is None
    assert bucket(one, Part(sequence("p", [1, 2], [50]), 0, 1, False)) is None
    assert bucket(decoding([21])[0]) is None, "wider than the recorded tables"
    assert recorded.logits(plans(*decoding([3] * 7))) is None
    assert bucket(*decoding([3] * 20)) is None, "more rows than were reserved"
    assert bucket(one) is None, "the drawn tokens have moved"


def test_large_buckets_are_recorded_first():
    assert [batch.input_ids.shape[1] for batch in Recorded().forward.batches] == [1, 6, 4, 2, 1]


# --- one step of a real model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", BACKENDS)
@pytest.mark.parametrize("contexts", [[7], [9, 1], [9, 4, 5], [9, 4, 5, 12], [3, 9, 4, 5, 12], [1] * 6, [2] * 7], ids=len)
def test_a_replayed_step_computes_the_eager_logits_and_writes_nobody_elses_slots(model_folder, mode, contexts):
    recorder, backend = BACKENDS[mode]
    folder = model_folder("mistral", sliding_window=8)
    eager = runner_of(folder, backend=backend())
    replaying = runner_of(folder, recorder := recorder(), backend=backend())
    assert replaying.captured_batch_sizes == (1, 2, 4, 6)
    parts = decoding(contexts, first_block=3)
    plans = {eager: Plans(), replaying: Plans()}
    used = {block for part in parts for block in part.sequence.tables[0]}
    others = [block for block in range(40) if block not in used]
    pages = {}
    for runner in (eager, replaying):
        for layer in runner.layers:
            layer.key[others] = layer.value[others] = float("nan")
        fill(runner, parts, plans[runner])
        pages[runner] = [tensor.clone() for layer in runner.layers for tensor in (layer.key, layer.value)]
    before = recorder.replayed
    got, wanted = (runner.logits(plans[runner](*parts)) for runner in (replaying, eager))
    assert recorder.replayed == before + (len(contexts) <= 6)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    slots = sorted(part.sequence.tables[0][part.start // BLOCK] * BLOCK + part.start % BLOCK for part in parts)
    for runner, kept in pages.items():
        now = [tensor for layer in runner.layers for tensor in (layer.key, layer.value)]
        for old, new in zip(kept, now, strict=True):
            same = torch.eq(old, new) | (old.isnan() & new.isnan())
            assert (~same).flatten(2).any(-1).flatten().nonzero().flatten().tolist() == slots


def test_the_listener_hears_every_layer_in_order_once_a_replayed_step_has_written_it(model_folder):
    runner = runner_of(model_folder("llama"), recorder := TapeRecorder())
    parts, plan = decoding([6, 2]), Plans()
    fill(runner, parts, plan)
    before, heard = recorder.replayed, []
    slot = parts[1].sequence.tables[0][0], 1

    def listen(layer: int) -> None:
        heard.append((layer, bool(runner.layers[layer].key[slot].any())))

    result = runner.collect(runner.launch(plan(*parts), listen))
    assert (recorder.replayed, heard) == (before + 1, [(0, True), (1, True)])
    assert len(result.drawn) == 2


def test_a_sequence_whose_kv_turned_to_nan_faults_alone_in_a_replayed_step(model_folder):
    runner = runner_of(model_folder("llama"), TapeRecorder())
    parts, plan = decoding([6, 6, 6]), Plans()
    fill(runner, parts, plan)
    healthy = [drawn.token for drawn in run(runner, plan(*parts)).drawn]
    runner.layers[1].value[parts[1].sequence.tables[0][0], 1] = float("nan")
    sick = run(runner, plan(*parts))
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
        if output.parts and all(part.count == 1 and part.samples for part in output.parts):
            sizes.add(len(output.parts))
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
    assert (sum(s.preemptions for s in replayed) > 0) == (architecture != "mistral"), "windows take what they were promised"
    assert sum(s.cached_tokens for s in replayed) > 0
    assert recorder.replayed - checked > 10
    assert {1, 4} <= sizes
    assert len(sizes) > 4
    assert not any(np.isnan(layer.key.float().numpy()).any() for layer in runner.layers)
