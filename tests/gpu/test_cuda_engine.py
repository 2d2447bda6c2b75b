"""Whole engines on one GPU: a prefill and a decode engine side by side, token for token what `transformers` generates."""

from __future__ import annotations

import pytest
import torch

from core.clock import ManualClock
from core.config import EngineConfig
from engine.engine import Engine
from engine.torch_runner import TorchRunner
from tests.gpu.rig import copy_kv, finish, generated, reference, sequences
from tooling.model_factory import make_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "mixtral"])
def test_a_prefill_and_a_decode_engine_on_one_gpu_give_generates_tokens(cuda, tmp_path, prompts, architecture):
    folder = make_model(tmp_path / architecture, architecture, sliding_window=24)
    shared = {"attention": "sdpa", "kv_bytes": 4 << 20, "max_num_batched_tokens": 64}
    prefill = TorchRunner.load(folder, EngineConfig(block_size=16, **shared), dtype="float32", device=cuda)
    decode = TorchRunner.load(folder, EngineConfig(block_size=32, **shared), dtype="float32", device=cuda)
    assert prefill.fingerprint == decode.fingerprint
    reader = Engine(prefill, EngineConfig(), ManualClock())
    writer = Engine(decode, EngineConfig(), ManualClock())
    read = sequences(prompts, hold=True)
    for sequence in read:
        reader.add(sequence)
    finish(reader)
    written = sequences(prompts)
    for held, sequence in zip(read, written, strict=True):
        writer.reserve(sequence)
        writer.admissions()
        copy_kv(prefill, held.blocks, decode, sequence.blocks, len(sequence.tokens))
        writer.start(sequence, held.tokens[-1])
        reader.release(held.sequence_id)
    finish(writer)
    assert reader.invariants() == writer.invariants() == []
    model = reference(folder, cuda, torch.float32)
    assert [s.tokens for s in written] == [generated(model, prompt, cuda) for prompt in prompts]


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
    assert 0.1 * free < runner.num_blocks * runner.layout.bytes_per_block < 0.21 * free
