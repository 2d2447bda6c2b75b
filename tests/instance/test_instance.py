"""A prefill and a decode instance, with real mailboxes and TCP between them, serve what one instance alone would."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.errors import DeadlineExceeded, InvalidRequest, LeaseExpired, Unavailable
from core.messages import Address
from core.request import FinishReason
from core.sampling import SamplingParams
from engine.plan import Handle, LayerListener, StepPlan
from mail.keys import ClusterKeys
from tests.support.gateway import ScriptedGateway
from tests.support.instances import Instances, simulated_config

KEYS = ClusterKeys.generate()
PROMPTS = [[(7 * i + 3 * j) % 1000 for j in range(length)] for i, length in enumerate((1, 15, 16, 17, 100, 333, 64, 5))]


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    with ScriptedGateway(KEYS) as gateway:
        yield gateway


def start(tmp_path: Path, *roles: str, engine: dict[str, Any] | None = None, lease_s: float = 5.0) -> Instances:
    return Instances(simulated_config(tmp_path, *roles, engine=engine, transfer={"lease_s": lease_s}), keys=KEYS)


def alone(gateway: ScriptedGateway, decode: Address, sampling: SamplingParams) -> list[list[int]]:
    attempts = [gateway.submit(prompt, sampling, prefill=None, decode=decode) for prompt in PROMPTS]
    return [generation.output for generation in gateway.wait(*attempts)]


@pytest.mark.parametrize("roles", [("prefill", "decode"), ("mixed", "mixed")])
def test_a_pair_writes_what_one_instance_writes(tmp_path: Path, gateway: ScriptedGateway, roles: tuple[str, str]) -> None:
    sampling = SamplingParams(max_tokens=12, seed=4)
    with start(tmp_path, *roles) as instances:
        prefill, decode = instances.addresses
        expected = alone(gateway, decode, sampling)
        attempts = [gateway.submit(prompt, sampling, prefill=prefill, decode=decode) for prompt in PROMPTS]
        generations = gateway.wait(*attempts)
        assert [generation.output for generation in generations] == expected
        for generation in generations:
            assert generation.by == {0: prefill.name} | dict.fromkeys(range(1, 12), decode.name)
            assert generation.finish is FinishReason.LENGTH
            assert not generation.repeated
        assert instances.settled() == []


@pytest.mark.parametrize("transport", ["tcp", "shm", "distributed"])
def test_kv_goes_by_the_transport_that_is_forced(
    tmp_path: Path, gateway: ScriptedGateway, transport: str, caplog: pytest.LogCaptureFixture
) -> None:
    sampling = SamplingParams(max_tokens=12, seed=4)
    config = simulated_config(tmp_path, "prefill", "decode", transfer={"transport": transport})
    with caplog.at_level("INFO"), Instances(config, keys=KEYS) as instances:
        prefill, decode = instances.addresses
        attempts = [gateway.submit(prompt, sampling, prefill=prefill, decode=decode) for prompt in PROMPTS]
        generations = gateway.wait(*attempts)
        assert all(generation.served[decode.name].kv_bytes for generation in generations)
        assert [generation.output for generation in generations] == alone(gateway, decode, sampling)
        assert instances.settled() == []
    name = "inline" if transport == "tcp" else transport
    assert any(f"goes by {name}" in message for message in caplog.messages)


def test_the_bytes_that_move_are_those_of_the_uncached_prompt(tmp_path: Path, gateway: ScriptedGateway) -> None:
    bytes_per_token = 3 * 2 * 16 * 4
    with start(tmp_path, "prefill", "decode") as instances:
        prefill, decode = instances.addresses
        for cached in (0, 96):
            (generation,) = gateway.wait(gateway.submit(PROMPTS[4], SamplingParams(max_tokens=3), prefill=prefill, decode=decode))
            served = generation.served[decode.name]
            assert (served.cached_tokens, served.kv_bytes) == (cached, (100 - cached) * bytes_per_token)
        assert instances.settled() == []


def test_a_full_decode_instance_makes_grants_wait_and_loses_nothing(tmp_path: Path, gateway: ScriptedGateway) -> None:
    sampling = SamplingParams(max_tokens=30)
    small = {"kv_bytes": 40 * 16 * 3 * 2 * 16 * 4, "prefix_cache": False}  # 40 blocks
    with start(tmp_path, "prefill", "decode", engine=small) as instances:
        prefill, decode = instances.addresses
        attempts = [gateway.submit(prompt, sampling, prefill=prefill, decode=decode) for prompt in PROMPTS * 4]
        generations = gateway.wait(*attempts)
        assert not any(generation.failures for generation in generations)
        assert all(len(generation.output) == 30 for generation in generations)
        assert instances.settled() == []


def test_a_prompt_that_ends_with_its_first_token_moves_no_sequence(tmp_path: Path, gateway: ScriptedGateway) -> None:
    with start(tmp_path, "prefill", "decode") as instances:
        prefill, decode = instances.addresses
        attempts = [gateway.submit(p, SamplingParams(max_tokens=1), prefill=prefill, decode=decode) for p in PROMPTS]
        for generation in gateway.wait(*attempts):
            assert generation.by == {0: prefill.name}
            assert generation.finish is FinishReason.LENGTH
        assert instances.settled() == []


def test_a_replayed_attempt_goes_on_where_the_first_one_stopped(tmp_path: Path, gateway: ScriptedGateway) -> None:
    sampling = SamplingParams(max_tokens=20, seed=9)
    with start(tmp_path, "prefill", "decode") as instances:
        prefill, decode = instances.addresses
        (whole,) = gateway.wait(gateway.submit(PROMPTS[3], sampling, prefill=prefill, decode=decode))
        for delivered in (1, 7, 19):
            attempt = gateway.submit(PROMPTS[3], sampling, prefill=prefill, decode=decode, delivered=whole.output[:delivered])
            (rest,) = gateway.wait(attempt)
            assert sorted(rest.tokens) == list(range(delivered, 20))
            assert rest.output == whole.output[delivered:]
        assert instances.settled() == []


@pytest.mark.parametrize("tokens_before", [0, 1, 3])
def test_cancel_frees_everything_at_every_stage(tmp_path: Path, gateway: ScriptedGateway, tokens_before: int) -> None:
    with start(tmp_path, "prefill", "decode") as instances:
        prefill, decode = instances.addresses
        attempts = [gateway.submit(prompt, SamplingParams(max_tokens=1000), prefill=prefill, decode=decode) for prompt in PROMPTS]
        for attempt in attempts:
            gateway.wait_for_token(attempt, tokens_before)
            gateway.cancel(attempt, prefill, decode)
        assert instances.settled() == []


def test_when_the_decode_side_dies_the_prefill_side_frees_within_its_lease(tmp_path: Path, gateway: ScriptedGateway) -> None:
    small = {"kv_bytes": 24 * 16 * 3 * 2 * 16 * 4, "prefix_cache": False}
    with start(tmp_path, "prefill", "decode", engine=small, lease_s=0.4) as instances:
        prefill, decode = instances.addresses
        sampling = SamplingParams(max_tokens=200)
        blocker = gateway.submit(PROMPTS[4], sampling, prefill=prefill, decode=decode)
        gateway.wait_for_token(blocker, 2)
        instances.running.pop(decode.name).stop()
        attempt = gateway.submit(PROMPTS[4], sampling, prefill=prefill, decode=decode)
        (generation,) = gateway.wait(attempt)
        assert generation.failures[0].code == LeaseExpired.code
        assert instances.settled() == []


def test_when_the_prefill_side_dies_the_decode_side_frees_within_its_lease(tmp_path: Path, gateway: ScriptedGateway) -> None:
    with start(tmp_path, "prefill", "decode", lease_s=0.4) as instances:
        prefill, decode = instances.addresses
        instances.running.pop(prefill.name).stop()
        (generation,) = gateway.wait(gateway.submit(PROMPTS[4], SamplingParams(max_tokens=5), prefill=prefill, decode=decode))
        assert generation.failures[0].code == LeaseExpired.code
        assert instances.settled() == []


def test_an_attempt_past_its_deadline_ends_with_one_typed_error(tmp_path: Path, gateway: ScriptedGateway) -> None:
    with start(tmp_path, "prefill", "decode") as instances:
        prefill, decode = instances.addresses
        attempt = gateway.submit(PROMPTS[4], SamplingParams(max_tokens=1900), prefill=prefill, decode=decode, deadline_s=0.2)
        (generation,) = gateway.wait(attempt)
        assert {failure.code for failure in generation.failures} == {DeadlineExceeded.code}  # of either half, or both
        assert instances.settled() == []


@pytest.mark.parametrize("pair", [True, False])
def test_what_cannot_be_served_is_refused_and_disturbs_nothing(tmp_path: Path, gateway: ScriptedGateway, pair: bool) -> None:
    with start(tmp_path, "prefill", "decode") as instances:
        prefill, decode = instances.addresses
        side = prefill if pair else None
        long = SamplingParams(max_tokens=900)
        good = gateway.submit(PROMPTS[5], long, prefill=side, decode=decode)
        for prompt, sampling in (
            ([1] * 3000, SamplingParams()),
            ([1000], SamplingParams()),
            (PROMPTS[1], SamplingParams(max_tokens=100_000)),
            (PROMPTS[1], SamplingParams(logit_bias={5000: 1.0})),
        ):
            (bad,) = gateway.wait(gateway.submit(prompt, sampling, prefill=side, decode=decode))
            assert bad.failures[0].code in (InvalidRequest.code, "context_length_exceeded")
            assert not bad.tokens
        (served,) = gateway.wait(good)
        assert len(served.output) == 900
        assert instances.settled() == []


def test_a_draining_instance_finishes_what_it_has_and_refuses_the_rest(tmp_path: Path, gateway: ScriptedGateway) -> None:
    with start(tmp_path, "decode") as instances:
        (decode,) = instances.addresses
        old = gateway.submit(PROMPTS[1], SamplingParams(max_tokens=100), prefill=None, decode=decode)
        gateway.wait_for_token(old, 1)
        assert instances.running[decode.name].drain(timeout_s=20.0)
        (new,) = gateway.wait(gateway.submit(PROMPTS[1], SamplingParams(), prefill=None, decode=decode))
        assert new.failures[0].code == Unavailable.code
        (served,) = gateway.wait(old)
        assert len(served.output) == 100


def test_heartbeats_introduce_an_instance_and_say_how_it_is(tmp_path: Path, gateway: ScriptedGateway) -> None:
    config = simulated_config(tmp_path, "prefill", "decode", health={"heartbeat_s": 0.02})
    with Instances(config, [gateway.address], keys=KEYS) as instances:
        decode = instances.addresses[1]
        attempt = gateway.submit(PROMPTS[1], SamplingParams(max_tokens=400), prefill=None, decode=decode)
        gateway.wait(attempt)
        while gateway.heartbeats.get(decode.name) is None or gateway.heartbeats[decode.name].load.running:
            gateway.pump(0.05)
        beat = gateway.heartbeats[decode.name]
        assert (beat.role, beat.worker.incarnation, beat.max_model_len) == ("decode", 1, 2048)
        assert beat.load.steps >= 400
        assert beat.load.free_blocks == beat.total_blocks


def test_a_step_longer_than_the_lease_costs_nobody_a_transfer(tmp_path: Path, gateway: ScriptedGateway) -> None:
    config = simulated_config(tmp_path, "prefill", "mixed", cost={"prefill_token_s": 0.005}, transfer={"lease_s": 1.2})
    with Instances(config, keys=KEYS) as instances:
        prefill, decode = instances.addresses
        sampling = SamplingParams(max_tokens=3)
        prompts = [[(i + j) % 1000 for j in range(100)] for i in range(4)]  # steps of up to 2 s, a layer in a third of that
        local = [gateway.submit(prompts[0][:90], sampling, prefill=None, decode=decode)]
        pairs = [gateway.submit(prompt, sampling, prefill=prefill, decode=decode) for prompt in prompts]
        assert not any(generation.failures for generation in gateway.wait(*local, *pairs))
        assert instances.settled() == []


def test_kv_leaves_while_later_layers_still_compute(tmp_path: Path, gateway: ScriptedGateway) -> None:
    config = simulated_config(tmp_path, "prefill", "decode", cost={"step_s": 0.3})
    with Instances(config, keys=KEYS) as instances:
        prefill, decode = instances.addresses
        (generation,) = gateway.wait(gateway.submit(PROMPTS[4], SamplingParams(max_tokens=2), prefill=prefill, decode=decode))
        assert generation.served[decode.name].transfer_s > 0.15  # three layers, 0.1 s apart, of one chunk


class Broken(Exception):
    """What a device that is gone raises."""


def test_a_device_that_is_gone_ends_the_instance(tmp_path: Path, gateway: ScriptedGateway) -> None:
    with start(tmp_path, "decode") as instances:
        (decode,) = instances.addresses
        instance = instances.running[decode.name]

        def launch(*_: object) -> None:
            raise Broken

        instance._model.runner.launch = launch
        for prompt in PROMPTS[:3]:
            (failed,) = gateway.wait(gateway.submit(prompt, SamplingParams(), prefill=None, decode=decode))
            assert failed.failures[0].code == "engine_fault"
        with pytest.raises(Unavailable, match="died"):
            instance.wait()


def test_a_request_that_breaks_its_steps_ends_alone(tmp_path: Path, gateway: ScriptedGateway) -> None:
    with start(tmp_path, "decode") as instances:
        (decode,) = instances.addresses
        runner = instances.running[decode.name]._model.runner
        healthy = runner.launch

        def launch(plan: StepPlan, on_layer: LayerListener | None = None) -> Handle:
            step = healthy(plan, on_layer)
            if any(admitted.tokens[0] == 666 for admitted in plan.admitted):
                raise Broken
            return step

        runner.launch = launch
        for _ in range(7):
            (failed,) = gateway.wait(gateway.submit([666], SamplingParams(), prefill=None, decode=decode))
            assert failed.failures[0].code == "engine_fault"
        (served,) = gateway.wait(gateway.submit(PROMPTS[1], SamplingParams(max_tokens=5), prefill=None, decode=decode))
        assert len(served.output) == 5
        assert instances.settled() == []
