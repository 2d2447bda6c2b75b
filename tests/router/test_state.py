"""What the router believes of the cluster, beat by beat."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ProtocolError
from router.state import ClusterState


@pytest.fixture
def state() -> ClusterState:
    return ClusterState(dead_after_s=1.5, stuck_after_s=3.0)


def test_a_heartbeat_makes_an_instance_visible(state, beat):
    state.observe(beat("d0"), 0.0)
    assert [item.name for item in state.snapshot().decode] == ["d0"]
    assert state.snapshot().prefill == ()


def test_a_mixed_instance_can_take_either_side(state, beat):
    state.observe(beat("m0", role="mixed"), 0.0)
    assert [item.name for item in state.snapshot().decode] == [item.name for item in state.snapshot().prefill] == ["m0"]


def test_an_older_incarnation_is_ignored_even_after_the_newer_one_died(state, beat):
    state.observe(beat("d0", incarnation=2), 0.0)
    assert state.observe(beat("d0", incarnation=1), 0.1) is None
    assert state.snapshot().instances[0].key == ("d0", 2)
    assert state.sweep(10.0) == [("d0", 2)]
    state.observe(beat("d0", incarnation=1), 10.1)
    assert state.snapshot().instances == ()


def test_a_newer_incarnation_replaces_the_older_and_names_it(state, beat):
    state.observe(beat("d0", incarnation=1), 0.0)
    assert state.observe(beat("d0", incarnation=2), 0.1) == ("d0", 1)
    assert [item.key for item in state.snapshot().instances] == [("d0", 2)]


def test_silence_is_death_and_a_beat_is_life_again(state, beat):
    state.observe(beat("d0"), 0.0)
    assert state.sweep(1.5) == []
    assert state.sweep(1.6) == [("d0", 1)]
    assert state.snapshot().instances == ()
    state.observe(beat("d0"), 2.0)
    assert len(state.snapshot().decode) == 1


def test_what_nobody_listened_to_is_no_silence(state, beat):
    state.observe(beat("d0"), 0.0)
    state.observe(beat("d1", running=2, steps=7), 1.0)
    state.was_deaf(60.0, 61.0)
    assert state.sweep(61.0) == []
    assert state.sweep(61.6) == [("d0", 1)]
    assert state.sweep(62.6) == [("d1", 1)]


def test_a_busy_instance_that_makes_no_step_is_stuck_once_until_it_steps(state, beat):
    lost = []
    for tenth in range(35):
        state.observe(beat("d0", running=2, steps=7), tenth / 10)
        lost += state.sweep(tenth / 10)
    assert lost == [("d0", 1)]
    assert state.snapshot().decode == ()
    assert state.snapshot().instances[0].stuck
    state.observe(beat("d0", running=2, steps=8), 3.6)
    assert len(state.snapshot().decode) == 1


def test_prompts_that_wait_for_a_loop_that_makes_no_step_are_stuck_too(state, beat):
    lost = []
    for tenth in range(35):
        state.observe(beat("d0", waiting=4, waiting_tokens=900, steps=7), tenth / 10)
        lost += state.sweep(tenth / 10)
    assert lost == [("d0", 1)]


def test_an_instance_that_says_that_it_hangs_is_stuck_at_its_word_even_without_work(state, beat):
    state.observe(beat("d0", stalled_s=2.9), 0.0)
    assert state.sweep(0.0) == []
    state.observe(beat("d0", stalled_s=3.1), 0.2)
    assert state.sweep(0.2) == [("d0", 1)]
    assert state.snapshot().decode == ()
    state.observe(beat("d0", stalled_s=3.3), 0.4)
    assert state.sweep(0.4) == []
    assert state.snapshot().decode == ()
    state.observe(beat("d0", stalled_s=0.0), 0.6)
    assert len(state.snapshot().decode) == 1


@pytest.mark.parametrize("age", ["stalled_s", "step_age_s"])
def test_a_step_of_a_minute_whose_layers_come_to_their_end_is_no_death(state, beat, age):
    for tenth in range(600):
        state.observe(beat("d0", running=1, steps=7, **{age: tenth % 20 / 10}), tenth / 10)
        assert state.sweep(tenth / 10) == []


def test_a_loop_that_no_longer_comes_round_is_stuck_though_its_age_is_told_anew_at_each_beat(state, beat):
    lost = []
    for tenth in range(35):
        state.observe(beat("d0", waiting=1, steps=7, step_age_s=tenth / 10), tenth / 10)
        lost += state.sweep(tenth / 10)
    assert lost == [("d0", 1)]


def test_heartbeats_out_of_order_are_no_steps(state, beat):
    lost = []
    for tenth in range(40):
        state.observe(beat("d0", running=2, steps=7 if tenth == 0 or tenth % 2 else 6), tenth / 10)
        lost += state.sweep(tenth / 10)
    assert lost == [("d0", 1)]


def test_an_idle_instance_never_gets_stuck(state, beat):
    for second in range(20):
        state.observe(beat("d0", running=0, steps=7), float(second))
        assert state.sweep(float(second)) == []


def test_an_instance_that_just_became_busy_has_the_full_time_to_step(state, beat):
    state.observe(beat("d0", running=0, steps=7), 0.0)
    state.observe(beat("d0", running=1, steps=7), 10.0)
    assert state.sweep(11.0) == []


def test_a_draining_instance_stays_visible_but_gets_nothing_new(state, beat):
    state.observe(beat("d0", draining=True), 0.0)
    assert state.snapshot().decode == ()
    assert len(state.snapshot().instances) == 1


def test_a_new_role_counts_from_the_heartbeat_that_tells_it(state, beat):
    state.observe(beat("m0", role="prefill"), 0.0)
    state.observe(beat("m0", role="decode"), 0.1)
    assert state.snapshot().prefill == ()
    assert [item.name for item in state.snapshot().decode] == ["m0"]
    state.observe(beat("m0", role="mixed"), 0.2)
    assert len(state.snapshot().prefill) == len(state.snapshot().decode) == 1


def test_one_that_turned_work_away_gets_none_before_its_next_heartbeat(state, beat):
    state.observe(beat("m0", role="mixed"), 0.0)
    state.refused(("m0", 2))
    assert not state.snapshot().settling
    state.refused(("m0", 1))
    assert state.snapshot().settling
    assert state.snapshot().prefill == state.snapshot().decode == ()
    state.observe(beat("m0", role="prefill"), 0.1)
    assert not state.snapshot().settling
    assert [item.name for item in state.snapshot().prefill] == ["m0"]


def test_assigned_work_counts_until_a_later_heartbeat_shows_it(state, beat):
    state.observe(beat("d0"), 0.0)
    state.assigned(("d0", 1), 1.0, prefill_tokens=100, sequences=1, context_tokens=116)
    assert state.snapshot().decode[0].waiting_tokens == 100
    state.observe(beat("d0"), 1.01)  # sent before the assignment could have arrived
    assert state.snapshot().decode[0].sequences == 1
    state.observe(beat("d0", running=1), 1.2)
    assert state.snapshot().decode[0].waiting_tokens == 0
    assert state.snapshot().decode[0].sequences == 1


def test_work_assigned_to_a_past_incarnation_is_not_counted_against_the_next(state, beat):
    state.observe(beat("d0", incarnation=2), 0.0)
    state.assigned(("d0", 1), 0.1, 5, 1, 5)
    assert state.snapshot().decode[0].waiting_tokens == 0


def test_kinds_differ_with_fingerprint_and_dtype_but_not_with_block_size(state, beat):
    for name, other in (("a", {}), ("b", {"block_size": 32}), ("c", {"fingerprint": "g"}), ("d", {"dtype": "bfloat16"})):
        state.observe(beat(name, **other), 0.0)
    kinds = {item.name: item.kind for item in state.snapshot().instances}
    assert kinds["a"] == kinds["b"]
    assert len({kinds["a"], kinds["c"], kinds["d"]}) == 3


def test_an_instance_reported_lost_stays_lost_in_that_incarnation(state, beat):
    state.observe(beat("d0"), 0.0)
    assert state.lose(("d0", 1))
    assert not state.lose(("d0", 1))
    state.observe(beat("d0", incarnation=1), 0.1)
    assert state.snapshot().instances == ()
    state.observe(beat("d0", incarnation=2), 0.2)
    assert len(state.snapshot().instances) == 1


def test_a_snapshot_does_not_change_when_the_cluster_does(state, beat):
    state.observe(beat("d0"), 0.0)
    before = state.snapshot()
    state.observe(beat("d1"), 0.1)
    assert len(before.instances) == 1
    assert len(state.snapshot().instances) == 2


def test_the_context_limit_is_that_of_the_largest_that_decodes(state, beat):
    assert state.snapshot().max_model_len is None
    state.observe(beat("p0", role="prefill", max_model_len=1 << 20, total_blocks=1 << 20), 0.0)
    assert state.snapshot().max_model_len is None
    state.observe(beat("d0", max_model_len=4096, total_blocks=200), 0.0)
    assert state.snapshot().max_model_len == 200 * 16
    state.observe(beat("d1", max_model_len=512, total_blocks=200), 0.0)
    assert state.snapshot().max_model_len == 200 * 16
    state.observe(beat("m0", role="mixed", max_model_len=4096, total_blocks=999), 0.0)
    assert state.snapshot().max_model_len == 4096


def test_an_unknown_role_is_refused(state, beat):
    with pytest.raises(ProtocolError, match="chef"):
        state.observe(beat("x", role="chef"), 0.0)


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(1, 4), st.floats(0, 2), st.booleans()), min_size=1, max_size=40)
)
def test_visible_incarnations_never_go_back(events):
    state = ClusterState(1.0, 1.0)
    newest: dict[str, int] = {}
    now = 0.0
    for name, incarnation, wait, sweep in events:
        now += wait
        if sweep:
            state.sweep(now)
        state.observe(_plain_beat(name, incarnation), now)
        newest[name] = max(newest.get(name, 0), incarnation)
        for item in state.snapshot().instances:
            assert item.address.incarnation == newest[item.name]


def _plain_beat(name, incarnation):
    from core.cost import CostModel
    from core.layout import KVLayout, LayerShape
    from core.messages import Address, Heartbeat, Load

    return Heartbeat(
        worker=Address(name, incarnation, "tcp://127.0.0.1:1"),
        role="decode",
        accelerator="CPU",
        model="m",
        fingerprint="f",
        layout=KVLayout.whole(layers=(LayerShape(1, 1, 1),), dtype="float32", block_size=1),
        total_blocks=1,
        capacity_tokens=1,
        max_model_len=2,
        max_num_seqs=1,
        kv_endpoint="",
        cost=CostModel(),
        load=Load(),
    )
