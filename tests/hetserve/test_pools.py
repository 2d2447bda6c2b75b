from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hetserve.commands.pools import PoolFlags, visible_gpus, with_flags
from hetserve.commands.usage import UsageError


def pools(flags: PoolFlags, gpus_here: int = 0, local: bool = True, **data: Any) -> dict[str, Any]:
    return with_flags(data, flags, local=local, gpus_here=gpus_here)


def roles(data: dict[str, Any]) -> dict[str, int]:
    return {pool["role"]: pool["replicas"] for pool in data["pools"]}


@pytest.mark.parametrize(
    ("replicas", "expected"),
    [
        ({}, {"prefill": 1, "decode": 1}),
        ({"prefill": 2, "decode": 3}, {"prefill": 2, "decode": 3}),
        ({"decode": 2}, {"prefill": 1, "decode": 2}),
        ({"prefill": 0}, {"decode": 1}),
        ({"mixed": 2}, {"mixed": 2}),
        ({"mixed": 1, "decode": 1}, {"prefill": 1, "decode": 1, "mixed": 1}),
    ],
)
def test_counts_of_each_role(replicas: dict[str, int | None], expected: dict[str, int]) -> None:
    assert roles(pools(PoolFlags(replicas=replicas))) == expected


@pytest.mark.parametrize(("gpus", "share"), [(4, 1.0), (2, 1.0), (1, 0.5)])
def test_gpus_of_this_machine_are_shared_out(gpus: int, share: float) -> None:
    data = pools(PoolFlags(), gpus_here=gpus)
    assert [pool["resources"]["gpus"] for pool in data["pools"]] == [share, share]
    assert data["engine"].get("memory_utilization") == (None if share == 1.0 else 0.45)


def test_shares_never_add_up_to_more_than_there_is() -> None:
    data = pools(PoolFlags(replicas={"prefill": 1, "decode": 2}), gpus_here=2)
    assert sum(pool["resources"]["gpus"] * pool["replicas"] for pool in data["pools"]) <= 2


def test_no_gpu_means_none_is_asked_for() -> None:
    assert all("resources" not in pool for pool in pools(PoolFlags())["pools"])


def test_gpus_of_another_cluster_are_not_guessed_but_an_accelerator_implies_one() -> None:
    data = pools(PoolFlags(accelerators={"prefill": "H100", "decode": "L40S, A10G"}), gpus_here=8, local=False)
    prefill, decode = data["pools"]
    assert (prefill["accelerator"], prefill["resources"]["gpus"]) == ("H100", 1.0)
    assert decode["accelerator"] == ["L40S", "A10G"]
    assert "resources" not in pools(PoolFlags(), gpus_here=8, local=False)["pools"][0]


def test_flags_change_a_files_pools_in_place() -> None:
    file = [{"role": "prefill", "replicas": 1}, {"role": "decode", "replicas": 1, "labels": {"a": "b"}}]
    data = pools(PoolFlags(replicas={"decode": 4}, gpus=2.0), pools=file)
    assert data["pools"][1] == {"role": "decode", "replicas": 4, "labels": {"a": "b"}, "resources": {"gpus": 2.0}}
    assert file[1]["replicas"] == 1
    assert pools(PoolFlags(), pools=file)["pools"] == file


def test_a_flag_for_one_of_several_pools_is_refused() -> None:
    file = [{"role": "decode", "replicas": 1}, {"role": "decode", "replicas": 2}]
    with pytest.raises(UsageError, match="2 decode pools"):
        pools(PoolFlags(replicas={"decode": 4}), pools=file)


@pytest.mark.parametrize(("visible", "count"), [(None, 2), ("0", 1), ("", 0), ("-1", 0), ("0,1,3", 3)])
def test_visible_gpus_obey_the_environment(tmp_path: Path, visible: str | None, count: int) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert visible_gpus(environment, tmp_path) == count
