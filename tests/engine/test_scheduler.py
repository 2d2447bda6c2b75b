from __future__ import annotations

import pytest

from core.errors import ContextLengthExceeded, EngineFault, Overloaded
from engine.block_manager import BlockManager
from engine.decision import Decision
from engine.scheduler import Scheduler
from engine.sequence import Sequence, Status
from engine.waiting_queue import OrderKey, WaitingQueue
from tests.support.engines import sequence


def scheduler(
    num_blocks: int = 64,
    *,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 16,
    max_waiting_tokens: int = 1000,
    watermark_blocks: int | None = 0,
    key: OrderKey | None = None,
    prefix_cache: bool = False,
) -> Scheduler:
    blocks = BlockManager(num_blocks, 4, prefix_cache)
    return Scheduler(blocks, max_num_seqs, max_num_batched_tokens, max_waiting_tokens, watermark_blocks=watermark_blocks, key=key)


def prompt(name: str, tokens: int, max_tokens: int = 8, *, hold: bool = False, arrived_s: float = 0.0) -> Sequence:
    return sequence(name, list(range(tokens)), max_tokens, hold=hold, arrived_s=arrived_s)


def apply(plan: Decision | None) -> Decision:
    """What an engine does with a decision, with a token of 1 always drawn."""
    assert plan is not None
    for item in plan.parts:
        item.sequence.computed_tokens = item.sequence.launched_tokens = item.start + item.count
        if item.samples:
            item.sequence.tokens.append(1)
    return plan


def shape(plan: Decision | None) -> list[tuple[str, int, int, bool]]:
    return [(item.sequence.sequence_id, item.start, item.count, item.samples) for item in plan.parts] if plan else []


def test_with_nothing_to_do_there_is_no_plan() -> None:
    assert scheduler().schedule() is None
    assert not scheduler().has_work


def test_a_long_prompt_is_read_in_chunks_and_samples_with_the_last() -> None:
    it = scheduler()
    it.add(prompt("a", 40))
    shapes = [shape(apply(it.schedule())) for _ in range(4)]
    assert shapes == [[("a", 0, 16, False)], [("a", 16, 16, False)], [("a", 32, 8, True)], [("a", 40, 1, True)]]


def test_decodes_come_before_chunks_and_chunks_before_new_prompts() -> None:
    it = scheduler()
    it.add(prompt("decoding", 4))
    apply(it.schedule())
    it.add(prompt("long", 25))
    apply(it.schedule())
    it.add(prompt("new", 8))
    assert shape(apply(it.schedule())) == [("decoding", 5, 1, True), ("long", 15, 10, True), ("new", 0, 5, False)]


def test_no_step_exceeds_its_tokens_or_its_sequences() -> None:
    it = scheduler(max_num_seqs=3)
    for index in range(6):
        it.add(prompt(f"s{index}", 7))
    for _ in range(5):
        plan = apply(it.schedule())
        assert plan.tokens <= 16
        assert len(plan.parts) <= 3
    assert it.waiting == 3


def test_no_more_sequences_run_than_the_budget_has_tokens() -> None:
    it = scheduler(max_num_seqs=8, max_num_batched_tokens=2)
    for index in range(3):
        it.add(prompt(f"s{index}", 1))
    apply(it.schedule())
    assert shape(it.schedule()) == [("s0", 1, 1, True), ("s1", 1, 1, True)]


def test_a_large_head_is_not_overtaken() -> None:
    it = scheduler(8)
    it.add(prompt("running", 20))
    apply(it.schedule())
    it.add(prompt("large", 16))
    it.add(prompt("small", 1))
    assert [name for name, *_ in shape(apply(it.schedule()))] == ["running"]
    assert it.waiting == 2


def test_a_key_orders_admission_and_ties_go_by_arrival() -> None:
    deadlines = {"late": 9.0, "soon": 1.0, "soon too": 1.0}
    it = scheduler(key=lambda waiting: deadlines[waiting.sequence_id])
    for name in deadlines:
        it.add(prompt(name, 4))
    assert [name for name, *_ in shape(it.schedule())] == ["soon", "soon too", "late"]


def test_when_blocks_run_out_the_latest_arrival_is_recomputed_later() -> None:
    it = scheduler(4)
    first, second = prompt("first", 8), prompt("second", 8)
    it.add(first)
    it.add(second)
    apply(it.schedule())
    plan = apply(it.schedule())
    assert plan.preempted == (second,)
    assert shape(plan) == [("first", 8, 1, True)]
    assert (second.status, second.blocks, second.computed_tokens, second.preemptions) == (Status.WAITING, [], 0, 1)
    it.remove(first)
    assert shape(it.schedule()) == [("second", 0, 9, True)]


def test_a_preempted_sequence_waits_in_front_of_those_that_came_after_it() -> None:
    it = scheduler(4, max_num_seqs=2)
    first, second = prompt("first", 8), prompt("second", 8)
    it.add(first)
    it.add(second)
    apply(it.schedule())
    it.add(prompt("third", 1))
    apply(it.schedule())
    it.remove(first)
    assert [name for name, *_ in shape(it.schedule())] == ["second", "third"]


def test_the_step_that_preempts_admits_nobody() -> None:
    it = scheduler(4)
    for name in ("first", "second"):
        it.add(prompt(name, 8))
    apply(it.schedule())
    it.add(prompt("small", 1))
    assert [name for name, *_ in shape(it.schedule())] == ["first"]


def test_a_holding_sequence_is_never_preempted() -> None:
    it = scheduler(4, max_num_batched_tokens=9)
    decoding, holding = prompt("decoding", 4), prompt("holding", 12, hold=True)
    it.add(decoding)
    it.add(holding)
    apply(it.schedule())
    plan = apply(it.schedule())
    assert holding.status is Status.RUNNING
    assert plan.preempted == (decoding,)
    assert [name for name, *_ in shape(plan)] == ["holding"]


def test_a_holding_prompt_owns_all_its_blocks_from_its_first_chunk() -> None:
    it = scheduler(16)
    holding = prompt("holding", 40, hold=True)
    it.add(holding)
    it.schedule()
    assert len(holding.blocks) == 10


def test_admission_leaves_the_watermark_to_those_that_decode() -> None:
    it = scheduler(6, watermark_blocks=2)
    it.add(prompt("decoding", 8))
    apply(it.schedule())
    it.add(prompt("next", 8))
    assert [name for name, *_ in shape(apply(it.schedule()))] == ["decoding"]


def test_the_watermark_keeps_nobody_out_of_an_idle_engine() -> None:
    it = scheduler(4, watermark_blocks=2)
    it.add(prompt("whole", 15, max_tokens=2))
    assert shape(it.schedule()) == [("whole", 0, 15, True)]


def test_what_cannot_fit_alone_is_refused_at_the_door() -> None:
    it = scheduler(4)
    it.add(prompt("fits", 9, max_tokens=8))
    with pytest.raises(ContextLengthExceeded):
        it.add(prompt("too long", 9, max_tokens=9))
    with pytest.raises(ContextLengthExceeded):
        it.reserve(prompt("too long", 9, max_tokens=9))
    it.add(prompt("keeps only its prompt", 9, max_tokens=9, hold=True))


def test_waiting_tokens_are_bounded_but_an_empty_queue_takes_anything() -> None:
    it = scheduler(max_waiting_tokens=10)
    it.add(prompt("large", 20))
    with pytest.raises(Overloaded):
        it.add(prompt("one more", 1))
    assert (it.waiting, it.waiting_tokens) == (1, 20)
    apply(it.schedule())
    it.add(prompt("six", 6))
    it.add(prompt("four", 4))
    with pytest.raises(Overloaded):
        it.add(prompt("one", 1))


def test_a_reservation_is_not_scheduled_before_its_kv_is_here() -> None:
    it = scheduler()
    reserved = prompt("reserved", 6)
    assert it.reserve(reserved)
    assert (len(reserved.blocks), reserved.status, it.has_work) == (2, Status.WAITING, False)
    assert it.schedule() is None
    it.activate(reserved)
    reserved.computed_tokens = 6
    reserved.tokens.append(1)
    assert shape(it.schedule()) == [("reserved", 6, 1, True)]


def test_only_a_reservation_can_be_activated() -> None:
    it = scheduler()
    with pytest.raises(EngineFault):
        it.activate(prompt("stranger", 6))


def test_a_reservation_reuses_the_prefix_that_is_here() -> None:
    it = scheduler(prefix_cache=True)
    first = prompt("first", 12)
    it.add(first)
    apply(it.schedule())
    it.blocks.register(first, 0)
    second = prompt("second", 11)
    assert it.reserve(second)
    assert (second.cached_tokens, second.blocks[:2]) == (8, first.blocks[:2])


def test_there_is_no_reservation_without_room() -> None:
    it = scheduler(4, watermark_blocks=1)
    first, second = prompt("first", 8), prompt("second", 8)
    assert it.reserve(first)
    assert not it.reserve(second)
    assert (second.blocks, second.cached_tokens) == ([], 0)
    it.remove(first)
    assert it.reserve(second)


def test_a_reservation_yields_to_a_head_that_arrived_earlier_and_to_no_later_one() -> None:
    it = scheduler(8)
    it.add(prompt("running", 12, arrived_s=0))
    apply(it.schedule())
    it.add(prompt("head", 17, arrived_s=2))
    assert not it.reserve(prompt("later", 4, arrived_s=3))
    assert it.reserve(prompt("earlier", 4, arrived_s=1))


def test_the_started_beyond_the_batch_run_as_soon_as_there_is_a_place() -> None:
    it = scheduler(max_num_seqs=1)
    first, second = prompt("first", 4), prompt("second", 4)
    for each in (first, second):
        assert it.reserve(each)
        it.activate(each)
        each.computed_tokens = 4
        each.tokens.append(1)
    it.add(prompt("new", 4))
    assert [name for name, *_ in shape(apply(it.schedule()))] == ["first"]
    assert len(it.active()) == 2
    it.remove(first)
    assert [name for name, *_ in shape(apply(it.schedule()))] == ["second"]


def test_the_ready_give_way_before_earlier_arrivals_that_run() -> None:
    it = scheduler(4, max_num_seqs=1)
    first, second = prompt("first", 8), prompt("second", 8)
    for each in (first, second):
        assert it.reserve(each)
        it.activate(each)
        each.computed_tokens = 8
        each.tokens.append(1)
    plan = apply(it.schedule())
    assert plan.preempted == (second,)
    assert shape(plan) == [("first", 8, 1, True)]
    assert it.check() == []


def test_the_ready_take_over_when_whoever_ran_gives_way_to_them() -> None:
    it = scheduler(4, max_num_seqs=1)
    first, second = prompt("first", 8), prompt("second", 8)
    for each in (first, second):
        assert it.reserve(each)
    for each in (second, first):
        it.activate(each)
        each.computed_tokens = 8
        each.tokens.append(1)
    plan = apply(it.schedule())
    assert plan.preempted == (second,)
    assert shape(plan) == [("first", 8, 1, True)]


def test_there_is_no_work_while_every_block_is_kept_for_a_transfer() -> None:
    it = scheduler(4)
    held = prompt("held", 16, hold=True)
    it.add(held)
    apply(it.schedule())
    it.hold(held)
    assert not it.has_work
    it.add(prompt("next", 16, hold=True))
    assert it.has_work
    assert it.schedule() is None
    assert not it.has_work
    it.remove(held)
    assert it.has_work
    assert [name for name, *_ in shape(it.schedule())] == ["next"]


def test_a_sequence_that_gives_itself_up_lets_the_ready_go_on() -> None:
    it = scheduler(4, max_num_seqs=1)
    pinned, growing = prompt("pinned", 8), prompt("growing", 8)
    assert it.reserve(pinned)
    assert it.reserve(growing)
    it.activate(growing)
    growing.computed_tokens = 8
    growing.tokens.append(1)
    assert it.schedule() is None
    assert growing.status is Status.WAITING
    assert it.schedule() is None
    it.remove(pinned)
    assert [name for name, *_ in shape(it.schedule())] == ["growing"]


@pytest.mark.parametrize("state", ["waiting", "running", "ready", "reserved", "held"])
def test_removal_frees_everything_in_any_state(state: str) -> None:
    it = scheduler(8, max_num_seqs=1)
    each = prompt("each", 8, hold=state == "held")
    if state in ("running", "held", "waiting"):
        it.add(each)
    if state in ("running", "held"):
        apply(it.schedule())
    if state == "held":
        it.hold(each)
    if state in ("ready", "reserved"):
        assert it.reserve(each)
    if state == "ready":
        it.add(prompt("other", 4))
        apply(it.schedule())
        it.activate(each)
    it.remove(each)
    assert each.status is Status.FINISHED
    assert it.check() == []
    if state != "ready":
        assert it.blocks.free_blocks == 8
        assert not it.has_work


def test_the_checker_sees_a_sequence_that_vanished() -> None:
    it = scheduler()
    it.add(prompt("a", 4))
    it.schedule()
    it._running.clear()
    assert it.check()


def test_a_waiting_queue_forgets_who_left() -> None:
    queue = WaitingQueue()
    members = [prompt(f"s{index}", 2) for index in range(100)]
    for arrival, member in enumerate(members):
        queue.push(member, arrival)
    for member in members[:99]:
        assert queue.remove(member.sequence_id)
    assert not queue.remove("s0")
    assert (len(queue), queue.tokens, queue.head()) == (1, 2, members[99])
    assert len(queue._heap) < 20
    assert queue.pop() is members[99]
    assert queue.head() is None
    with pytest.raises(IndexError):
        queue.pop()


def test_an_id_that_comes_again_does_not_revive_the_one_that_left() -> None:
    queue = WaitingQueue()
    queue.push(prompt("same", 2), 0)
    queue.remove("same")
    again = prompt("same", 3)
    queue.push(again, 1)
    assert queue.pop() is again
    assert queue.head() is None
