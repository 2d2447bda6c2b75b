"""Configuration errors name the path of the key at fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from core.config import Role, load_config, parse_config
from core.errors import ConfigError

MINIMAL: dict[str, Any] = {"model": "/m", "pools": [{"role": "prefill"}, {"role": "decode", "replicas": 2}]}


def test_defaults_fill_a_minimal_file() -> None:
    config = parse_config(MINIMAL)
    assert [pool.role for pool in config.pools] == [Role.PREFILL, Role.DECODE]
    assert [config.pool_name(index) for index in range(2)] == ["prefill", "decode"]
    assert config.gateway.port == 8000


@pytest.mark.parametrize(
    ("change", "path", "words"),
    [
        ({"modle": "x"}, "modle", "unknown key"),
        ({"pools": [{"role": "decode", "replica": 2}]}, "pools[0].replica", "unknown key"),
        ({"pools": [{"role": "decode", "engine": {"blocksize": 2}}]}, "pools[0].engine.blocksize", "unknown key"),
        ({"pools": [{"role": "reader"}]}, "pools[0].role", "prefill"),
        ({"pools": [{"role": "decode", "replicas": -1}]}, "pools[0].replicas", "greater than or equal to 0"),
        ({"pools": []}, "pools", "at least 1"),
        ({"gateway": {"port": 99999}}, "gateway.port", "65535"),
        ({"gateway": {"host": "0.0.0.0"}}, "gateway", "api_key"),
        ({"dtype": "int8"}, "dtype", "bfloat16"),
        ({"pools": [{"role": "prefill"}]}, "", "no pool can decode"),
        ({"pools": [{"role": "decode", "cost": {"speed": 1.0}}]}, "pools[0].cost", "speed"),
        ({"model": ""}, "model", "at least 1"),
        ({"health": {"heartbeat_s": 5, "dead_after_s": 1}}, "health", "3 times"),
        ({"pools": [{"role": "decode", "cost": {"step_s": -1.0}}]}, "pools[0].cost.step_s", "greater than or equal to 0"),
        ({"pools": [{"role": "decode", "resources": {"gpus": float("inf")}}]}, "pools[0].resources.gpus", "finite"),
        ({"pools": [{"role": "decode", "resources": {"custom": {"x": -1}}}]}, "pools[0].resources.custom.x", "or equal to 0"),
        ({"transfer": {"transport": "pigeon"}}, "transfer.transport", "'shm' or 'distributed'"),
        ({"pools": [{"role": "decode", "accelerator": []}]}, "pools[0].accelerator", "list of names"),
        ({"pools": [{"role": "decode", "accelerator": ["H100", 3]}]}, "pools[0].accelerator", "list of names"),
    ],
)
def test_a_wrong_key_is_named_by_its_path(change: dict[str, Any], path: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        parse_config(MINIMAL | change)
    assert caught.value.path == path


def test_flags_override_the_file(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("model: /m\npools: [{role: mixed}]\ngateway: {port: 1}\n")
    config = load_config(file, {"gateway.port": 2, "dtype": "float32"})
    assert (config.gateway.port, config.dtype) == (2, "float32")


@pytest.mark.parametrize("text", ["- a\n", "a: [", "", "\xff"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError):
        load_config(file)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_pools_of_one_role_are_numbered() -> None:
    config = parse_config(MINIMAL | {"pools": [{"role": "decode"}, {"role": "decode"}, {"role": "decode", "name": "big"}]})
    assert [config.pool_name(index) for index in range(3)] == ["decode0", "decode1", "big"]


def test_twin_pool_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="must differ"):
        parse_config(MINIMAL | {"pools": [{"role": "decode", "name": "a"}, {"role": "mixed", "name": "a"}]})


@pytest.mark.parametrize("accelerator", ["H100", ["L40S", "A10G"]])
def test_a_pool_that_names_an_accelerator_must_ask_for_some_of_it(accelerator: object) -> None:
    pool = {"role": "decode", "accelerator": accelerator}
    with pytest.raises(ConfigError, match=r"^pools\[1\]\.resources\.gpus: accelerator .* no GPU") as wrong:
        parse_config(MINIMAL | {"pools": [{"role": "prefill"}, pool]})
    assert wrong.value.path == "pools[1].resources.gpus"
    for fitting in ({"resources": {"gpus": 0.5}}, {"accelerator": "CPU"}, {"engine": {"runner": "simulated"}}):
        parse_config(MINIMAL | {"pools": [{"role": "prefill"}, pool | fitting]})
