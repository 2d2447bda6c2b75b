"""The engine's tokens are those of `transformers` alone, whatever the engine does with batches, chunks, blocks and prefixes."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from core.clock import ManualClock
from core.config import EngineConfig
from core.groups import layer_groups
from core.request import FinishReason
from core.sampling import SamplingParams
from engine.attention.select import select
from engine.engine import Engine
from engine.kv_cache import allocate, layout_of
from engine.model import load_model
from engine.sequence import Sequence
from engine.torch_runner import TorchRunner

OUTPUT = 12
CONFIG = EngineConfig(max_num_batched_tokens=48, max_num_seqs=12, headroom_tokens=0)
WINDOW = 8  # shorter than most prompts
EAGER = {"gemma2", "gpt_oss"}  # whose own sdpa leaves out the soft cap or the sinks

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {"sliding_window": WINDOW},
    "gemma3_text": {"sliding_window": WINDOW},
    "phi3": {},
    "opt": {},
    "gpt2": {},
    "mixtral": {},
    "qwen3_moe": {},
    "gpt_oss": {"sliding_window": WINDOW},
}
LATENT = {"head_dim": 8, "kv_heads": 4}
OTHERS: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bitnet": {},
    "cohere": {},
    "cohere2": {"sliding_window": WINDOW},
    "ctrl": {},
    "deepseek_v2": {},
    "deepseek_v3": {},
    "dots1": {"sliding_window": WINDOW},
    "ernie4_5": {},
    "exaone4": {"config": {"sliding_window": WINDOW}},
    "gemma": {},
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "gpt_bigcode": {},
    "gpt_neox": {},
    "granite": {},
    "granitemoe": {},
    "helium": {},
    "hunyuan_v1_dense": {"config": {"head_dim": 16}},
    "internlm3": {},
    "jetmoe": {},
    "nanochat": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"config": {"sliding_window": WINDOW}},
    "olmoe": {},
    "persimmon": {},
    "phi": {},
    "phimoe": {"config": {"num_local_experts": 4, "sliding_window": WINDOW}},
    "qwen2_moe": {},
    "seed_oss": {},
    "smollm3": {},
    "starcoder2": {"sliding_window": WINDOW},
}


def ragged_prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Of 3 to 63 tokens; a third of them begin with the same 36."""
    rng = random.Random(seed)
    shared = [rng.randrange(5, 500) for _ in range(36)]
    return [
        (shared if i % 3 == 0 else []) + [rng.randrange(5, 500) for _ in range(rng.randint(3, 27 if i % 3 == 0 else 60))]
        for i in range(count)
    ]


def greedy(prompts: Many[list[int]], prefix: str = "", **options: Any) -> list[Sequence]:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": OUTPUT, "ignore_eos": True, **options})
    return [Sequence(f"{prefix}{i}", list(prompt), len(prompt), params) for i, prompt in enumerate(prompts)]


def serve(runner: TorchRunner, sequences: list[Sequence], config: EngineConfig = CONFIG) -> list[list[int]]:
    """All at once through one engine; returns the outputs."""
    engine = Engine(runner, config, ManualClock())
    for sequence in sequences:
        engine.add(sequence)
    while engine.has_work:
        assert engine.step().failed == ()
    assert engine.invariants() == []
    return [sequence.tokens[sequence.prompt_tokens :] for sequence in sequences]


def small_runner(folder: Path, num_blocks: int, attention: str = "auto", steps_ahead: int | None = None) -> TorchRunner:
    """With `num_blocks`, and a quarter as many for each group of layers but one."""
    loaded = load_model(folder)
    selection = select(attention, loaded.layers, loaded.dtype, loaded.device)
    layout = layout_of(loaded.layers, loaded.dtype, 8)
    more = num_blocks * (len(layer_groups(layout).groups) - 1) // 4
    cache = allocate(layout, num_blocks + more, loaded.device)
    return TorchRunner(loaded, selection, cache, steps_ahead=steps_ahead)


def reference_model(folder: Path, architecture: str = "", dtype: torch.dtype = torch.float32) -> Any:
    config = copy.deepcopy(AutoConfig.from_pretrained(folder))
    attention = "eager" if architecture in EAGER else "sdpa"
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, attn_implementation=attention).eval()


def generated(model: Any, prompt: list[int], count: int = OUTPUT) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


@torch.inference_mode()
def logits_after(model: Any, prompt: list[int], output: list[int]) -> torch.Tensor:
    """`[len(output), vocab]`: the model's own logits where each output token was drawn, in one forward pass."""
    rows: torch.Tensor = model(input_ids=torch.tensor([prompt + output]), use_cache=False).logits[0].float()
    return rows[len(prompt) - 1 : -1]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_greedy_tokens_are_those_of_generate_under_chunks_preemption_and_prefix_hits(architecture, model_folder):
    folder, prompts = model_folder(architecture, **FAMILIES[architecture]), ragged_prompts(32)
    sequences = greedy(prompts)
    outputs = serve(small_runner(folder, num_blocks=30), sequences)
    assert (sum(s.preemptions for s in sequences) > 0) == (architecture != "mistral"), "windows take what they were promised"
    assert sum(s.cached_tokens for s in sequences) > 0
    assert max(map(len, prompts)) > CONFIG.max_num_batched_tokens, "some prompts need several chunks"
    model = reference_model(folder, architecture)
    assert outputs == [generated(model, prompt) for prompt in prompts]
    assert len({token for output in outputs for token in output}) > 30, "the outputs vary enough to show a mistake"


@pytest.mark.parametrize("architecture", OTHERS)
def test_other_decoders_agree_with_their_own_forward_pass(architecture, model_folder):
    folder, prompts = model_folder(architecture, **OTHERS[architecture]), ragged_prompts(8, seed=1)
    outputs = serve(TorchRunner.load(folder, CONFIG), greedy(prompts))
    model = reference_model(folder, architecture)
    assert outputs == [logits_after(model, p, o).argmax(-1).tolist() for p, o in zip(prompts, outputs, strict=True)]
    assert len({token for output in outputs for token in output}) > 10


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss"])
def test_the_reference_backend_gives_the_same_tokens(architecture, model_folder):
    folder, prompts = model_folder(architecture, **FAMILIES[architecture]), ragged_prompts(10, seed=2)
    runner = small_runner(folder, num_blocks=30, attention="sdpa")
    assert runner.backend_name == "sdpa"
    model = reference_model(folder, architecture)
    assert serve(runner, greedy(prompts)) == [generated(model, prompt) for prompt in prompts]


def test_a_window_on_some_layers_only_is_read_off_the_model(model_folder):
    folder = model_folder(
        "qwen2", layers=3, config={"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    )
    assert [spec.sliding_window for spec in load_model(folder).layers] == [None, WINDOW, WINDOW]
    prompts = ragged_prompts(6, seed=3)
    model = reference_model(folder)
    assert serve(TorchRunner.load(folder, CONFIG), greedy(prompts)) == [generated(model, prompt) for prompt in prompts]


def test_sharded_weights_give_the_same_tokens(model_folder):
    whole, sharded = model_folder("llama"), model_folder("llama", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    prompts = ragged_prompts(4)
    first, second = (TorchRunner.load(folder, CONFIG) for folder in (whole, sharded))
    assert serve(first, greedy(prompts)) == serve(second, greedy(prompts))
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2"])
def test_bf16_tokens_differ_only_where_the_reference_itself_is_undecided(architecture, model_folder, record_property):
    options = {**FAMILIES[architecture], "dtype": "bfloat16"}
    folder, prompts = model_folder(architecture, **options), ragged_prompts(12, seed=4)
    outputs = serve(TorchRunner.load(folder, CONFIG), greedy(prompts))
    model = reference_model(folder, architecture, torch.bfloat16)
    undecided = []
    for prompt, output in zip(prompts, outputs, strict=True):
        logits = logits_after(model, prompt, output)
        differs = (logits.argmax(-1) != torch.tensor(output)).nonzero().flatten().tolist()
        if differs:
            first = differs[0]
            gap = float(logits[first].max() - logits[first, output[first]])
            noise = 8 * 2**-8 * float(logits[first].abs().max())  # eight roundings to bf16's 8 bits
            assert gap < noise, f"token {first} of {prompt}: {gap = :.4f} is more than {noise = :.4f}"
            undecided.append(gap)
    record_property("identical", len(prompts) - len(undecided))
    record_property("undecided_gaps", undecided)
    assert len(undecided) < len(prompts) / 2


def mixed_sampling(prompts: list[list[int]]) -> list[Sequence]:
    styles: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 20, "min_p": 0.02},
        {"temperature": 0.0, "repetition_penalty": 1.2},
        {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": 0.3, "logit_bias": {7: 2.0}},
    ]
    return [
        Sequence(
            f"r{i}",
            list(prompt),
            len(prompt),
            SamplingParams(max_tokens=OUTPUT, ignore_eos=True, seed=1000 + i, **styles[i % len(styles)]),
        )
        for i, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_steps_launched_before_the_last_ones_tokens_are_known_give_generates_tokens(architecture, model_folder):
    folder, prompts = model_folder(architecture, **FAMILIES[architecture]), ragged_prompts(32)
    sequences = greedy(prompts)
    outputs = serve(small_runner(folder, num_blocks=30, steps_ahead=1), sequences)
    assert (sum(s.preemptions for s in sequences) > 0) == (architecture != "mistral"), "windows take what they were promised"
    assert sum(s.cached_tokens for s in sequences) > 0
    model = reference_model(folder, architecture)
    assert outputs == [generated(model, prompt) for prompt in prompts]


def stopping_anywhere(folder: Path, prompts: list[list[int]]) -> list[Sequence]:
    """Every style of sampling, some of which end by an end of sequence, by a stop id, or not before `min_tokens`."""
    usual = serve(small_runner(folder, num_blocks=60), mixed_sampling(prompts))
    sequences = mixed_sampling(prompts)
    for i, sequence in enumerate(sequences):
        stops = (usual[i][(3 + i) % OUTPUT],)  # it will be drawn for sure
        changes = [{"stop_token_ids": stops}, {"stop_token_ids": stops, "min_tokens": 6}, {"ignore_eos": False}, {"logprobs": 3}]
        sequence.sampling = msgspec.structs.replace(sequence.sampling, **changes[i % len(changes)])
    return sequences


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "mixtral", "gpt2"])
def test_any_sampling_draws_the_same_when_steps_are_launched_ahead(architecture, model_folder):
    folder, prompts = model_folder(architecture, **FAMILIES[architecture]), ragged_prompts(20, seed=11)
    outcomes, preemptions = [], 0
    for steps_ahead in (0, 1, 2):
        sequences = stopping_anywhere(folder, prompts)
        engine = Engine(small_runner(folder, num_blocks=25, steps_ahead=steps_ahead), CONFIG, ManualClock())
        for sequence in sequences:
            engine.add(sequence)
        drawn = []
        while engine.has_work:
            output = engine.step()
            assert output.failed == ()
            drawn += [(n.sequence.sequence_id, n.position, n.token, n.finish, n.stop_token) for n in output.tokens]
            for new in output.tokens:
                assert (new.logprobs is None) == (new.sequence.sampling.logprobs is None)
        assert engine.invariants() == []
        preemptions += sum(s.preemptions for s in sequences)
        outcomes.append(sorted(drawn))
    assert preemptions > 0
    assert outcomes[1] == outcomes[0]
    assert outcomes[2] == outcomes[0]
    assert {finish for *_, finish, _ in outcomes[0]} == {None, FinishReason.LENGTH, FinishReason.STOP}


def test_seeded_sampling_draws_the_same_alone_and_in_a_crowd(model_folder):
    folder, prompts = model_folder("llama"), ragged_prompts(15, seed=5)
    crowd = serve(small_runner(folder, num_blocks=30), mixed_sampling(prompts))
    runner = small_runner(folder, num_blocks=30)
    alone = [serve(runner, [sequence])[0] for sequence in mixed_sampling(prompts)]
    assert crowd == alone
    assert len({tuple(output) for output in crowd}) == len(crowd)


def test_a_generation_resumed_from_its_delivered_tokens_continues_as_if_unbroken(model_folder):
    runner = small_runner(model_folder("llama"), num_blocks=60)
    prompts = ragged_prompts(10, seed=6)
    unbroken = serve(runner, mixed_sampling(prompts))
    resumed = mixed_sampling(prompts)
    for i, sequence in enumerate(resumed):
        sequence.tokens.extend(unbroken[i][: 1 + i])
    assert serve(runner, resumed) == unbroken


def test_logprobs_are_within_a_ten_thousandth_of_the_reference(model_folder):
    folder, prompts = model_folder("qwen3"), ragged_prompts(6, seed=7)
    engine = Engine(small_runner(folder, num_blocks=60), CONFIG, ManualClock())
    sequences = greedy(prompts, temperature=0.8, logprobs=5)
    for sequence in sequences:
        engine.add(sequence)
    drawn = []
    while engine.has_work:
        drawn += engine.step().tokens
    model = reference_model(folder)
    assert len(drawn) == OUTPUT * len(prompts)
    for new in drawn:
        prompt = prompts[int(new.sequence.sequence_id)]
        tokens = new.sequence.tokens[len(prompt) :]
        expected = logits_after(model, prompt, tokens)[new.position].log_softmax(-1)
        assert new.logprobs is not None
        assert new.logprobs.logprob == pytest.approx(float(expected[new.token]), abs=1e-4)
        assert [value for _, value in new.logprobs.top] == pytest.approx(expected.topk(5).values.tolist(), abs=1e-4)
        assert [token for token, _ in new.logprobs.top] == expected.topk(5).indices.tolist()
