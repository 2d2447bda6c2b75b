"""Engines over a simulated model, one of them with a cache that notices every token read from the wrong place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b

from core.clock import ManualClock
from core.config import EngineConfig
from core.cost import CostModel
from core.groups import NO_BLOCK, layer_groups
from core.layout import KVLayout, LayerShape
from core.sampling import SamplingParams
from engine.engine import Engine
from engine.plan import Admitted, Handle, LayerListener, Scheduled, StepPlan, StepResult
from engine.sequence import Sequence
from engine.simulated_runner import SimulatedRunner, SimulatedStep

VOCAB = 50
EOS = frozenset({7})


Windows = tuple[int | None, ...]
"""The sliding window of each layer."""


def layout(block_size: int, windows: Windows = (None, None)) -> KVLayout:
    return KVLayout.whole(layers=[LayerShape(1, 4, 4, window) for window in windows], dtype="float32", block_size=block_size)


def simulated_runner(
    num_blocks: int = 64,
    block_size: int = 4,
    *,
    max_model_len: int = 256,
    eos_chance: float = 0.0,
    clock: ManualClock | None = None,
    cost: CostModel | None = None,
    steps_ahead: int = 0,
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
        steps_ahead=steps_ahead,
    )


def sequence(
    name: str,
    prompt: list[int],
    max_tokens: int = 8,
    *,
    delivered: list[int] | None = None,
    hold: bool = False,
    salt: bytes = b"",
    ticket: int = 0,
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
        ticket=ticket,
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


@dataclass
class MirroredRow:
    """What a runner has been told of a row, and the tokens that it drew there."""

    admitted: Admitted
    tokens: list[int]
    tables: dict[int, list[int]] = field(default_factory=dict)
    salt: bytes = b""
    spoilt: bool = False


@dataclass
class Touched:
    """What a step does to the cache: contents by slot, and what each row must find."""

    writes: list[tuple[tuple[int, int], bytes]] = field(default_factory=list)
    reads: list[tuple[str, tuple[int, int], bytes]] = field(default_factory=list)
    faults: dict[int, str] = field(default_factory=dict)


class KVCheckingRunner(SimulatedRunner):
    """Writes, into the slot of every computed token, a digest of the whole prefix that its KV would depend on, and reads
    back the slots of every context that it is asked to attend to. `wrong` lists each slot that held something else.

    Layers with a window read no more than that, and each group of layers writes and expects its own.

    All of a step's reads and writes happen at the last moment, when it is collected, while those from outside (`write`, `read`)
    happen at once. So whoever is given a block under a step in flight loses what he writes there, or spoils what the step reads.

    `fault`, when set, is called with each plan and may raise or name faulty entries. `salt_of` tells a row's salt.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        eos_chance: float = 0.0,
        steps_ahead: int = 0,
        cost: CostModel | None = None,
        clock: ManualClock | None = None,
        windows: Windows = (None, None),
    ) -> None:
        clock = clock or ManualClock()
        super().__init__(
            layout(block_size, windows),
            num_blocks,
            256,
            VOCAB,
            cost or CostModel(),
            clock.advance,
            EOS,
            eos_chance=eos_chance,
            clock=clock,
            steps_ahead=steps_ahead,
        )
        self.wrong: list[str] = []
        self.fault: Callable[[StepPlan], dict[int, str]] | None = None
        self.salt_of: Callable[[int], bytes] = lambda row: b""
        self.rows: dict[int, MirroredRow] = {}
        self._block_size = block_size
        self._groups = layer_groups(self.layout).groups
        self._slots: dict[tuple[int, int], bytes] = {}
        self._touched: dict[SimulatedStep, Touched] = {}

    def launch(self, plan: StepPlan, on_layer: LayerListener | None = None) -> SimulatedStep:
        mirror(self.rows, plan)
        for admitted in plan.admitted:
            self.rows[admitted.row].salt = self.salt_of(admitted.row)
        touched = Touched()
        if self.fault is not None:
            touched.faults = self._spoilt(plan)
        for index, item in enumerate(plan.scheduled):
            self._touch(touched, self.rows[item.row], item, index in touched.faults)
        step = super().launch(plan, on_layer)
        for item, drawn in zip([item for item in plan.scheduled if item.samples], step.result.drawn, strict=True):
            self.rows[item.row].tokens.append(drawn.token)
        self._touched[step] = touched
        return step

    def collect(self, handle: Handle) -> StepResult:
        result = super().collect(handle)
        assert isinstance(handle, SimulatedStep)
        touched = self._touched.pop(handle)
        self._slots.update(touched.writes)
        for name, slot, content in touched.reads:
            if self._slots.get(slot) != content:
                self.wrong.append(f"{name} reads slot {slot}")
        return StepResult(result.drawn, touched.faults)

    def write(self, owner: Sequence, start: int, end: int) -> None:
        """KV that arrives from outside: of each layer what the token at `end` sees."""
        prefixes = _prefixes(owner.salt, owner.tokens)
        for number, group in enumerate(self._groups):
            for position in range(max(start, group.first_seen(end)), end):
                slot = self._slot(owner.tables[number], position)
                assert slot is not None
                self._slots[slot] = _content(number, prefixes[position])

    def read(self, owner: Sequence, end: int, position: int | None = None) -> None:
        """KV that is handed on: of the first `end` tokens, what the token at `position` (`end`) sees."""
        prefixes = _prefixes(owner.salt, owner.tokens)
        for number, group in enumerate(self._groups):
            for place in range(group.first_seen(end if position is None else position), end):
                slot = self._slot(owner.tables[number], place)
                if slot is None or self._slots.get(slot) != _content(number, prefixes[place]):
                    self.wrong.append(f"{owner.sequence_id} at {place} reads slot {slot} of group {number}")

    def _touch(self, touched: Touched, row: MirroredRow, item: Scheduled, faulty: bool) -> None:
        row.spoilt |= faulty
        prefixes, end = _prefixes(row.salt, row.tokens), item.start + item.count
        for number, group in enumerate(self._groups):
            for position in range(item.start, end):
                slot = self._slot(row.tables[number], position)
                assert slot is not None
                touched.writes.append((slot, b"spoilt" if row.spoilt else _content(number, prefixes[position])))
            if not row.spoilt:
                for position in range(group.first_seen(item.start), end):
                    name, slot = f"row {item.row} at {position} of group {number}", self._slot(row.tables[number], position)
                    assert slot is not None
                    touched.reads.append((name, slot, _content(number, prefixes[position])))

    def _spoilt(self, plan: StepPlan) -> dict[int, str]:
        """The faults of a plan; a step that raises has written nonsense wherever it could."""
        assert self.fault is not None
        try:
            return self.fault(plan)
        except BaseException:
            for item in plan.scheduled:
                row = self.rows[item.row]
                row.spoilt = True
                for position in range(item.start, item.start + item.count):
                    for table in row.tables.values():
                        slot = self._slot(table, position)
                        assert slot is not None
                        self._slots[slot] = b"spoilt"
            super().launch(plan)  # the rows change all the same
            raise

    def _slot(self, blocks: list[int], position: int) -> tuple[int, int] | None:
        block = blocks[position // self._block_size]
        return None if block == NO_BLOCK else (block, position % self._block_size)


def mirror(rows: dict[int, MirroredRow], plan: StepPlan) -> None:
    """Make a plan's changes. A row is admitted once it was dropped, and its blocks come in order."""
    for number in plan.dropped:
        del rows[number]
    for admitted in plan.admitted:
        assert admitted.row not in rows
        rows[admitted.row] = MirroredRow(admitted, list(admitted.tokens))
    for added in plan.blocks:
        table = rows[added.row].tables.setdefault(added.group, [NO_BLOCK] * added.at)
        assert len(table) == added.at
        assert min(added.blocks) >= 0
        table.extend(added.blocks)


def _content(group: int, prefix: bytes) -> bytes:
    return bytes([group]) + prefix


def _prefixes(salt: bytes, tokens: list[int]) -> list[bytes]:
    digest = blake2b(salt, digest_size=8)
    prefixes = []
    for token in tokens:
        digest.update(token.to_bytes(4, "little"))
        prefixes.append(digest.copy().digest())
    return prefixes
