"""Instances, their mail, the wire between them, and gateways: a cluster on one timeline."""

from __future__ import annotations

import random
from collections.abc import Callable

from core.config import Role
from core.request import Request
from core.sampling import SamplingParams
from mail.faults import Plan
from router.admission import Admission
from router.least_ttft import LeastTTFT
from router.policy import RoutingPolicy
from tests.support.virtual.fabric import Fabric
from tests.support.virtual.gateway import Stream, VirtualGateway
from tests.support.virtual.instance import VOCAB, VirtualInstance
from tests.support.virtual.post import Post
from tests.support.virtual.timeline import Timeline

LEASE_S = 5.0
WARM_UP_S = 0.5


class VirtualCluster:
    """`roles` name the instances: `mixed0`, `prefill1` ... `options` are those of every `VirtualInstance`."""

    def __init__(
        self,
        roles: tuple[Role, ...],
        *,
        seed: int,
        num_blocks: int = 64,
        lease_s: float = LEASE_S,
        gateways: int = 1,
        faults: Plan | None = None,
        policy: Callable[[], RoutingPolicy] = lambda: LeastTTFT(Admission(1 << 18)),
        **options: object,
    ) -> None:
        self.dice = random.Random(seed)
        self.timeline = Timeline()
        self.post = Post(self.timeline, self.dice)
        self.post.faults = faults
        self.fabric = Fabric(self.timeline)
        self.lease_s = lease_s
        self._options = {"num_blocks": num_blocks, "lease_s": lease_s, **options}
        self.gateways = [
            VirtualGateway(self.timeline, self.post, policy(), name=f"gateway{index}", lease_s=lease_s)
            for index in range(gateways)
        ]
        self.instances: dict[str, VirtualInstance] = {}
        for index, role in enumerate(roles):
            self.start(f"{role.value}{index}", role)
        self.timeline.run_for(WARM_UP_S)

    def _gateway(self, name: str, policy: RoutingPolicy) -> VirtualGateway:
        return VirtualGateway(self.timeline, self.post, policy, name=name, lease_s=self.lease_s)

    def start(self, name: str, role: Role, incarnation: int = 1) -> VirtualInstance:
        instance = self.instances[name] = VirtualInstance(
            self.timeline,
            self.post,
            self.fabric,
            name,
            role,
            gateways=[gateway.address for gateway in self.gateways],
            incarnation=incarnation,
            **self._options,
        )
        return instance

    def restart(self, name: str) -> VirtualInstance:
        """Kill it and start the next incarnation."""
        old = self.instances[name]
        old.die()
        return self.start(name, old.loop.progress.role, old.address.incarnation + 1)

    def request(self, name: str, prompt_tokens: int, max_tokens: int) -> Request:
        prompt = tuple(self.dice.randrange(VOCAB) for _ in range(prompt_tokens))
        sampling = SamplingParams(max_tokens=max_tokens, min_tokens=max_tokens, seed=self.dice.randrange(1 << 32))
        return Request(request_id=name, prompt=prompt, sampling=sampling)

    @property
    def bytes_per_token(self) -> int:
        """Of KV."""
        return next(iter(self.instances.values())).engine.layout.bytes_per_token

    @property
    def streams(self) -> list[Stream]:
        return [stream for gateway in self.gateways for stream in gateway.streams]

    def run_until_all_ended(self, limit_s: float) -> bool:
        return self.timeline.run(lambda: all(stream.ended for stream in self.streams), limit_s)

    def left_over(self) -> list[str]:
        """What is still held, once every lease had time to run out."""
        self.timeline.run_for(2 * self.lease_s + 1.0)
        return [line for instance in self.instances.values() for line in instance.invariants()]
