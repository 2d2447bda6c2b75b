"""The runner as a whole: what it reports, when it tells its listener, what one bad sequence may touch."""

from __future__ import annotations

import pytest
import torch

from core.config import EngineConfig
from core.errors import ConfigError
from core.sampling import SamplingParams
from engine.decision import Part
from engine.plan_writer import PlanWriter
from engine.sequence import Sequence
from engine.torch_runner import TorchRunner
from tests.support.plans import Plans, run

GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture
def runner(model_folder):
    return TorchRunner.load(model_folder("llama"), EngineConfig(block_size=4, kv_bytes=20 * 4 * 512))


@pytest.fixture
def plan():
    return Plans()


def sequence(name: str, tokens: list[int], blocks: list[int]) -> Sequence:
    return Sequence(name, tokens, len(tokens), GREEDY, tables=[blocks])


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


def test_the_listener_hears_each_layer_once_in_order_when_its_kv_is_written(runner, plan):
    s = sequence("a", [5, 6, 7], [3])
    heard = []
    runner.launch(
        plan(Part(s, 0, 3, True)),
        lambda layer: heard.append((layer, [bool(pages.key[3, 2].any()) for pages in runner.layers])),
    )
    assert heard == [(0, [True, False]), (1, [True, True])]


def test_a_step_that_only_fills_the_cache_draws_nothing(runner, plan):
    s = sequence("a", [5, 6, 7, 8, 9], [3, 4])
    result = run(runner, plan(Part(s, 0, 4, False)))
    assert (result.drawn, result.faults) == ((), {})
    chunked = run(runner, plan(Part(s, 4, 1, True)))
    other = sequence("b", s.tokens, [7, 1])
    assert chunked.drawn == run(runner, plan(Part(other, 0, 5, True))).drawn


def test_only_the_slots_of_the_tokens_computed_are_written(runner, plan):
    s = sequence("a", [5, 6, 7, 8, 9, 10], [3, 4])
    run(runner, plan(Part(s, 0, 5, False)))
    for layer in runner.layers:
        touched = layer.key.flatten(2).any(dim=-1).flatten().nonzero().flatten().tolist()
        assert touched == [12, 13, 14, 15, 16]


def test_a_sequence_whose_kv_turned_to_nan_faults_alone(runner, plan):
    healthy, sick = sequence("a", [5, 6, 7, 8], [3]), sequence("b", [9, 10, 11, 12], [4])
    alone = run(runner, plan(Part(healthy, 0, 4, True))).drawn[0]
    run(runner, plan(Part(sick, 0, 3, False)))
    runner.layers[1].value[4, 1] = float("nan")
    result = run(runner, plan(Part(sick, 3, 1, True), Part(healthy, 3, 1, True)))
    assert result.faults == {0: "the logits are not finite"}
    assert [d.token for d in result.drawn] == [-1, alone.token]


def test_faults_are_numbered_by_the_plan_not_by_the_draws(runner, plan):
    filling, sick = sequence("a", [5, 6, 7, 8], [3]), sequence("b", [9, 10, 11, 12], [4])
    run(runner, plan(Part(sick, 0, 3, False)))
    runner.layers[1].value[4, 0] = float("nan")
    result = run(runner, plan(Part(filling, 0, 3, False), Part(sick, 3, 1, True)))
    assert list(result.faults) == [1]
    assert [d.token for d in result.drawn] == [-1]


def test_a_model_that_cannot_keep_some_logits_only_gives_the_same(model_folder, monkeypatch, plan):
    import engine.model

    folder = model_folder("llama")
    config = EngineConfig(block_size=4, kv_bytes=20 * 4 * 512)
    step = plan(Part(sequence("a", [5, 6, 7], [3]), 0, 3, True), Part(sequence("b", [8, 9], [4]), 0, 1, False))
    kept = TorchRunner.load(folder, config).logits(step)
    monkeypatch.setattr(engine.model.inspect, "signature", lambda function: type("S", (), {"parameters": {}}))
    every = TorchRunner.load(folder, config).logits(step)
    assert kept.shape == every.shape == (1, 512)
    torch.testing.assert_close(kept, every, atol=1e-5, rtol=1e-5)


def test_a_penalised_row_that_drew_its_output_draws_what_one_that_comes_with_it_draws(runner):
    """Though the host never tells the row what it drew."""
    harsh = SamplingParams(temperature=0.0, repetition_penalty=1.8, presence_penalty=1.0, frequency_penalty=0.5)
    s, plans = Sequence("a", [5, 6, 7], 3, harsh, tables=[[0, 1, 2]]), PlanWriter()
    for _ in range(6):
        start = 0 if len(s.tokens) == 3 else len(s.tokens) - 1
        (drawn,) = run(runner, plans.write((Part(s, start, len(s.tokens) - start, True),))).drawn
        with_output = Sequence("b", list(s.tokens), 3, harsh, tables=[[6, 7, 8]])
        assert run(runner, plans.write_alone(with_output)).drawn == (drawn,)
        s.tokens.append(drawn.token)
    assert len(set(s.tokens)) > 5


class Event:
    """A CUDA event's twin: the device passes it when the test says so."""

    def __init__(self) -> None:
        self.passed = False
        self.waited = 0

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.waited += 1


@pytest.mark.parametrize("samples", [True, False])
def test_a_step_is_over_when_the_device_has_passed_its_end_also_where_nothing_is_drawn(runner, plan, monkeypatch, samples):
    event = Event()
    monkeypatch.setattr("engine.torch_runner.mark_end", lambda device: event)
    step = runner.launch(plan(Part(sequence("a", [5, 6, 7], [3]), 0, 3 if samples else 2, samples)))
    assert (step.done, event.waited) == (False, 0)
    assert len(runner.collect(step).drawn) == samples
    assert event.waited == 1
    event.passed = True
    assert step.done


def test_a_runner_takes_a_step_ahead_only_where_a_device_computes_meanwhile(runner, model_folder):
    assert runner.steps_ahead == 0


def test_rows_change_even_where_the_computation_fails(runner, plan, monkeypatch):
    """Otherwise the next plan would drop rows that were never there."""
    s = sequence("a", [5, 6, 7], [3])
    monkeypatch.setattr("engine.torch_runner.TorchRunner._forward", Event.synchronize)
    with pytest.raises(TypeError):
        runner.launch(plan(Part(s, 0, 3, True)))
    monkeypatch.undo()
    assert len(run(runner, plan(Part(s, 0, 3, True))).drawn) == 1


def test_a_launch_that_breaks_says_so_once_the_device_is_done_with_what_it_enqueued(runner, plan, monkeypatch):
    """Its blocks are handed out then, also to transfers, which no stream orders behind it."""
    waited = []

    class End:
        def synchronize(self) -> None:
            waited.append(True)

    def breaks(layer: int) -> None:
        assert layer == 0
        raise RuntimeError("out of memory")

    monkeypatch.setattr("engine.torch_runner.mark_end", lambda device: End())
    with pytest.raises(RuntimeError, match="out of memory"):
        runner.launch(plan(Part(sequence("a", [5, 6, 7], [3]), 0, 3, True)), breaks)
    assert waited == [True]


def test_a_launch_that_breaks_has_changed_the_rows_for_the_step_that_was_laid_out_behind_it(runner):
    broken, other = sequence("a", [5, 6, 7], [3]), sequence("b", [9, 10, 11, 12], [4])

    def breaks(layer: int) -> None:
        raise RuntimeError("out of memory")

    writer = PlanWriter()
    first = writer.write((Part(broken, 0, 3, True),))
    second = writer.write((Part(broken, 3, 1, True), Part(other, 0, 4, True)))
    with pytest.raises(RuntimeError, match="out of memory"):
        runner.launch(first, breaks)
    beside = run(runner, second).drawn[1]
    third = writer.write((Part(sequence("c", other.tokens, [5]), 0, 4, True),))
    assert run(runner, third).drawn == (beside,)
