"""Checks that cost nothing and fail in a second, before anything is started."""

from __future__ import annotations

import errno
import json
import socket
from pathlib import Path

from core.config import ClusterConfig, GatewayConfig
from core.errors import LaunchError, ModelError, PortInUse
from instance.model_source import is_named

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")


def check(config: ClusterConfig) -> None:
    """A model that is still a name is left to the processes that will find it, each on its own machine.

    Raises:
        ModelError, PortInUse, LaunchError.
    """
    check_port(config.gateway)
    if is_named(config.model):
        return
    check_model(config.model, weights=runs_torch(config))


def runs_torch(config: ClusterConfig) -> bool:
    """Whether any instance needs the model's weights."""
    return any(config.engine_of(pool).runner == "torch" for pool in config.pools if pool.replicas)


def check_model(model: str, weights: bool = True) -> None:
    """A folder with a `config.json` that names an architecture, a tokenizer and, unless all runners are simulated, weights.

    Raises:
        ModelError: saying what is missing.
    """
    folder = Path(model)
    if not folder.is_dir():
        raise ModelError(f"model: {model} is not a folder, nor shaped like an id on the Hugging Face Hub (org/name)")
    path = folder / "config.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"model: {model} is not a model folder: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"model: {path} cannot be read: {error}") from error
    if not isinstance(described, dict) or not described.get("architectures", described.get("model_type")):
        raise ModelError(f"model: {path} names no architecture")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(f"model: {model} has no tokenizer (expected one of {', '.join(TOKENIZER_FILES)})")
    if weights and not any(next(folder.glob(pattern), None) for pattern in WEIGHT_PATTERNS):
        raise ModelError(f"model: {model} has no weights (expected *.safetensors)")


def check_port(gateway: GatewayConfig) -> None:
    """The gateway's own bind remains the authority.

    Raises:
        PortInUse: somebody listens there already.
        LaunchError: nobody could listen there: not a name or address of this machine, or not allowed.
    """
    if gateway.port == 0:
        return
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(gateway.host, gateway.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        said = error.strerror or str(error)
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(f"gateway.port: cannot listen on {gateway.host}:{gateway.port}: {said}") from error
        if isinstance(error, PermissionError):
            raise LaunchError(f"gateway.port: not allowed to listen on port {gateway.port}: {said}") from error
        raise LaunchError(f"gateway.host: cannot listen on {gateway.host}: {said}") from error
