"""Tiny models for the engine's tests, made once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ModelMaker = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def _quiet_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelMaker:
    """`model_folder(architecture, **options)`: a tiny random model, the same folder for the same arguments."""
    from tooling.model_factory import make_model

    made: dict[str, Path] = {}

    def make(architecture: str = "llama", **options: Any) -> Path:
        key = repr((architecture, sorted(options.items(), key=lambda item: item[0])))
        if key not in made:
            options = {"max_position_embeddings": 512, **options}
            made[key] = make_model(tmp_path_factory.mktemp(architecture), architecture, **options)
        return made[key]

    return make
