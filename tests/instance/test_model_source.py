from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from cluster.fleet import environment
from cluster.gateway_process import GatewayProcess, GatewaySpec
from cluster.launch import Cluster
from cluster.preflight import check
from core.config import ClusterConfig, Role
from core.errors import ModelError
from instance.instance import Instance
from instance.model_source import found_here, is_hub_id, model_folder, named_as_asked
from instance.spec import InstanceSpec
from mail.keys import ClusterKeys

ROOT = Path(__file__).parents[2]
COMMIT = "0e9e39f249a16976918f6564b8830bc894c89659"
KEYS = ClusterKeys.generate()
ID = "meta-llama/Llama-3.1-8B-Instruct"


class FakeHub:
    """A cache folder, and a Hub that completes it when asked."""

    def __init__(self, cache: Path, *cached: str, error: Exception | None = None) -> None:
        self.cache = cache
        self.error = error
        self.calls: list[bool] = []
        self.patterns: list[list[str]] = []
        for name in cached:
            self.put(name)

    def put(self, name: str, text: str = "{}") -> None:
        self.cache.mkdir(exist_ok=True)
        (self.cache / name).write_text(text)

    def __call__(self, model: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        assert model == ID
        self.calls.append(local_files_only)
        self.patterns.append(allow_patterns)
        if not local_files_only:
            if self.error is not None:
                raise self.error
            for name in ("config.json", "tokenizer.json", "model.safetensors"):
                self.put(name)
        elif not self.cache.is_dir():
            raise LocalEntryNotFoundError("nothing in the cache")
        return str(self.cache)


ASK = f"""
from instance.model_source import model_folder
try:
    print(model_folder("{ID}"))
except Exception as error:
    print(type(error).__name__, error)
"""


def ask_the_real_client(**variables: str) -> str:
    """What a process with these variables says: the client reads them when it is imported."""
    environment = os.environ | variables
    return subprocess.run(
        [sys.executable, "-c", ASK], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    ).stdout


@pytest.fixture
def broken_hub() -> Iterator[tuple[str, list[str]]]:
    """Its URL, and what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(503)
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_folder_is_used_as_it_is_even_if_its_name_looks_like_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    hub = FakeHub(tmp_path / "cache")
    assert model_folder("org/name", download=hub) == "org/name"
    assert model_folder(str(tmp_path), download=hub) == str(tmp_path)
    assert hub.calls == []


@pytest.mark.parametrize("model", ["/models/llama", "./models/llama", "~/llama", "a/b/c", "llama", "../llama", "org/"])
def test_paths_are_not_ids(model: str) -> None:
    assert not is_hub_id(model)


def test_an_id_is_downloaded_once_and_then_comes_from_the_cache(tmp_path: Path) -> None:
    hub = FakeHub(tmp_path / "cache")
    assert model_folder(ID, download=hub) == str(hub.cache)
    assert hub.calls == [True, False]
    assert {"*.safetensors", "*.json", "*.jinja"} <= set(hub.patterns[-1])
    assert model_folder(ID, download=hub) == str(hub.cache)
    assert hub.calls == [True, False, True]


@pytest.mark.parametrize("cached", [("config.json",), ("config.json", "tokenizer.json"), ("tokenizer.json", "a.safetensors")])
def test_a_download_that_was_cut_off_is_completed(tmp_path: Path, cached: tuple[str, ...]) -> None:
    hub = FakeHub(tmp_path / "cache", *cached)
    model_folder(ID, download=hub)
    assert hub.calls == [True, False]


def test_every_shard_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    hub = FakeHub(tmp_path / "cache", "config.json", "tokenizer.json", "one.safetensors")
    hub.put("model.safetensors.index.json", json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    model_folder(ID, download=hub)
    assert hub.calls == [True, False]
    hub.put("two.safetensors")
    model_folder(ID, download=hub)
    assert hub.calls == [True, False, True]


def test_a_gateway_asks_for_no_weights(tmp_path: Path) -> None:
    hub = FakeHub(tmp_path / "cache", "config.json", "tokenizer.json")
    assert model_folder(ID, weights=False, download=hub) == str(hub.cache)
    assert hub.calls == [True]
    assert "*.safetensors" not in hub.patterns[0]


@pytest.mark.parametrize(
    "error", [OSError("no route to host\nlong advice"), ValueError("no route to host"), RuntimeError("no route to host")]
)
def test_what_cannot_be_had_is_named_with_the_reason(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(ModelError, match=f"model: {ID} .*: no route to host$"):
        model_folder(ID, download=FakeHub(tmp_path / "cache", error=error))


def test_the_hub_is_not_asked_by_whoever_says_offline(tmp_path: Path) -> None:
    said = ask_the_real_client(HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert f"model: {ID} is no folder here" in said
    assert "offline" in said.lower() or "outgoing traffic" in said


def test_a_hub_that_answers_nothing_but_errors_is_asked_once(tmp_path: Path, broken_hub: tuple[str, list[str]]) -> None:
    url, asked = broken_hub
    assert "503" in ask_the_real_client(HF_HOME=str(tmp_path), HF_HUB_OFFLINE="0", HF_ENDPOINT=url)
    assert len([path for path in asked if ID in path]) == 1


def test_clients_call_the_model_by_its_id_unless_it_has_another_name(configure: Callable[..., ClusterConfig]) -> None:
    pool = {"role": "mixed"}
    assert named_as_asked(configure(pool, model=ID)).gateway.served_model_name == ID
    named = configure(pool, model=ID, gateway={"port": 0, "served_model_name": "mine"})
    assert named_as_asked(named) is named
    folder = configure(pool)
    assert named_as_asked(folder) is folder


def test_the_folder_found_here_replaces_the_id_and_changes_nothing_else(
    tmp_path: Path, configure: Callable[..., ClusterConfig]
) -> None:
    config = configure({"role": "mixed"}, model=ID)
    found = found_here(config, download=FakeHub(tmp_path / "cache"))
    assert found == config.model_copy(update={"model": str(tmp_path / "cache")})


def test_only_who_has_to_find_a_model_may_use_the_network(tmp_path: Path) -> None:
    assert environment(1, (), str(tmp_path))["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in environment(1, (), ID)


def test_an_id_passes_the_launchers_checks_on_a_cluster_and_is_looked_for_at_once_on_one_machine(
    configure: Callable[..., ClusterConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = configure({"role": "mixed"}, model=ID)
    check(config)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    asked: list[dict[str, Any]] = []

    def refuse(model: str, **wanted: Any) -> str:
        asked.append({"model": model, **wanted})
        raise OSError("no network")

    monkeypatch.setattr("instance.model_source._from_hub", refuse)
    cluster = Cluster(config)
    with pytest.raises(ModelError, match=f"{ID} .*: no network"):
        cluster.prepare()
    assert [call["model"] for call in asked] == [ID]


def test_the_real_client_finds_what_is_in_its_cache_without_a_network(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / f"models--{ID.replace('/', '--')}" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (snapshot / name).write_text("{}")
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    assert ask_the_real_client(HF_HOME=str(tmp_path), HF_ENDPOINT="http://127.0.0.1:9").strip() == str(snapshot)


def test_an_instance_and_a_gateway_find_the_model_on_their_own_machine_and_keep_its_name(
    tmp_path: Path, configure: Callable[..., ClusterConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub(tmp_path / "cache")
    monkeypatch.setattr("instance.model_source._from_hub", hub)
    config = named_as_asked(configure({"role": "decode"}, model=ID))
    instance = Instance(InstanceSpec("decode-0", 1, Role.DECODE, "CPU", config, 0, KEYS))
    instance.start()
    try:
        beat = instance._beat()
    finally:
        instance.stop()
    assert beat.model == ID
    assert beat.fingerprint == "simulated-cache"
    gateway = GatewayProcess(GatewaySpec("gateway", 1, config, KEYS))
    assert gateway._service._model_path == hub.cache
    assert gateway._service._config.gateway.served_model_name == ID
