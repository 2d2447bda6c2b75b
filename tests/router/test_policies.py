"""What both policies must get right, and what each decides."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.config import Role
from core.cost import CostModel
from core.request import Request
from core.sampling import SamplingParams
from router.admission import Admission
from router.estimate import slot_wait_s
from router.least_ttft import LeastTTFT
from router.policy import Assignment, Demand, Rejection
from router.round_robin import RoundRobin
from router.state import ClusterState

POLICIES = [RoundRobin, LeastTTFT]
every_policy = pytest.mark.parametrize("policy_class", POLICIES)


def ask(prompt_tokens: int = 100, max_tokens: int = 16, delivered: int = 0) -> Demand:
    request = Request(request_id="r", prompt=tuple(range(prompt_tokens)), sampling=SamplingParams(max_tokens=max_tokens))
    return Demand(request, delivered)


def made_of(*beats) -> ClusterState:
    state = ClusterState(1.5, 3.0)
    for heartbeat in beats:
        state.observe(heartbeat, 0.0)
    return state


def policy_of(policy_class, local_prefill_tokens=0, max_waiting_tokens=10_000, max_waiting_requests=100):
    return policy_class(Admission(max_waiting_tokens, max_waiting_requests), local_prefill_tokens)


@every_policy
def test_prefill_and_decode_instances_are_paired(policy_class, beat):
    state = made_of(beat("p0", role="prefill"), beat("d0"))
    found = policy_of(policy_class).assign(ask(), state.snapshot())
    assert isinstance(found, Assignment)
    assert (found.prefill.name, found.decode.name) == ("p0", "d0")
    assert found.ttft_s > 0
    assert found.tpot_s > 0
    assert found.why


@every_policy
def test_a_short_prompt_is_prefilled_where_it_decodes(policy_class, beat):
    state = made_of(beat("p0", role="prefill"), beat("d0"))
    policy = policy_of(policy_class, local_prefill_tokens=100)
    assert policy.assign(ask(100), state.snapshot()).prefill is None
    assert policy.assign(ask(101), state.snapshot()).prefill is not None


@every_policy
def test_without_a_live_prefill_instance_decode_prefills(policy_class, beat):
    state = made_of(beat("p0", role="prefill", draining=True), beat("d0"))
    found = policy_of(policy_class).assign(ask(), state.snapshot())
    assert (found.prefill, found.decode.name) == (None, "d0")


@every_policy
def test_a_mixed_instance_serves_alone(policy_class, beat):
    found = policy_of(policy_class).assign(ask(), made_of(beat("m0", role="mixed")).snapshot())
    assert (found.prefill, found.decode.name) == (None, "m0")


@every_policy
def test_nobody_to_decode_is_unavailable(policy_class, beat):
    found = policy_of(policy_class).assign(ask(), made_of(beat("p0", role="prefill")).snapshot())
    assert isinstance(found, Rejection)
    assert found.error().status == 503


@every_policy
def test_instances_of_different_kinds_are_never_paired(policy_class, beat):
    state = made_of(beat("p0", role="prefill", fingerprint="other"), beat("d0"))
    found = policy_of(policy_class).assign(ask(), state.snapshot())
    assert found.prefill is None


@every_policy
def test_full_queues_are_refused_with_a_time_to_come_back(policy_class, beat):
    state = made_of(beat("m0", role="mixed", waiting=3, waiting_tokens=950))
    policy = policy_of(policy_class, max_waiting_tokens=1000)
    assert isinstance(policy.assign(ask(50), state.snapshot()), Assignment)
    found = policy.assign(ask(51), state.snapshot())
    assert isinstance(found, Rejection)
    assert found.error().status == 429
    assert found.error().retry_after_s >= 1.0


@every_policy
def test_too_many_waiting_requests_are_refused(policy_class, beat):
    state = made_of(beat("m0", role="mixed", running=8, waiting=4, waiting_tokens=4))
    assert isinstance(policy_of(policy_class, max_waiting_requests=4).assign(ask(), state.snapshot()), Rejection)
    assert isinstance(policy_of(policy_class, max_waiting_requests=5).assign(ask(), state.snapshot()), Assignment)


@every_policy
def test_an_empty_queue_takes_a_prompt_above_the_bound(policy_class, beat):
    state = made_of(beat("m0", role="mixed"))
    assert isinstance(policy_of(policy_class, max_waiting_tokens=10).assign(ask(100), state.snapshot()), Assignment)


@every_policy
def test_an_instance_that_could_never_hold_the_context_is_passed_over(policy_class, beat):
    state = made_of(beat("small", total_blocks=5), beat("large", total_blocks=50))
    for _ in range(3):
        assert policy_of(policy_class).assign(ask(100, 100), state.snapshot()).decode.name == "large"


@every_policy
def test_avoided_instances_are_not_chosen(policy_class, beat):
    state = made_of(beat("p0", role="prefill"), beat("d0"), beat("d1"))
    policy = policy_of(policy_class)
    for _ in range(3):
        assert policy.assign(ask(), state.snapshot(), frozenset({("d0", 1)})).decode.name == "d1"
    assert policy.assign(ask(), state.snapshot(), frozenset({("p0", 1)})).prefill is None
    refused = policy.assign(ask(), state.snapshot(), frozenset({("d0", 1), ("d1", 1)}))
    assert isinstance(refused, Rejection)
    assert "d0/1" in refused.reason


def test_round_robin_takes_turns_on_both_sides(beat):
    state = made_of(*(beat(f"p{i}", role="prefill") for i in range(2)), *(beat(f"d{i}") for i in range(3)))
    policy = policy_of(RoundRobin)
    found = [policy.assign(ask(), state.snapshot()) for _ in range(6)]
    assert [item.decode.name for item in found] == ["d0", "d1", "d2"] * 2
    assert [item.prefill.name for item in found] == ["p0", "p1"] * 3


def test_least_ttft_prefers_the_faster_device(beat):
    state = made_of(
        beat("slow", role="prefill", cost=CostModel(prefill_token_s=1e-3)),
        beat("fast", role="prefill", cost=CostModel(prefill_token_s=1e-5)),
        beat("d0"),
    )
    assert policy_of(LeastTTFT).assign(ask(), state.snapshot()).prefill.name == "fast"


def test_least_ttft_leaves_the_faster_device_when_its_queue_is_longer_than_the_difference(beat):
    state = made_of(
        beat("slow", role="prefill", cost=CostModel(prefill_token_s=1e-4)),
        beat("fast", role="prefill", cost=CostModel(prefill_token_s=1e-5), waiting=9, waiting_tokens=5000),
        beat("d0"),
    )
    assert policy_of(LeastTTFT).assign(ask(), state.snapshot()).prefill.name == "slow"


def test_least_ttft_weighs_the_link_that_kv_leaves_by(beat):
    state = made_of(
        beat("thin", role="prefill", cost=CostModel(transfer_bytes_per_s=1e5)),
        beat("thick", role="prefill", cost=CostModel(prefill_token_s=6e-5, transfer_bytes_per_s=1e9)),
        beat("d0"),
    )
    assert policy_of(LeastTTFT).assign(ask(), state.snapshot()).prefill.name == "thick"


def test_least_ttft_chooses_the_decode_instance_with_a_free_slot(beat):
    state = made_of(
        beat("p0", role="prefill"),
        beat("full", cost=CostModel(decode_sequence_s=1e-6), running=8, context_tokens=100),
        beat("free", running=4, context_tokens=500),
    )
    assert policy_of(LeastTTFT).assign(ask(), state.snapshot()).decode.name == "free"


def test_least_ttft_spreads_a_burst_before_any_heartbeat_shows_it(beat):
    state = made_of(beat("p0", role="prefill"), beat("p1", role="prefill"), beat("d0"), beat("d1"))
    policy = policy_of(LeastTTFT)
    chosen = []
    for _ in range(4):
        found = policy.assign(ask(), state.snapshot())
        chosen.append((found.prefill.name, found.decode.name))
        state.assigned(found.prefill.key, 0.1, 100, 0, 0)
        state.assigned(found.decode.key, 0.1, 0, 1, 116)
    assert sorted(chosen) == [("p0", "d0"), ("p0", "d0"), ("p1", "d1"), ("p1", "d1")]


def test_least_ttft_never_pairs_an_instance_with_itself(beat):
    state = made_of(beat("m0", role="mixed", running=5, cost=CostModel(transfer_setup_s=0, transfer_bytes_per_s=1e30)))
    found = policy_of(LeastTTFT).assign(ask(), state.snapshot())
    assert found.prefill is None


@every_policy
def test_no_prompt_goes_to_an_instance_that_no_longer_reads_them(policy_class, beat):
    state = made_of(beat("a", role="prefill"), beat("b", role="prefill", waiting=9, waiting_tokens=5000), beat("d0"))
    state.observe(beat("a", role="decode"), 1.0)
    policy = policy_of(policy_class)
    assert {policy.assign(ask(), state.snapshot()).prefill.name for _ in range(4)} == {"b"}


beats = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["prefill", "decode", "mixed"]),
        "fingerprint": st.sampled_from(["f", "g"]),
        "waiting": st.integers(0, 20),
        "waiting_tokens": st.integers(0, 2000),
        "running": st.integers(0, 12),
        "free_blocks": st.integers(0, 100),
        "draining": st.booleans(),
        "total_blocks": st.sampled_from([5, 100]),
    }
)


@every_policy
@settings(max_examples=60, deadline=None)
@given(cluster=st.lists(beats, max_size=6), prompt=st.integers(1, 300), local=st.sampled_from([0, 64]), avoid=st.integers(0, 6))
def test_every_assignment_is_one_that_can_work(policy_class, beat_factory, cluster, prompt, local, avoid):
    state = made_of(*(beat_factory(f"i{index}", **given) for index, given in enumerate(cluster)))
    avoided = frozenset({(f"i{avoid}", 1)})
    request = ask(prompt)
    found = policy_of(policy_class, local, 1000, 10).assign(request, state.snapshot(), avoided)
    if isinstance(found, Rejection):
        return
    used = [found.decode] + ([found.prefill] if found.prefill else [])
    assert all(item.usable and item.key not in avoided for item in used)
    assert found.decode.role is not Role.PREFILL
    assert request.max_context_tokens <= found.decode.beat.total_blocks * 16
    if found.prefill is not None:
        assert found.prefill.key != found.decode.key
        assert found.prefill.kind == found.decode.kind
        assert found.prefill.role is not Role.DECODE
        assert prompt > local


@pytest.fixture(scope="module")
def beat_factory():
    from core.layout import KVLayout, LayerShape
    from core.messages import Address, Heartbeat, Load

    def make(name, role, fingerprint, total_blocks, **load):
        return Heartbeat(
            worker=Address(name, 1, "tcp://127.0.0.1:1"),
            role=role,
            accelerator="CPU",
            model="m",
            fingerprint=fingerprint,
            layout=KVLayout.whole(layers=(LayerShape(2, 8, 8),), dtype="float32", block_size=16),
            total_blocks=total_blocks,
            capacity_tokens=total_blocks * 16,
            max_model_len=1024,
            max_num_seqs=8,
            kv_endpoint="",
            cost=CostModel(),
            load=Load(**load),
        )

    return make


@pytest.mark.parametrize(
    ("windows", "free_blocks"),
    # Of 161 tokens in blocks of 16, layers that see all need 11, and a window of 33 needs 3. Both of a group share its blocks.
    [((None,), 11), ((None, None), 11), ((33, None), 14), ((33, 33, None), 17), ((33,), 3), ((4000, None), 22)],
)
def test_a_sequence_waits_for_the_blocks_of_every_group_of_layers(beat, windows, free_blocks):
    def wait_s(free_blocks: int) -> float:
        (instance,) = made_of(beat(windows=windows, free_blocks=free_blocks)).snapshot().instances
        return slot_wait_s(instance, 160, 1.0)

    assert wait_s(free_blocks) == 0
    assert wait_s(free_blocks - 1) > 0


def test_a_window_is_counted_for_each_of_those_on_their_way(beat):
    for free_blocks, waits in ((5, False), (4, True)):  # of 66 tokens
        state = made_of(beat(windows=(33,), free_blocks=free_blocks))
        state.assigned(("decode-0", 1), 0.0, 0, 1, 160)
        assert (slot_wait_s(state.snapshot().instances[0], 160, 1.0) > 0) == waits
