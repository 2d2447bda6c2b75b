"""Whole engines on one GPU: a prefill and a decode engine side by side, token for token what `transformers` generates."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from core.clock import ManualClock
from core.config import EngineConfig
from core.sampling import SamplingParams
from engine.engine import Engine
from engine.model_factory import make_model
from engine.sequence import Sequence
from engine.torch_runner import TorchRunner

pytestmark = pytest.mark.gpu
OUTPUT = 16


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(5, 500) for _ in range(rng.randint(3, 90))] for _ in range(16)]


def sequences(prompts: list[list[int]], hold: bool = False, **options: object) -> list[Sequence]:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": OUTPUT, "ignore_eos": True, **options})  # type: ignore[arg-type]
    return [Sequence(str(i), list(prompt), len(prompt), params, hold=hold) for i, prompt in enumerate(prompts)]


def finish(engine: Engine) -> None:
    while engine.has_work:
        assert engine.step().failed == ()


def reference(folder, device, dtype):
    config = copy.deepcopy(AutoConfig.from_pretrained(folder))
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, attn_implementation="sdpa").to(device).eval()


def generated(model, prompt: list[int], device: torch.device) -> list[int]:
    ids = torch.tensor([prompt], device=device)
    options = {"max_new_tokens": OUTPUT, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()


def copy_kv(source: TorchRunner, blocks: list[int], target: TorchRunner, into: list[int], tokens: int) -> None:
    """Token by token, since the two block sizes differ."""
    for layer, (have, want) in enumerate(zip(source.layers, target.layers, strict=True)):
        assert layer < len(source.layout.layers)
        sizes = source.layout.block_size, target.layout.block_size
        for pages, empty in ((have.key, want.key), (have.value, want.value)):
            rows = torch.tensor([blocks[i // sizes[0]] * sizes[0] + i % sizes[0] for i in range(tokens)], device=pages.device)
            slots = torch.tensor([into[i // sizes[1]] * sizes[1] + i % sizes[1] for i in range(tokens)], device=pages.device)
            empty.flatten(0, 1)[slots] = pages.flatten(0, 1)[rows]


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
        assert writer.reserve(sequence)
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
