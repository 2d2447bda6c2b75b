"""Plans as plain data: only what changed, rows that stay dense, and the same plan after a journey."""

from __future__ import annotations

import pickle

import msgspec
import pytest

from core.errors import EngineFault
from core.sampling import SamplingParams
from engine.decision import Part
from engine.plan import Admitted, BlocksAdded, Drawn, Scheduled, StepPlan, StepResult
from engine.plan_writer import PlanWriter
from engine.results import TokenLogprobs
from engine.sequence import Sequence
from tests.support.engines import sequence

SAMPLING = SamplingParams(temperature=0.7, logit_bias={3: 1.5}, stop_token_ids=(4, 5), seed=2**62)


def make(name: str, blocks: list[int], tokens: int = 4) -> Sequence:
    made = sequence(name, list(range(tokens)), sampling=SAMPLING)
    made.tables = [blocks]
    return made


def decode(*owners: Sequence) -> tuple[Part, ...]:
    return tuple(Part(owner, len(owner.tokens) - 1, 1, True) for owner in owners)


def rows(plan: StepPlan) -> list[int]:
    return [item.row for item in plan.scheduled]


def test_the_first_plan_says_all_and_the_next_only_what_changed() -> None:
    writer, a, b = PlanWriter(), make("a", [7, 8]), make("b", [3])
    first = writer.write((Part(a, 0, 4, True), Part(b, 0, 2, False)))
    assert first == StepPlan(
        1,
        (Scheduled(0, 0, 4, True), Scheduled(1, 0, 2, False)),
        (),
        (Admitted(0, (0, 1, 2, 3), 4, SAMPLING), Admitted(1, (0, 1, 2, 3), 4, SAMPLING)),
        (BlocksAdded(0, 0, (7, 8)), BlocksAdded(1, 0, (3,))),
    )
    a.tables[0].append(5)
    second = writer.write((Part(a, 4, 1, True), Part(b, 2, 2, True)))
    assert second == StepPlan(2, (Scheduled(0, 4, 1, True), Scheduled(1, 2, 2, True)), (), (), (BlocksAdded(0, 2, (5,)),))
    third = writer.write((Part(a, 5, 1, True), Part(b, 4, 1, True)))
    assert third == StepPlan(3, (Scheduled(0, 5, 1, True), Scheduled(1, 4, 1, True)))


def test_whoever_is_missing_is_dropped_and_the_smallest_free_row_is_taken_next() -> None:
    writer = PlanWriter()
    many = [make(str(i), [i]) for i in range(6)]
    writer.write(decode(*many))
    plan = writer.write(decode(many[1], many[4]))
    assert (sorted(plan.dropped), rows(plan), plan.admitted) == ([0, 2, 3, 5], [1, 4], ())
    plan = writer.write(decode(many[4], make("x", [9]), many[1], make("y", [8])))
    assert (plan.dropped, rows(plan)) == ((), [4, 0, 1, 2])
    assert writer.check() == []


def test_a_row_is_dropped_and_given_away_in_one_plan() -> None:
    writer, a, b = PlanWriter(), make("a", [1]), make("b", [2])
    writer.write(decode(a))
    plan = writer.write(decode(b))
    assert (plan.dropped, rows(plan), [admitted.row for admitted in plan.admitted]) == ((0,), [0], [0])


def test_whoever_lost_its_blocks_in_between_is_a_newcomer_with_all_its_tokens() -> None:
    writer, a = PlanWriter(), make("a", [1])
    writer.write(decode(a))
    a.tokens.append(9)
    a.tables, a.tenancy = [[6, 7]], 1
    plan = writer.write((Part(a, 0, 5, True),))
    assert plan.dropped == (0,)
    assert plan.admitted == (Admitted(0, (0, 1, 2, 3, 9), 4, SAMPLING),)
    assert plan.blocks == (BlocksAdded(0, 0, (6, 7)),)


def test_nobody_enters_whose_last_token_is_not_known() -> None:
    a = make("a", [1])
    a.pending_tokens = 1
    with pytest.raises(EngineFault, match="before its last token was known"):
        PlanWriter().write(decode(a))


def test_a_plan_for_one_alone_leaves_the_others_where_they_are() -> None:
    writer, a, b = PlanWriter(), make("a", [1]), make("b", [2])
    writer.write(decode(a, b))
    alone = writer.write_alone(make("canary", [9], tokens=1))
    assert (alone.scheduled, alone.dropped, alone.blocks) == ((Scheduled(2, 0, 1, True),), (), (BlocksAdded(2, 0, (9,)),))
    plan = writer.write(decode(a, b))
    assert (plan.dropped, rows(plan), plan.admitted) == ((2,), [0, 1], ())
    assert writer.check() == []


def test_plans_and_results_survive_a_journey() -> None:
    writer = PlanWriter()
    writer.write(decode(make("gone", [5])))
    plan = writer.write(decode(make("a", [1, 2]), make("b", [3])))
    assert plan.dropped
    result = StepResult((Drawn(5, TokenLogprobs(-0.5, ((5, -0.5), (6, -1.0)))), Drawn(-1)), {1: "the logits are not finite"})
    for sent in (plan, result):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=type(sent)) == sent
        assert pickle.loads(pickle.dumps(sent)) == sent
