"""Models that come with HetServe are found by their names, wherever the server's folders lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.preflight import check
from core.config import ClusterConfig, parse_config
from core.errors import ModelError
from hetserve.models import DEMO, DEMO_DRAFT
from instance.embedded import NAMES, embedded_folder, is_embedded
from instance.model_source import found_here, model_folder, named_as_asked


def put(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_in_a_checkout_they_are_beside_the_servers_folders_in_a_wheel_around_them(tmp_path: Path, name: str) -> None:
    checkout, wheel = tmp_path / "checkout", tmp_path / "site-packages" / "hetserve" / "_app"
    beside, around = put(checkout / "hetserve" / "models" / name), put(wheel.parent / "models" / name)
    assert embedded_folder(name, checkout) == beside
    assert embedded_folder(name, wheel) == around


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_an_installation_that_lacks_one_says_which_file(tmp_path: Path, missing: str) -> None:
    folder = put(tmp_path / "hetserve" / "models" / "demo")
    (folder / missing).unlink()
    with pytest.raises(ModelError, match=f"demo comes with HetServe, but .*{missing} is not there"):
        embedded_folder("demo", tmp_path)


def test_the_face_and_the_server_mean_the_same_folders() -> None:
    assert (str(DEMO), str(DEMO_DRAFT)) == (model_folder("demo"), model_folder("demo-draft"))


def test_only_the_bare_name_is_embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert model_folder("./demo") == "./demo"
    assert model_folder(str(tmp_path / "demo")) == str(tmp_path / "demo")
    assert not any(map(is_embedded, ("./demo", "Demo", "demo/", "org/demo", "")))


def test_it_is_served_by_its_name_and_found_by_each_process_where_there_are_several_machines(
    configure: Callable[..., ClusterConfig],
) -> None:
    config = named_as_asked(parse_config({"model": "demo", "gateway": {"port": 0}, "pools": [{"role": "mixed"}]}))
    assert config.gateway.served_model_name == "demo"
    check(config)  # the name alone: nothing is looked up on this machine
    found = found_here(config)
    assert found.model == str(DEMO)
    check(found)
    named = configure({"role": "mixed"}, model="demo", gateway={"served_model_name": "small"})
    assert named_as_asked(named).gateway.served_model_name == "small"
