"""Prefill instance to decode instance, by the carrier that `auto` takes, in fp32: greedy tokens are those of `generate`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from core.config import parse_config
from core.sampling import SamplingParams
from mail.keys import ClusterKeys
from tests.support.gateway import ScriptedGateway
from tests.support.instances import Instances
from tests.support.reference import generate, prompts
from tooling.model_factory import make_model

KEYS = ClusterKeys.generate()
ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3", "opt", "gpt2", "mixtral", "qwen3_moe", "gpt_oss")
LENGTHS = (1, 17, 40, 75)
NEW_TOKENS = 20


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    with ScriptedGateway(KEYS) as gateway:
        yield gateway


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_are_those_of_generate(tmp_path: Path, gateway: ScriptedGateway, architecture: str) -> None:
    folder = tmp_path / "model"
    make_model(folder, architecture, dtype="float32", seed=3, sliding_window=24)
    asked = prompts(LENGTHS)
    config = parse_config(
        {
            "model": str(folder),
            "dtype": "float32",
            "engine": {"kv_bytes": 8 << 20, "max_num_batched_tokens": 32, "threads": 1},
            "pools": [
                {"role": "prefill"},
                {"role": "decode", "engine": {"kv_bytes": 8 << 20, "block_size": 24, "max_num_batched_tokens": 32}},
            ],
        }
    )
    sampling = SamplingParams(max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, temperature=0.0)
    with Instances(config, keys=KEYS) as instances:
        prefill, decode = instances.addresses
        attempts = [gateway.submit(prompt, sampling, prefill=prefill, decode=decode) for prompt in asked]
        generations = gateway.wait(*attempts, timeout_s=100)
        expected = generate(folder, asked, NEW_TOKENS)
        assert len({token for output in expected for token in output}) > NEW_TOKENS  # the model says more than one thing
        assert [g.output for g in generations] == expected
        assert all(g.by[0] == prefill.name and g.by[1] == decode.name for g in generations)
        assert instances.settled() == []
