"""Engines in mixed roles never wait for each other for ever, and seldom compute anything twice."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.config import EngineConfig
from engine.residents import Residents
from tests.support.exchange import Exchange, Job

BLOCK_SIZE = 4


def config(**limits: int | bool) -> EngineConfig:
    return EngineConfig(**{"max_num_seqs": 4, "max_num_batched_tokens": 16, "max_waiting_tokens": 1 << 20, **limits})


def crossed(exchange: Exchange) -> None:
    """Each engine reads a prompt that fills it, for the other."""
    exchange.submit(Job(1, list(range(28)), 5, prefill=0, decode=1))
    exchange.submit(Job(2, list(range(20, 48)), 5, prefill=1, decode=0))


def test_two_engines_full_of_prompts_for_each_other_finish_both() -> None:
    exchange = Exchange([8, 8], config(), Random(0))
    crossed(exchange)
    exchange.run()
    assert exchange.taken_back == 1


def test_they_would_freeze_if_no_prompt_lost_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Residents, "stand_still", lambda self: False)
    exchange = Exchange([8, 8], config(), Random(0))
    crossed(exchange)
    with pytest.raises(AssertionError, match="frozen"):
        exchange.run()


def test_equal_tickets_that_arrive_in_opposite_order_finish_too() -> None:
    """Tickets of two gateways may be equal. What arrives first here may arrive last there."""
    exchange = Exchange([8, 8], config(), Random(0))
    for name, prefill in (("a", 0), ("b", 1)):
        exchange.submit(Job(1, list(range(28)), 5, prefill=prefill, decode=1 - prefill, label=name))
    exchange.run()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_whatever_engines_read_for_each_other_all_finish(data: st.DataObject) -> None:
    random = Random(data.draw(st.integers(0, 1 << 32), label="seed"))
    blocks = data.draw(st.lists(st.integers(6, 14), min_size=2, max_size=3), label="blocks")
    limits = config(
        max_num_seqs=data.draw(st.integers(1, 4)),
        max_num_batched_tokens=data.draw(st.integers(4, 32)),
        headroom_tokens=data.draw(st.sampled_from([0, 4, 512])),
        prefix_cache=data.draw(st.booleans()),
    )
    exchange = Exchange(blocks, limits, random, max_delay=data.draw(st.sampled_from([1, 3, 12])))
    most = min(blocks) * BLOCK_SIZE
    for ticket in random.sample(range(1, 100), data.draw(st.integers(1, 24), label="jobs")):
        shared = [1] * random.choice([0, 0, 8])
        output = random.randint(1, most // 2)
        prompt = shared + [random.randrange(50) for _ in range(random.randint(1, most - output - len(shared)))]
        prefill, decode = random.randrange(len(blocks)), random.randrange(len(blocks))
        exchange.submit(Job(ticket, prompt, output, prefill, decode))
        for _ in range(random.choice([0, 0, 1, 5])):
            exchange.take_turn()
    exchange.run()


# --- how much is computed twice -------------------------------------------------------------------------------------------


def saturated(seed: int, load: float, headroom_tokens: int) -> Exchange:
    """120 requests to two engines of 256 tokens that read for each other and for themselves. So many at a time that with their
    prompts on both engines and their output they would fill the caches `load` times."""
    random = Random(seed)
    limits = config(max_num_seqs=32, max_num_batched_tokens=64, headroom_tokens=headroom_tokens, prefix_cache=False)
    exchange = Exchange([64, 64], limits, random)
    for ticket in range(1, 121):
        prompt = [random.randrange(50) for _ in range(random.randint(8, 60))]
        while demand(exchange) > load * 2 * 64 * BLOCK_SIZE:
            exchange.take_turn()
        exchange.submit(Job(ticket, prompt, random.randint(2, 60), random.randrange(2), random.randrange(2)))
    exchange.run()
    return exchange


def demand(exchange: Exchange) -> int:
    return sum(2 * len(job.prompt) + job.max_tokens for job in exchange.unfinished)


@pytest.mark.parametrize("load", [1.0, 1.5])
def test_little_is_recomputed_when_caches_are_full(load: float) -> None:
    runs = [saturated(seed, load, headroom_tokens=64) for seed in range(4)]
    recomputed = sum(run.computed_tokens - run.needed_tokens for run in runs)
    assert recomputed < 0.05 * sum(run.moved_tokens for run in runs)


def test_much_is_recomputed_without_headroom() -> None:
    runs = [saturated(seed, 1.5, headroom_tokens=0) for seed in range(4)]
    recomputed = sum(run.computed_tokens - run.needed_tokens for run in runs)
    assert recomputed > 0.05 * sum(run.moved_tokens for run in runs)
