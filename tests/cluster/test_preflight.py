from __future__ import annotations

import errno
import json
import socket
from pathlib import Path

import pytest

from cluster.preflight import check_model, check_port
from core.config import GatewayConfig
from core.errors import LaunchError, ModelError, PortInUse


def write(folder: Path, *names: str, config: object = None) -> str:
    (folder / "config.json").write_text(json.dumps(config or {"architectures": ["LlamaForCausalLM"]}))
    for name in names:
        (folder / name).write_text("{}")
    return str(folder)


def test_a_whole_model_folder_passes(tmp_path: Path) -> None:
    check_model(write(tmp_path, "tokenizer.json", "model.safetensors"))


def test_simulated_instances_need_no_weights(tmp_path: Path) -> None:
    folder = write(tmp_path, "tokenizer.json")
    check_model(folder, weights=False)
    with pytest.raises(ModelError, match="no weights"):
        check_model(folder)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a folder"):
        check_model("meta-llama/Llama-3-8B/main")
    with pytest.raises(ModelError, match=r"no config\.json"):
        check_model(str(tmp_path))
    with pytest.raises(ModelError, match="no tokenizer"):
        check_model(write(tmp_path, "model.safetensors"))
    with pytest.raises(ModelError, match="names no architecture"):
        check_model(write(tmp_path, config={"hidden_size": 8}))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        check_model(str(tmp_path))


def test_a_port_that_somebody_listens_on_is_refused_and_a_free_one_is_left_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortInUse, match=f"127.0.0.1:{port}"):
            check_port(GatewayConfig(port=port))
    check_port(GatewayConfig(port=port))
    socket.create_server(("127.0.0.1", port)).close()


def test_any_port_is_never_in_use() -> None:
    check_port(GatewayConfig(port=0))


def test_a_host_that_is_not_ours_cannot_be_listened_on_and_is_not_called_in_use() -> None:
    with pytest.raises(LaunchError, match=r"gateway\.host: cannot listen on 192\.0\.2\.77: .*assign") as refused:
        check_port(GatewayConfig(host="192.0.2.77", port=8000, api_key="a-long-key"))
    assert not isinstance(refused.value, PortInUse)


def test_a_host_that_has_no_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unresolvable(*_: object, **__: object) -> object:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unresolvable)
    with pytest.raises(LaunchError, match=r"gateway\.host: cannot listen on nowhere: Name or service not known") as refused:
        check_port(GatewayConfig(host="nowhere", port=8000, api_key="a-long-key"))
    assert not isinstance(refused.value, PortInUse)


def test_a_port_that_is_not_allowed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_self: socket.socket, _address: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(LaunchError, match="not allowed to listen on port 80: Permission denied") as refused:
        check_port(GatewayConfig(port=80))
    assert not isinstance(refused.value, PortInUse)
