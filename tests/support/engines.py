"""Engines over a simulated model, one of them with a cache that notices every token read from the wrong place."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b

from core.clock import ManualClock
from core.config import EngineConfig
from core.cost import CostModel
from core.layout import KVLayout, LayerShape
from core.sampling import SamplingParams
from engine.engine import Engine
from engine.plan import LayerListener, StepPlan, StepResult
from engine.sequence import Sequence
from engine.simulated_runner import SimulatedRunner

VOCAB = 50
EOS = frozenset({7})


def layout(block_size: int, layers: int = 2) -> KVLayout:
    return KVLayout.whole(layers=(LayerShape(1, 4, 4),) * layers, dtype="float32", block_size=block_size)


def simulated_runner(
    num_blocks: int = 64,
    block_size: int = 4,
    *,
    max_model_len: int = 256,
    eos_chance: float = 0.0,
    clock: ManualClock | None = None,
    cost: CostModel | None = None,
) -> SimulatedRunner:
    clock = clock or ManualClock()
    return SimulatedRunner(
        layout(block_size),
        num_blocks,
        max_model_len,
        VOCAB,
        cost or CostModel(),
        clock.advance,
        EOS,
        eos_chance=eos_chance,
        clock=clock,
    )


def sequence(
    name: str,
    prompt: list[int],
    max_tokens: int = 8,
    *,
    delivered: list[int] | None = None,
    hold: bool = False,
    salt: bytes = b"",
    arrived_s: float = 0.0,
    sampling: SamplingParams | None = None,
) -> Sequence:
    return Sequence(
        sequence_id=name,
        tokens=[*prompt, *(delivered or [])],
        prompt_tokens=len(prompt),
        sampling=sampling or SamplingParams(max_tokens=max_tokens),
        salt=salt,
        hold=hold,
        arrived_s=arrived_s,
    )


def run_alone(prompt: list[int], sampling: SamplingParams, eos_chance: float = 0.0) -> list[int]:
    """The output of a sequence that has an engine with plenty of memory to itself."""
    engine = Engine(simulated_runner(eos_chance=eos_chance), EngineConfig(prefix_cache=False), ManualClock())
    engine.add(sequence("alone", prompt, sampling=sampling))
    output: list[int] = []
    while engine.has_work:
        output += [new.token for new in engine.step().tokens]
    return output


class KVCheckingRunner(SimulatedRunner):
    """Writes, into the slot of every computed token, a digest of the whole prefix that its KV would depend on, and reads
    back the slots of every context that it is asked to attend to. `wrong` lists each slot that held something else.

    `fault`, when set, is called with each plan and may raise or name faulty entries.
    """

    def __init__(self, num_blocks: int, block_size: int, eos_chance: float = 0.0) -> None:
        clock = ManualClock()
        super().__init__(
            layout(block_size), num_blocks, 256, VOCAB, CostModel(), clock.advance, EOS, eos_chance=eos_chance, clock=clock
        )
        self.wrong: list[str] = []
        self.fault: Callable[[StepPlan], dict[int, str]] | None = None
        self._block_size = block_size
        self._slots: dict[tuple[int, int], bytes] = {}

    def run(self, plan: StepPlan, on_layer: LayerListener | None = None) -> StepResult:
        faults: dict[int, str] = {}
        if self.fault is not None:
            self._spoil(plan)
            faults = self.fault(plan)
        for index, item in enumerate(plan.scheduled):
            if index not in faults:
                self.write(item.sequence, item.start, item.start + item.count)
        for index, item in enumerate(plan.scheduled):
            if index not in faults:
                self.read(item.sequence, item.start + item.count)
        result = super().run(plan, on_layer)
        return StepResult(result.drawn, faults)

    def write(self, owner: Sequence, start: int, end: int) -> None:
        for position, content in enumerate(_prefixes(owner)[start:end], start):
            self._slots[self._slot(owner, position)] = content

    def read(self, owner: Sequence, end: int) -> None:
        for position, content in enumerate(_prefixes(owner)[:end]):
            if self._slots.get(self._slot(owner, position)) != content:
                self.wrong.append(f"{owner.sequence_id} at {position} reads slot {self._slot(owner, position)}")

    def _spoil(self, plan: StepPlan) -> None:
        for item in plan.scheduled:
            for position in range(item.start, item.start + item.count):
                self._slots[self._slot(item.sequence, position)] = b"spoilt"

    def _slot(self, owner: Sequence, position: int) -> tuple[int, int]:
        return owner.blocks[position // self._block_size], position % self._block_size


def _prefixes(owner: Sequence) -> list[bytes]:
    digest = blake2b(owner.salt, digest_size=8)
    prefixes = []
    for token in owner.tokens:
        digest.update(token.to_bytes(4, "little"))
        prefixes.append(digest.copy().digest())
    return prefixes
