"""How a model's makers want it sampled: what `generation_config.json` in its folder says, for requests that do not say it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import msgspec

from core.errors import ModelError

FILE = "generation_config.json"


class SamplingDefaults(msgspec.Struct, frozen=True):
    """What stands in for fields that a request leaves out. `max_tokens` None: as many as there is room for."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None


class _File(msgspec.Struct):
    """The part of the file that is read, as vLLM reads it: all else, `do_sample` too, is for other programs."""

    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0, le=100)] | None = None
    max_new_tokens: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)] | None = None


def sampling_defaults(model_path: str | Path) -> SamplingDefaults:
    """Those of a model's folder; the plain ones where it has no such file.

    Raises:
        ModelError: the file is not what it should be.
    """
    path = Path(model_path) / FILE
    try:
        said = msgspec.convert(json.loads(path.read_text(encoding="utf-8")), _File)
    except FileNotFoundError:
        return SamplingDefaults()
    except (OSError, ValueError) as error:  # what `json` and `msgspec` raise are ValueErrors
        way_out = "gateway.generation_config: off does without"
        raise ModelError(f"cannot take sampling defaults from {path} ({way_out}): {error}") from error
    values = {name: getattr(said, name) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
    given = {name: value for name, value in values.items() if value is not None}
    return SamplingDefaults(**given, max_tokens=said.max_new_tokens)
