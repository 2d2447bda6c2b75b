"""The runner as a whole: what it reports, when it tells its listener, what one bad sequence may touch."""

from __future__ import annotations

import pytest
import torch

from core.config import EngineConfig
from core.errors import ConfigError
from core.sampling import SamplingParams
from engine.plan import Scheduled, StepPlan
from engine.sequence import Sequence
from engine.torch_runner import TorchRunner

GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture
def runner(model_folder):
    return TorchRunner.load(model_folder("llama"), EngineConfig(block_size=4, kv_bytes=20 * 4 * 512))


def sequence(name: str, tokens: list[int], blocks: list[int]) -> Sequence:
    return Sequence(name, tokens, len(tokens), GREEDY, blocks=blocks)


def test_it_says_what_it_is(runner, model_folder):
    assert runner.num_blocks == 20
    assert (runner.layout.block_size, runner.layout.dtype, runner.layout.bytes_per_token) == (4, "float32", 512)
    assert (runner.max_model_len, runner.vocab_size, runner.eos_token_ids) == (512, 512, frozenset([2]))
    assert runner.device == torch.device("cpu")
    assert [name for name, _ in runner.refused_backends][:2] == ["flash", "varlen"]
    assert [tuple(layer.key.shape) for layer in runner.layers] == [(20, 4, 2, 16)] * 2


def test_the_block_size_and_backend_asked_for_are_honoured(model_folder):
    runner = TorchRunner.load(model_folder("llama"), EngineConfig(attention="sdpa", block_size=7))
    assert (runner.layout.block_size, runner.backend_name) == (7, "sdpa")
    assert TorchRunner.load(model_folder("llama"), EngineConfig(kv_bytes=1 << 20)).layout.block_size == 16
    with pytest.raises(ConfigError, match=r"engine\.attention: varlen"):
        TorchRunner.load(model_folder("llama"), EngineConfig(attention="varlen"))


def test_a_fresh_cache_is_all_zeros_after_loading(runner):
    assert not any(bool(pages.any()) for layer in runner.layers for pages in (layer.key, layer.value))


def test_the_listener_hears_each_layer_once_in_order_when_its_kv_is_written(runner):
    s = sequence("a", [5, 6, 7], [3])
    heard = []
    runner.run(
        StepPlan((Scheduled(s, 0, 3, True),)),
        lambda layer: heard.append((layer, [bool(pages.key[3, 2].any()) for pages in runner.layers])),
    )
    assert heard == [(0, [True, False]), (1, [True, True])]


def test_a_step_that_only_fills_the_cache_draws_nothing(runner):
    s = sequence("a", [5, 6, 7, 8, 9], [3, 4])
    result = runner.run(StepPlan((Scheduled(s, 0, 4, False),)))
    assert (result.drawn, result.faults) == ((), {})
    chunked = runner.run(StepPlan((Scheduled(s, 4, 1, True),)))
    other = sequence("b", s.tokens, [7, 1])
    assert chunked.drawn == runner.run(StepPlan((Scheduled(other, 0, 5, True),))).drawn


def test_only_the_slots_of_the_tokens_computed_are_written(runner):
    s = sequence("a", [5, 6, 7, 8, 9, 10], [3, 4])
    runner.run(StepPlan((Scheduled(s, 0, 5, False),)))
    for layer in runner.layers:
        touched = layer.key.flatten(2).any(dim=-1).flatten().nonzero().flatten().tolist()
        assert touched == [12, 13, 14, 15, 16]


def test_a_sequence_whose_kv_turned_to_nan_faults_alone(runner):
    healthy, sick = sequence("a", [5, 6, 7, 8], [3]), sequence("b", [9, 10, 11, 12], [4])
    alone = runner.run(StepPlan((Scheduled(healthy, 0, 4, True),))).drawn[0]
    runner.run(StepPlan((Scheduled(sick, 0, 3, False),)))
    runner.layers[1].value[4, 1] = float("nan")
    plan = StepPlan((Scheduled(sick, 3, 1, True), Scheduled(healthy, 3, 1, True)))
    result = runner.run(plan)
    assert result.faults == {0: "the logits are not finite"}
    assert [d.token for d in result.drawn] == [-1, alone.token]


def test_faults_are_numbered_by_the_plan_not_by_the_draws(runner):
    filling, sick = sequence("a", [5, 6, 7, 8], [3]), sequence("b", [9, 10, 11, 12], [4])
    runner.run(StepPlan((Scheduled(sick, 0, 3, False),)))
    runner.layers[1].value[4, 0] = float("nan")
    result = runner.run(StepPlan((Scheduled(filling, 0, 3, False), Scheduled(sick, 3, 1, True))))
    assert list(result.faults) == [1]
    assert [d.token for d in result.drawn] == [-1]


def test_a_model_that_cannot_keep_some_logits_only_gives_the_same(model_folder, monkeypatch):
    import engine.model

    folder = model_folder("llama")
    config = EngineConfig(block_size=4, kv_bytes=20 * 4 * 512)
    plan = StepPlan((Scheduled(sequence("a", [5, 6, 7], [3]), 0, 3, True), Scheduled(sequence("b", [8, 9], [4]), 0, 1, False)))
    kept = TorchRunner.load(folder, config).logits(plan)
    monkeypatch.setattr(engine.model.inspect, "signature", lambda function: type("S", (), {"parameters": {}}))
    every = TorchRunner.load(folder, config).logits(plan)
    assert kept.shape == every.shape == (1, 512)
    torch.testing.assert_close(kept, every, atol=1e-5, rtol=1e-5)


def test_a_penalised_sequence_that_misses_a_step_draws_what_one_that_comes_with_its_output_draws(runner):
    harsh = SamplingParams(temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=1.5, max_tokens=20)
    s = Sequence("a", [5, 6, 7], 3, harsh, blocks=[0, 1, 2])
    for step in range(6):
        s.tokens += [runner.run(StepPlan((Scheduled(s, s.computed_tokens, s.uncomputed_tokens, True),))).drawn[0].token]
        s.computed_tokens = len(s.tokens) - 1
        if step == 2:
            runner.run(StepPlan((Scheduled(sequence("b", [9, 9], [5]), 0, 2, True),)))
        known = Sequence("c", s.tokens[:-1], 3, harsh, blocks=[6, 7, 8])
        drawn = runner.run(StepPlan((Scheduled(known, 0, len(known.tokens), True),))).drawn[0].token
        assert drawn == s.tokens[-1]
    s.tokens += [8, 8, 8]  # brought by someone else
    again = Sequence("d", list(s.tokens), 3, harsh, blocks=[9, 10, 11])
    both = [Scheduled(one, one.computed_tokens, one.uncomputed_tokens, True) for one in (s, again)]
    first, second = runner.run(StepPlan(tuple(both))).drawn
    assert first.token == second.token
