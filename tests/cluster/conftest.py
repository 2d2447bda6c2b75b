"""Everything here but `live/` decides and never acts: starting Ray from one of these tests is an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from core.config import ClusterConfig, parse_config


@pytest.fixture(autouse=True)
def _no_ray(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "live" in request.path.parts:
        return

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pure test started Ray")

    monkeypatch.setattr(ray, "init", refuse)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a simulated instance needs of a model: its sizes. No weights."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="session")
def configure(model_folder: Path) -> Callable[..., ClusterConfig]:
    """Build a configuration of simulated instances from its pools; keywords are further top-level keys."""

    def build(*pools: dict[str, Any], **sections: Any) -> ClusterConfig:
        return parse_config(
            {
                "model": str(model_folder),
                "engine": {"runner": "simulated"},
                "gateway": {"port": 0},
                "pools": list(pools),
                **sections,
            }
        )

    return build
