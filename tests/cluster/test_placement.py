from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.placement import ACCELERATOR_LABEL, NODE_LABEL, Node, place
from core.config import ClusterConfig, parse_config
from core.errors import NoSuchAccelerator

Configure = Callable[..., ClusterConfig]


def node(name: str, accelerator: str | None = None, cpus: float = 16, gpus: float = 0, **more: float) -> Node:
    total = {"CPU": cpus, "GPU": gpus, **more}
    total = {kind: amount for kind, amount in total.items() if amount}
    labels = {NODE_LABEL: f"id-{name}"} | ({ACCELERATOR_LABEL: accelerator} if accelerator else {})
    return Node(f"id-{name}", name, f"10.0.0.{len(name)}{ord(name[-1])}", labels, total, dict(total))


H100, L40S, A10G = node("h", "H100", gpus=2), node("l", "L40S", gpus=1), node("a", "A10G", gpus=1)
LAPTOP = node("laptop", cpus=2)


def test_each_pool_lands_on_its_own_kind_of_accelerator(configure: Configure) -> None:
    config = configure(
        {"role": "prefill", "replicas": 2, "accelerator": "H100", "resources": {"gpus": 1}},
        {"role": "decode", "replicas": 2, "accelerator": ["L40S", "A10G"], "resources": {"gpus": 1}},
    )
    placements = place(config, [A10G, H100, L40S, LAPTOP])
    assert [placements[name].node for name in ("prefill-0", "prefill-1")] == ["h", "h"]
    assert {placements[name].accelerator for name in ("decode-0", "decode-1")} == {"L40S", "A10G"}
    assert all(placement.device == "cuda" for placement in placements.values())


def test_actor_options_name_the_node_and_the_accelerators_that_would_do(configure: Configure) -> None:
    config = configure(
        {"role": "mixed", "accelerator": ["L40S", "A10G"], "resources": {"gpus": 0.5, "cpus": 2, "custom": {"nic": 1}}}
    )
    placement = place(config, [node("x", "L40S", gpus=1, nic=1), LAPTOP])["mixed-0"]
    assert placement.actor_options() == {
        "num_cpus": 2,
        "num_gpus": 0.5,
        "resources": {"nic": 1},
        "label_selector": {NODE_LABEL: "id-x", ACCELERATOR_LABEL: "in(L40S,A10G)"},
    }


def test_a_pool_that_can_only_use_one_node_is_not_crowded_out_by_one_that_can_use_any(configure: Configure) -> None:
    config = configure(
        {"role": "decode", "accelerator": ["L40S", "A10G"], "resources": {"gpus": 1}},
        {"role": "prefill", "accelerator": "A10G", "resources": {"gpus": 1}},
    )
    placements = place(config, [A10G, L40S])
    assert placements["prefill-0"].accelerator == "A10G"
    assert placements["decode-0"].accelerator == "L40S"


def test_instances_that_share_a_node_divide_its_cores(configure: Configure) -> None:
    config = configure({"role": "prefill"}, {"role": "decode"})
    assert [placement.threads for placement in place(config, [LAPTOP]).values()] == [1, 1]
    spread = place(config, [LAPTOP, node("other", cpus=8)])
    assert {placement.node: placement.threads for placement in spread.values()} == {"laptop": 2, "other": 8}


def test_threads_set_by_hand_win(configure: Configure) -> None:
    config = configure({"role": "mixed"}, engine={"runner": "simulated", "threads": 7})
    assert place(config, [LAPTOP])["mixed-0"].threads == 7


def test_one_machine_stays_on_loopback_and_several_use_their_own_addresses(configure: Configure) -> None:
    config = configure({"role": "mixed", "accelerator": "L40S"})
    assert place(config, [L40S])["mixed-0"].host == "127.0.0.1"
    assert place(config, [L40S, LAPTOP])["mixed-0"].host == L40S.address


def test_cpu_is_the_name_of_nodes_without_an_accelerator(configure: Configure) -> None:
    placement = place(configure({"role": "mixed", "accelerator": "CPU"}), [H100, LAPTOP])["mixed-0"]
    assert (placement.node, placement.device, placement.label_selector) == ("laptop", "cpu", {NODE_LABEL: "id-laptop"})


def test_a_head_node_that_was_given_no_cpus_gets_no_instances(configure: Configure) -> None:
    head = Node("id-head", "head", "10.0.0.1", {}, {"memory": 1e9}, {"memory": 1e9})
    assert place(configure({"role": "mixed"}), [head, LAPTOP])["mixed-0"].node == "laptop"


def test_missing_accelerator_names_the_pool_what_it_asked_for_and_what_there_is(configure: Configure) -> None:
    config = configure({"role": "prefill"}, {"role": "decode", "accelerator": "B200", "resources": {"gpus": 1}})
    with pytest.raises(NoSuchAccelerator) as caught:
        place(config, [LAPTOP, L40S])
    message = str(caught.value)
    assert message.startswith("pools[1]: asked for 1 GPU, accelerator B200")
    assert "1 node with accelerator CPU (2 CPU)" in message
    assert "1 node with accelerator L40S (16 CPU, 1 GPU)" in message


def test_too_few_of_them_is_said_to_be_that(configure: Configure) -> None:
    config = configure({"role": "mixed", "replicas": 3, "accelerator": "H100", "resources": {"gpus": 1}})
    with pytest.raises(NoSuchAccelerator, match=r"pools\[0\]: no room for all 3 .* 1 GPU, accelerator H100.*\(16 CPU, 2 GPU\)"):
        place(config, [H100])


def test_what_others_hold_is_not_there_to_take(configure: Configure) -> None:
    busy = Node("id-b", "b", "10.0.0.9", {ACCELERATOR_LABEL: "L40S"}, {"CPU": 4, "GPU": 1}, {"CPU": 4})
    config = configure({"role": "mixed", "accelerator": "L40S", "resources": {"gpus": 1}})
    with pytest.raises(NoSuchAccelerator, match="of which now free: 1 node with accelerator L40S"):
        place(config, [busy])


def test_labels_must_match_too(configure: Configure) -> None:
    zoned = Node("id-z", "z", "10.0.0.7", {"zone": "b"}, {"CPU": 2}, {"CPU": 2})
    config = configure({"role": "mixed", "labels": {"zone": "b"}})
    placement = place(config, [LAPTOP, zoned])["mixed-0"]
    assert placement.node == "z"
    assert placement.label_selector["zone"] == "b"
    with pytest.raises(NoSuchAccelerator, match="label zone=b"):
        place(config, [LAPTOP])


def test_a_replacement_counts_those_that_are_there_when_it_divides_cores(configure: Configure) -> None:
    config = configure({"role": "prefill"}, {"role": "decode"})
    first = place(config, [node("n", cpus=8)])
    again = place(config, [node("n", cpus=8)], [first["decode-0"].member], [first["prefill-0"]])
    assert set(again) == {"decode-0"}
    assert again["decode-0"].threads == 4


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from(["H100", "L40S", None]), st.integers(0, 4), st.integers(1, 32)), min_size=1, max_size=6),
    st.lists(
        st.tuples(st.sampled_from(["H100", "L40S", None]), st.sampled_from([0, 0.5, 1]), st.integers(1, 5)),
        min_size=1,
        max_size=4,
    ),
)
def test_no_placement_ever_overbooks_a_node_or_breaks_a_constraint(
    kinds: list[tuple[str | None, int, int]], pools: list[tuple[str | None, float, int]]
) -> None:
    nodes = [node(f"n{index}", kind, cpus=cpus, gpus=gpus) for index, (kind, gpus, cpus) in enumerate(kinds)]
    config = parse_config(
        {
            "model": "m",
            "engine": {"runner": "simulated"},
            "pools": [
                {"role": "mixed", "accelerator": kind, "replicas": replicas, "resources": {"gpus": gpus}}
                for kind, gpus, replicas in pools
            ],
        }
    )
    try:
        placements = place(config, nodes)
    except NoSuchAccelerator:
        wanted = Counter({kind: gpus * replicas for kind, gpus, replicas in pools if len(pools) == 1})
        held = {
            kind: sum(n.total.get("GPU", 0) for n in nodes if kind in (None, n.labels.get(ACCELERATOR_LABEL))) for kind in wanted
        }
        enough = wanted and all(held[kind] >= amount for kind, amount in wanted.items())
        there = all(any(kind in (None, n.labels.get(ACCELERATOR_LABEL)) for n in nodes) for kind, _, _ in pools)
        assert not (enough and there), "a lone pool was refused although there is enough"
        return
    by_id = {n.node_id: n for n in nodes}
    used: defaultdict[str, float] = defaultdict(float)
    for placement in placements.values():
        pool = config.pools[placement.member.pool]
        used[placement.node_id] += pool.resources.gpus
        assert pool.accelerator in (None, by_id[placement.node_id].accelerator)
        assert 1 <= placement.threads <= by_id[placement.node_id].total["CPU"]
    assert all(used[node_id] <= by_id[node_id].total.get("GPU", 0) for node_id in used)
    assert len(placements) == sum(pool.replicas for pool in config.pools)
