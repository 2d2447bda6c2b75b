"""Instances change their roles while they serve: what is there goes on, what comes too late is refused at once and tried
elsewhere, and no stream notices."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from core.config import ClusterConfig, Role, parse_config
from core.errors import Unavailable
from core.messages import Address
from core.sampling import SamplingParams
from mail.keys import ClusterKeys
from tests.support.gateway import ScriptedGateway
from tests.support.instances import Instances, simulated_config
from tests.support.reference import generate
from tooling.model_factory import make_model

KEYS = ClusterKeys.generate()
PROMPTS = [[(7 * i + 3 * j) % 500 for j in range(20 + 9 * i)] for i in range(8)]
FLIPS = [
    (Role.PREFILL, Role.DECODE, Role.DECODE),
    (Role.DECODE, Role.PREFILL, Role.DECODE),
    (Role.MIXED, Role.DECODE, Role.PREFILL),
    (Role.DECODE, Role.MIXED, Role.MIXED),
]


@dataclass
class Wish:
    """A stream as its client sees it, whatever attempts it takes."""

    prompt: list[int]
    sampling: SamplingParams
    attempt: str = ""
    output: list[int] = field(default_factory=list)
    retries: int = 0


class Flips:
    """Keeps streams going over instances whose roles change, as a gateway does: by the roles that it believes in."""

    def __init__(self, gateway: ScriptedGateway, instances: Instances, tokens: int, temperature: float) -> None:
        self.gateway = gateway
        self.instances = instances
        self.tokens = tokens
        self.temperature = temperature
        self.roles = dict.fromkeys(instances.addresses, Role.MIXED)
        self.done: list[Wish] = []
        self._seeds = itertools.count()
        self._turn = itertools.count()

    def flip(self, roles: tuple[Role, ...]) -> None:
        for address, role in zip(self.instances.addresses, roles, strict=True):
            self.instances.running[address.name].set_role(role)

    def learn(self) -> None:
        for address in self.roles:
            beat = self.gateway.heartbeats.get(address.name)
            if beat is not None:
                self.roles[address] = Role(beat.role)

    def serve(self, wish: Wish) -> None:
        turn = next(self._turn)
        readers = [address for address, role in self.roles.items() if role is not Role.DECODE]
        writers = [address for address, role in self.roles.items() if role is not Role.PREFILL]
        decode: Address = writers[turn % len(writers)]
        prefill = next((address for address in readers[turn % len(readers) :] if address != decode), None) if readers else None
        wish.attempt = self.gateway.submit(
            wish.prompt, wish.sampling, prefill=prefill, decode=decode, delivered=list(wish.output)
        )

    def wishes(self, count: int) -> list[Wish]:
        made = [Wish(PROMPTS[seed % len(PROMPTS)], self._sampling(seed)) for seed in itertools.islice(self._seeds, count)]
        for wish in made:
            self.serve(wish)
        return made

    def _sampling(self, seed: int) -> SamplingParams:
        return SamplingParams(max_tokens=self.tokens, min_tokens=self.tokens, seed=seed, temperature=self.temperature)

    def look(self, wish: Wish) -> bool:
        """Whether it is done. A refusal is tried elsewhere, with what was delivered."""
        generation = self.gateway.generations[wish.attempt]
        if generation.complete:
            wish.output += generation.output
            self.done.append(wish)
            return True
        if generation.failures:
            assert {failure.code for failure in generation.failures} == {Unavailable.code}, generation
            wish.output += [generation.tokens[at] for at in range(generation.first, generation.position)]
            wish.retries += 1
            assert wish.retries < 50
            self.gateway.cancel(wish.attempt, *generation.workers)
            self.serve(wish)
        return False


def simulated(folder: Path) -> ClusterConfig:
    return simulated_config(folder, "mixed", "mixed", "mixed", health={"heartbeat_s": 0.02}, cost={"step_s": 2e-3})


def real(folder: Path) -> ClusterConfig:
    """Three instances of a tiny model in fp32."""
    make_model(folder / "model", "llama", dtype="float32", seed=3)
    return parse_config(
        {
            "model": str(folder / "model"),
            "dtype": "float32",
            "engine": {"kv_bytes": 16 << 20, "max_num_batched_tokens": 64, "threads": 1},
            "pools": [{"role": "mixed", "name": f"mixed{index}"} for index in range(3)],
            "health": {"heartbeat_s": 0.02, "dead_after_s": 20.0},
            "transfer": {"lease_s": 20.0},
        }
    )


def flip_under_streams(
    config: ClusterConfig, *, streams: int, flips: int, period_s: float, tokens: int, temperature: float = 1.0
) -> Flips:
    with ScriptedGateway(KEYS) as gateway, Instances(config, [gateway.address], keys=KEYS) as instances:
        show = Flips(gateway, instances, tokens, temperature)
        wishes = show.wishes(streams)
        for index in range(flips):
            show.flip(FLIPS[index % len(FLIPS)])
            until_s = time.monotonic() + period_s
            while time.monotonic() < until_s:
                gateway.pump(0.005)
                show.learn()
                wishes = [wish for wish in wishes if not show.look(wish)]
                wishes += show.wishes(streams - len(wishes))
        until_s = time.monotonic() + 60
        while wishes and time.monotonic() < until_s:
            gateway.pump(0.005)
            show.learn()
            wishes = [wish for wish in wishes if not show.look(wish)]
        assert wishes == []
        assert instances.settled() == []
        address = instances.addresses[0]
        instances.running[address.name].set_role(Role.MIXED)
        for start in range(0, len(show.done), streams):
            done = show.done[start : start + streams]
            alone = [gateway.submit(wish.prompt, wish.sampling, prefill=None, decode=address) for wish in done]
            for wish, expected in zip(done, gateway.wait(*alone), strict=True):
                assert expected.failures == []
                assert wish.output == expected.output
    return show


A_MINUTE = [pytest.mark.long, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    ("streams", "flips", "period_s", "tokens"), [(8, 8, 0.3, 60), pytest.param(64, 12, 5.0, 400, marks=A_MINUTE)]
)
def test_no_stream_notices_that_instances_change_their_roles(
    tmp_path: Path, streams: int, flips: int, period_s: float, tokens: int
) -> None:
    show = flip_under_streams(simulated(tmp_path), streams=streams, flips=flips, period_s=period_s, tokens=tokens)
    assert len(show.done) > streams


@pytest.mark.parametrize(("streams", "flips", "period_s"), [(8, 6, 0.5), pytest.param(64, 12, 5.0, marks=A_MINUTE)])
def test_the_tokens_of_a_real_model_are_those_of_generate_whatever_the_roles(
    tmp_path: Path, streams: int, flips: int, period_s: float
) -> None:
    show = flip_under_streams(real(tmp_path), streams=streams, flips=flips, period_s=period_s, tokens=24, temperature=0.0)
    expected = dict(zip(map(tuple, PROMPTS), generate(tmp_path / "model", PROMPTS, 24), strict=True))
    assert len(show.done) > streams
    assert all(wish.output == expected[tuple(wish.prompt)] for wish in show.done)
