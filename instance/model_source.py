"""Where a model's folder comes from: it is one, it came with HetServe, or its id on the Hugging Face Hub names one.

What is in this machine's cache and complete is used without asking the Hub; the rest is downloaded there, by the Hub's own
client, with its own progress bars. `HF_HUB_OFFLINE`, `HF_HOME`, `HF_TOKEN` and the client's other variables are honoured: it
reads them from the environment of the process that asks. A path in one machine's cache means nothing on another, so that on
a cluster of several nodes every process finds its own.

Neighbours: `cluster.launch`, `instance.instance` and `cluster.gateway_process` ask, each on its own machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from core.config import ClusterConfig
from core.errors import ModelError
from instance.embedded import embedded_folder, is_embedded

PATTERNS = ("*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt", "*.jinja")
WEIGHTS = "*.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
REACH_TIMEOUT_S = 5.0
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

Download = Callable[..., str]
"""Called as `huggingface_hub.snapshot_download`: an id, `allow_patterns` and `local_files_only`; returns a folder."""


def is_hub_id(model: str) -> bool:
    """Whether `model` can only be an id on the Hub: shaped `org/name`, and no folder of that name is here."""
    return _HUB_ID.fullmatch(model) is not None and not Path(model).is_dir()


def is_named(model: str) -> bool:
    """Whether `model` is a name that every process looks up on its own machine: an id, or that of a model that comes with
    HetServe."""
    return is_embedded(model) or is_hub_id(model)


def model_folder(model: str, *, weights: bool = True, download: Download | None = None) -> str:
    """A folder with the model on this machine; what is neither a folder nor a name is left for others to refuse.

    Args:
        weights: False leaves them where they are: the rest is enough to tokenise.
        download: takes the place of the Hub's client.

    Raises:
        ModelError: naming the model, and why it cannot be had.
    """
    if is_embedded(model):
        return str(embedded_folder(model))
    if not is_hub_id(model):
        return model
    patterns = [pattern for pattern in PATTERNS if weights or pattern != WEIGHTS]
    fetch = download or _from_hub
    try:
        cached = _from_cache(fetch, model, patterns)
        if cached is not None and _complete(Path(cached), weights):
            return cached
        return fetch(model, allow_patterns=patterns, local_files_only=False)
    except Exception as error:  # of the client, its HTTP or its transfer library; whatever it is ends this start only
        raise ModelError(_refused(model, error)) from error


def named_as_asked(config: ClusterConfig) -> ClusterConfig:
    """The configuration, with a name that is looked up as the name that clients use unless there is another."""
    if config.gateway.served_model_name is not None or not is_named(config.model):
        return config
    gateway = config.gateway.model_copy(update={"served_model_name": config.model})
    return config.model_copy(update={"gateway": gateway})


def found_here(config: ClusterConfig, *, weights: bool = True, download: Download | None = None) -> ClusterConfig:
    """The configuration, with the model as a folder of this machine. Raises ModelError as `model_folder` does."""
    return config.model_copy(update={"model": model_folder(config.model, weights=weights, download=download)})


def _from_hub(model: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
    """The Hub's client. A Hub that does not answer is asked once: the download itself would try again for minutes."""
    from huggingface_hub import HfApi, snapshot_download  # a fifth of a second, for those who need it

    if not local_files_only:
        HfApi().model_info(model, timeout=REACH_TIMEOUT_S)
    return snapshot_download(model, allow_patterns=allow_patterns, local_files_only=local_files_only)


def _from_cache(fetch: Download, model: str, patterns: list[str]) -> str | None:
    """What is in the cache, whole or not; None when there is nothing."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return fetch(model, allow_patterns=patterns, local_files_only=True)
    except LocalEntryNotFoundError:
        return None


def _complete(folder: Path, weights: bool) -> bool:
    """Whether a download into the cache had come to its end, as far as the files themselves can tell."""
    if not (folder / "config.json").is_file() or not any(folder.glob("tokenizer*")):
        return False
    if not weights:
        return True
    try:
        index = json.loads((folder / WEIGHTS_INDEX).read_text(encoding="utf-8"))
        return all((folder / shard).is_file() for shard in set(index["weight_map"].values()))
    except FileNotFoundError:
        return any(folder.glob(WEIGHTS))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def _refused(model: str, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0].strip("'\"") if lines else repr(error)
    return f"model: {model} is no folder here and cannot be had from the Hugging Face Hub: {said}"
