"""Recorded decode steps on a real device: the eager tokens, and a recording that breaks without breaking anything else."""

from __future__ import annotations

import threading

import pytest
import torch

from core.clock import ManualClock
from core.config import EngineConfig
from engine.attention.sdpa import SdpaAttention
from engine.attention.select import Selection, select
from engine.attention.varlen import VarlenAttention
from engine.cuda_graph import CudaRecorder
from engine.decision import Part
from engine.engine import Engine
from engine.kv_cache import allocate, layout_of
from engine.model import load_model
from engine.torch_runner import TorchRunner
from tests.gpu.rig import finish, generated, reference, sequences
from tests.support.hand_over import HandOver
from tests.support.plans import Plans
from tooling.model_factory import make_model

pytestmark = pytest.mark.gpu
CONFIG = EngineConfig(max_num_seqs=12, max_num_batched_tokens=64)


class RecordableSdpa(SdpaAttention):
    """Its shapes are those of the batch, so with short contexts it can be recorded; and it takes float32."""

    capturable = True


class CountingRecorder(CudaRecorder):
    def __init__(self, device):
        super().__init__(device)
        self.replayed = 0

    def record(self, step):
        replay = super().record(step)

        def count() -> None:
            self.replayed += 1
            replay()

        return count


def runner_of(folder, device, recorder=None, *, backend=None, block_size=16, num_blocks=60, dtype="float32"):
    loaded = load_model(folder, dtype=dtype, device=device, max_model_len=256)
    cache = allocate(layout_of(loaded.layers, loaded.dtype, block_size), num_blocks, device, scratch=True)
    runner = TorchRunner(loaded, Selection(backend or RecordableSdpa()), cache)
    if recorder is not None:
        runner.capture_decode(CONFIG.max_num_seqs, recorder)
        assert runner.not_captured is None
        assert runner.captured_batch_sizes == (1, 2, 4, 8, 12)
    return runner


def serve(runner, prompts, **options):
    engine, served = Engine(runner, CONFIG, ManualClock()), sequences(prompts, **options)
    for sequence in served:
        engine.add(sequence)
    finish(engine)
    assert engine.invariants() == []
    return served


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("llama", {}), ("mistral", {"sliding_window": 24}), ("gemma3_text", {"sliding_window": 24}), ("mixtral", {})],
)
def test_replayed_steps_give_the_eager_tokens_in_float32(cuda, tmp_path, prompts, architecture, options):
    folder = make_model(tmp_path / "m", architecture, **options)
    eager = serve(runner_of(folder, cuda), prompts)
    replayed = serve(runner_of(folder, cuda, recorder := CountingRecorder(cuda), num_blocks=40), prompts)
    assert [s.tokens for s in replayed] == [s.tokens for s in eager]
    assert sum(s.preemptions for s in replayed) > 0
    assert recorder.replayed > 10
    model = reference(folder, cuda, torch.float32)
    assert [s.tokens for s in replayed[:4]] == [generated(model, prompt, cuda) for prompt in prompts[:4]]


def test_a_prefill_engine_and_a_replaying_decode_engine_side_by_side_give_generates_tokens(cuda, tmp_path, prompts):
    folder = make_model(tmp_path / "m", "gemma3_text", sliding_window=24)
    prefill = runner_of(folder, cuda, num_blocks=200)
    decode = runner_of(folder, cuda, CudaRecorder(cuda), block_size=32, num_blocks=100)
    written = sequences(prompts)
    with HandOver(prefill, decode, CONFIG) as pair:
        pair.serve(sequences(prompts, hold=True), written)
    model = reference(folder, cuda, torch.float32)
    assert [s.tokens for s in written] == [generated(model, prompt, cuda) for prompt in prompts]


def test_torchs_own_kernel_is_recorded_in_bf16_and_replays_close_to_the_eager_logits(cuda, tmp_path):
    folder = make_model(tmp_path / "m", "llama", hidden=256, head_dim=64, dtype="bfloat16")
    backend = VarlenAttention()
    options = {"backend": backend, "block_size": 256, "num_blocks": 20, "dtype": "bfloat16"}
    loaded = load_model(folder, device=cuda)
    reason = next(filter(None, (backend.unsupported(spec, torch.bfloat16, cuda) for spec in loaded.layers)), None)
    if reason is not None:
        pytest.skip(reason)
    eager, replaying = runner_of(folder, cuda, **options), runner_of(folder, cuda, CudaRecorder(cuda), **options)
    items = []
    for i, sequence in enumerate(sequences([[5 + i + j for j in range(40 + 9 * i)] for i in range(11)])):
        sequence.tables = [[19 - i]]
        items.append(Part(sequence, len(sequence.tokens) - 1, 1, True))
    plans = {eager: Plans(), replaying: Plans()}
    for runner in (eager, replaying):
        runner.logits(plans[runner](*(Part(item.sequence, 0, item.start, False) for item in items)))
    for count in (1, 2, 3, 8, 11):
        wanted, got = (runner.logits(plans[runner](*items[:count])).float() for runner in (eager, replaying))
        assert float((got - wanted).norm() / (wanted - wanted.mean()).norm()) < 0.02


def test_a_loaded_runner_records_where_its_backend_allows_and_says_why_where_not(cuda, tmp_path):
    folder = make_model(tmp_path / "m", "llama", hidden=256, head_dim=64, dtype="bfloat16")
    refused = TorchRunner.load(folder, EngineConfig(attention="sdpa", kv_bytes=8 << 20), device=cuda)
    assert (refused.captured_batch_sizes, "sdpa" in (refused.not_captured or "")) == ((), True)
    off = TorchRunner.load(folder, EngineConfig(capture=False, kv_bytes=8 << 20), device=cuda)
    assert (off.captured_batch_sizes, off.not_captured) == ((), None)
    loaded = load_model(folder, device=cuda)
    if select("auto", loaded.layers, loaded.dtype, cuda).backend.capturable:
        runner = TorchRunner.load(folder, EngineConfig(max_num_seqs=10, kv_bytes=8 << 20), device=cuda)
        assert (runner.captured_batch_sizes, runner.not_captured) == ((1, 2, 4, 8, 10), None)


def test_a_recording_that_breaks_leaves_the_stream_and_the_next_recording_whole(cuda):
    recorder, before = CudaRecorder(cuda), torch.cuda.current_stream(cuda)
    counter = torch.zeros(1, device=cuda)
    with pytest.raises(RuntimeError):
        recorder.record(lambda: counter.add_(counter.item()))
    assert torch.cuda.current_stream(cuda) == before
    replay = recorder.record(lambda: counter.add_(1))
    counter.fill_(5)
    replay()
    replay()
    assert counter.item() == 7


def test_other_threads_may_use_the_device_while_a_step_is_recorded(cuda):
    counter, done, errors = torch.zeros(1, device=cuda), threading.Event(), []

    def busy() -> None:
        try:
            while not done.is_set():
                torch.empty(1 << 20, device=cuda).fill_(1).sum().item()
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        for _ in range(20):
            CudaRecorder(cuda).record(lambda: counter.add_(1))()
    finally:
        done.set()
        thread.join()
    assert errors == []
