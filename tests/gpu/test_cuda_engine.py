"""Whole engines on one GPU: a prefill and a decode engine side by side, token for token what `transformers` generates."""

from __future__ import annotations

import pytest
import torch

from core.clock import ManualClock
from core.config import EngineConfig
from engine.decision import Part
from engine.engine import Engine
from engine.torch_runner import TorchRunner
from tests.gpu.rig import finish, generated, reference, sequences
from tests.support.hand_over import HandOver
from tests.support.plans import Plans
from tooling.model_factory import make_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "mixtral"])
def test_a_prefill_and_a_decode_engine_on_one_gpu_give_generates_tokens(cuda, tmp_path, prompts, architecture):
    folder = make_model(tmp_path / architecture, architecture, sliding_window=24)
    shared = {"attention": "sdpa", "kv_bytes": 4 << 20, "max_num_batched_tokens": 64}
    prefill = TorchRunner.load(folder, EngineConfig(block_size=16, **shared), dtype="float32", device=cuda)
    decode = TorchRunner.load(folder, EngineConfig(block_size=32, **shared), dtype="float32", device=cuda)
    assert prefill.steps_ahead == decode.steps_ahead == 1
    written = sequences(prompts)
    with HandOver(prefill, decode, EngineConfig(max_num_batched_tokens=64)) as pair:
        pair.serve(sequences(prompts, hold=True), written)
        assert pair.kv_bytes == pair.needed_bytes
    model = reference(folder, cuda, torch.float32)
    assert [s.tokens for s in written] == [generated(model, prompt, cuda) for prompt in prompts]


@pytest.mark.parametrize("steps_ahead", [0, 2])
def test_steps_launched_ahead_change_no_token_under_preemption_stops_and_penalties(cuda, tmp_path, prompts, steps_ahead):
    folder = make_model(tmp_path / "m", "llama")
    config = EngineConfig(attention="sdpa", max_num_batched_tokens=64, kv_bytes=40 * 16 * 512, block_size=16, headroom_tokens=0)
    outcomes = []
    for ahead in (1, steps_ahead):
        runner = TorchRunner.load(folder, config, dtype="float32", device=cuda)
        runner._steps_ahead = ahead
        served = sequences(prompts, temperature=0.8, seed=5, repetition_penalty=1.3, presence_penalty=0.4, ignore_eos=False)
        engine = Engine(runner, config, ManualClock())
        for sequence in served:
            engine.add(sequence)
        finish(engine)
        assert engine.invariants() == []
        assert sum(sequence.preemptions for sequence in served) > 0
        outcomes.append([sequence.tokens for sequence in served])
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("samples", [True, False])
def test_a_collected_step_has_written_its_kv_also_where_it_draws_nothing(cuda, tmp_path, samples):
    folder = make_model(tmp_path / "m", "llama")
    config = EngineConfig(attention="sdpa", kv_bytes=1 << 20, block_size=16)
    runner = TorchRunner.load(folder, config, dtype="float32", device=cuda)
    (sequence,) = sequences([[5, 6, 7, 8]])
    sequence.tables = [[3]]
    step = runner.launch(
        Plans()(Part(sequence, 0, 4 if samples else 3, samples)),
        lambda layer: torch.cuda._sleep(200_000_000) if layer == 0 else None,  # a device far behind its host
    )
    assert not step.done
    runner.collect(step)
    assert step.done
    with torch.cuda.stream(torch.cuda.Stream(cuda)):
        assert all(bool(pages[3, 2].any()) for layer in runner.layers for pages in (layer.key, layer.value))


def test_a_launch_that_breaks_says_so_once_the_device_is_done_with_it(cuda, tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    config = EngineConfig(attention="sdpa", kv_bytes=1 << 20, block_size=16)
    runner = TorchRunner.load(folder, config, dtype="float32", device=cuda)
    (sequence,) = sequences([[5, 6, 7, 8]])
    sequence.tables = [[3]]

    def breaks(layer: int) -> None:
        torch.cuda._sleep(200_000_000)  # a device far behind its host
        if layer == 1:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        runner.launch(Plans()(Part(sequence, 0, 4, True)), breaks)
    assert torch.cuda.current_stream(cuda).query()


def test_a_launch_waits_for_nothing(cuda, tmp_path, prompts):
    """Decode steps of every style of sampling are enqueued behind one that does not end, and none of them is over."""
    folder = make_model(tmp_path / "m", "llama")
    config = EngineConfig(attention="sdpa", kv_bytes=4 << 20)
    runner = TorchRunner.load(folder, config, dtype="float32", device=cuda)
    served = sequences(prompts, temperature=0.8, top_p=0.9, top_k=20, repetition_penalty=1.2, logprobs=2, logit_bias={7: 1.0})
    engine = Engine(runner, config, ManualClock())
    for sequence in served:
        engine.add(sequence)
    while any(sequence.output_tokens < 2 for sequence in served):
        engine.step()
    while engine.in_flight:
        engine.collect()
    torch.cuda._sleep(2_000_000_000)
    assert [engine.launch(), engine.launch()] == [True, True]
    assert not engine.ready, "a launch waited for the device"
    finish(engine)


def test_bf16_with_the_best_backend_differs_only_where_the_reference_is_undecided(cuda, tmp_path, prompts):
    folder = make_model(tmp_path / "m", "llama", hidden=256, head_dim=64, dtype="bfloat16")
    config = EngineConfig(max_num_batched_tokens=64)
    runner = TorchRunner.load(folder, config, device=cuda)
    served = sequences(prompts)
    engine = Engine(runner, config, ManualClock())
    for sequence in served:
        engine.add(sequence)
    finish(engine)
    model = reference(folder, cuda, torch.bfloat16)
    for prompt, sequence in zip(prompts, served, strict=True):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([sequence.tokens], device=cuda), use_cache=False).logits[0].float()
        rows = logits[len(prompt) - 1 : -1].cpu()
        output = torch.tensor(sequence.tokens[len(prompt) :])
        for row, token in zip(rows, output, strict=True):
            gap = float(row.max() - row[token])
            assert gap < 8 * 2**-8 * float(row.abs().max()), runner.backend_name


def test_seeded_sampling_on_a_gpu_draws_what_a_cpu_draws(cuda, tmp_path, prompts):
    folder = make_model(tmp_path / "m", "llama")
    outputs = []
    for device in (cuda, torch.device("cpu")):
        config = EngineConfig(attention="sdpa", kv_bytes=8 << 20)
        engine = Engine(TorchRunner.load(folder, config, dtype="float32", device=device), config, ManualClock())
        served = sequences(prompts, temperature=0.9, top_p=0.9, seed=3)
        for sequence in served:
            engine.add(sequence)
        finish(engine)
        outputs.append([sequence.tokens for sequence in served])
    assert outputs[0] == outputs[1]


def test_the_cache_takes_its_share_of_free_memory_and_leaves_room_for_the_largest_step(cuda, tmp_path):
    folder = make_model(tmp_path / "m", "llama", max_position_embeddings=32768, dtype="bfloat16", head_dim=64, hidden=256)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(cuda)
    config = EngineConfig(memory_utilization=0.2, max_num_seqs=4096, max_num_batched_tokens=8192)
    runner = TorchRunner.load(folder, config, device=cuda)
    assert 0.1 * free < runner.num_blocks * runner.layout.block_size * runner.layout.bytes_per_token < 0.21 * free
