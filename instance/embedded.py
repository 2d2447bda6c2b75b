"""The models that come with HetServe, by the names that serve them. Each process finds them in its own installation.

A folder that has such a name is another model, and is asked for by a path: `./demo`.

Neighbour: `instance.model_source` asks here first.
"""

from __future__ import annotations

from pathlib import Path

from core.errors import ModelError

NAMES = ("demo", "demo-draft")
WEIGHTS = "model.safetensors"

_APP = Path(__file__).resolve().parents[1]


def is_embedded(model: str) -> bool:
    """Whether `model` names one that comes with HetServe."""
    return model in NAMES


def embedded_folder(model: str, app: Path = _APP) -> Path:
    """Where this installation has it. `app` is the folder that the server's packages lie in.

    In a checkout they lie beside `hetserve/`, in a wheel inside it, under `_app`.

    Raises:
        ModelError: this installation lacks it, or its weights.
    """
    package = app.parent if app.name == "_app" else app / "hetserve"
    folder = package / "models" / model
    for needed in ("config.json", WEIGHTS):
        if not (folder / needed).is_file():
            raise ModelError(f"model: {model} comes with HetServe, but {folder / needed} is not there: install HetServe again")
    return folder
