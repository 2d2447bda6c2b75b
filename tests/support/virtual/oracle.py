"""What the simulated model writes for a request that has an engine to itself."""

from __future__ import annotations

from core.clock import ManualClock
from core.config import EngineConfig
from core.cost import CostModel
from core.request import Request
from engine.engine import Engine
from engine.sequence import Sequence
from engine.simulated_runner import SimulatedRunner
from tests.support.virtual.instance import LAYOUT, VOCAB


def written_alone(request: Request) -> list[int]:
    """Its output tokens, unfailed and undisturbed."""
    runner = SimulatedRunner(LAYOUT, 1024, 16384, VOCAB, CostModel(), None)
    engine = Engine(runner, EngineConfig(prefix_cache=False, max_num_batched_tokens=8192), ManualClock())
    engine.add(Sequence("alone", list(request.prompt), len(request.prompt), request.sampling))
    output: list[int] = []
    while engine.has_work:
        output += [new.token for new in engine.step().tokens]
    return output
