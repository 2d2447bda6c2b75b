from __future__ import annotations

from collections.abc import Callable

import pytest

from core.errors import ContextLengthExceeded, EngineFault, Overloaded
from engine.admission import AdmissionKind
from engine.block_manager import BlockManager
from engine.decision import Decision
from engine.scheduler import Scheduler
from engine.sequence import Sequence, Status
from tests.support.engines import sequence

ADMITTED, GRANTED, TAKEN_BACK = AdmissionKind


def scheduler(
    num_blocks: int = 64,
    *,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 16,
    max_waiting_tokens: int = 1000,
    headroom_tokens: int = 0,
    prefix_cache: bool = False,
) -> Scheduler:
    blocks = BlockManager(num_blocks, 4, prefix_cache)
    return Scheduler(blocks, max_num_seqs, max_num_batched_tokens, max_waiting_tokens, headroom_tokens)


def prompt(name: str, tokens: int, max_tokens: int = 8, *, hold: bool = False, ticket: int = 0) -> Sequence:
    return sequence(name, list(range(tokens)), max_tokens, hold=hold, ticket=ticket)


def said(it: Scheduler) -> list[tuple[AdmissionKind, str]]:
    """What `Engine.admissions` would say, while no step is in flight."""
    it.admit()
    return [(admission.kind, admission.sequence.sequence_id) for admission in it.take_admissions()]


def granted(it: Scheduler, reserved: Sequence) -> Sequence:
    it.reserve(reserved)
    assert said(it) == [(GRANTED, reserved.sequence_id)]
    return reserved


def started(it: Scheduler, reserved: Sequence) -> Sequence:
    """A reservation whose KV has come in, with a first token of 1."""
    it.activate(granted(it, reserved))
    reserved.tokens.append(1)
    return reserved


def held(it: Scheduler, each: Sequence) -> Sequence:
    """A prompt that is read and waits for another engine."""
    it.add(each)
    while each.output_tokens == 0:
        apply(it.schedule())
    it.hold(each)
    assert said(it) == [(ADMITTED, each.sequence_id)]
    return each


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


def test_tickets_order_admission_then_arrival_where_there_are_none() -> None:
    it = scheduler()
    for name, ticket in (("third", 9), ("second", 7), ("none", 0), ("none either", 0)):
        it.add(prompt(name, 4, ticket=ticket))
    assert [name for name, *_ in shape(it.schedule())] == ["none", "none either", "second", "third"]


def test_equal_tickets_are_ordered_alike_wherever_they_arrive_first() -> None:
    for names in (["a", "b"], ["b", "a"]):
        it = scheduler()
        for name in names:
            it.add(prompt(name, 4, ticket=3))
        assert [name for name, *_ in shape(it.schedule())] == ["a", "b"]


def test_when_blocks_run_out_the_latest_arrival_is_recomputed_later() -> None:
    it = scheduler(4)
    first, second = prompt("first", 8), prompt("second", 8)
    it.add(first)
    it.add(second)
    apply(it.schedule())
    plan = apply(it.schedule())
    assert plan.preempted == (second,)
    assert shape(plan) == [("first", 8, 1, True)]
    assert (second.status, second.tables, second.computed_tokens, second.preemptions) == (Status.WAITING, [], 0, 1)
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


def test_whoever_grows_takes_the_blocks_of_a_younger_prompt_that_no_engine_has_room_for() -> None:
    it = scheduler(4, max_num_batched_tokens=9)
    decoding, holding = prompt("decoding", 4), prompt("holding", 12, hold=True)
    it.add(decoding)
    it.add(holding)
    apply(it.schedule())
    assert said(it) == [(ADMITTED, "holding")]
    plan = apply(it.schedule())
    assert plan.preempted == (holding,)
    assert (holding.status, holding.tables, holding.computed_tokens) == (Status.WAITING, [], 0)
    assert shape(plan) == [("decoding", 4, 1, True)]
    assert said(it) == [(TAKEN_BACK, "holding")]
    assert it.check() == []


@pytest.mark.parametrize(("ticket", "pinned"), [(1, False), (3, True)])
def test_whoever_grows_gives_way_to_an_older_prompt_and_to_a_pinned_one(ticket: int, pinned: bool) -> None:
    it = scheduler(4)
    decoding, holding = prompt("decoding", 4, ticket=2), prompt("holding", 12, hold=True, ticket=ticket)
    it.add(decoding)
    it.add(holding)
    apply(it.schedule())
    it.hold(holding)
    holding.pinned = pinned
    assert it.schedule() is None
    assert (decoding.status, decoding.preemptions, holding.status) == (Status.WAITING, 1, Status.HELD)
    assert it.check() == []


def test_a_holding_prompt_owns_all_its_blocks_from_its_first_chunk() -> None:
    it = scheduler(16)
    holding = prompt("holding", 40, hold=True)
    it.add(holding)
    it.schedule()
    assert len(holding.tables[0]) == 10


@pytest.mark.parametrize(("tokens", "admitted"), [(16, ["decoding", "next"]), (17, ["decoding"])])
def test_admission_keeps_room_for_the_output_of_those_that_decode(tokens: int, admitted: list[str]) -> None:
    """Of 8 blocks it has 2, and with 6 more tokens after its first it would have 4."""
    it = scheduler(8, headroom_tokens=6, max_num_batched_tokens=32)
    it.add(prompt("decoding", 8, max_tokens=20))
    apply(it.schedule())
    it.add(prompt("next", tokens, max_tokens=1))
    assert [name for name, *_ in shape(apply(it.schedule()))] == admitted


def test_no_room_is_kept_for_more_output_than_there_can_be() -> None:
    it = scheduler(4, headroom_tokens=500)
    it.add(prompt("decoding", 8, max_tokens=5))
    it.add(prompt("next", 4, max_tokens=1, hold=True))
    assert [name for name, *_ in shape(it.schedule())] == ["decoding", "next"]


def test_headroom_keeps_nobody_out_of_an_idle_engine() -> None:
    it = scheduler(4, headroom_tokens=500)
    it.add(prompt("whole", 9, max_tokens=8))
    assert shape(it.schedule()) == [("whole", 0, 9, True)]


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
    it.reserve(reserved)
    assert (it.waiting, it.waiting_tokens, reserved.tables) == (1, 6, [])
    assert said(it) == [(GRANTED, "reserved")]
    assert said(it) == []
    assert (len(reserved.tables[0]), reserved.status, it.waiting) == (2, Status.RESERVED, 0)
    assert it.schedule() is None
    assert not it.has_work
    it.activate(reserved)
    reserved.tokens.append(1)
    assert shape(it.schedule()) == [("reserved", 6, 1, True)]


def test_a_reservation_can_be_granted_by_the_step_itself() -> None:
    it = scheduler()
    it.add(prompt("running", 4))
    it.reserve(prompt("reserved", 6))
    apply(it.schedule())
    assert [admission.kind for admission in it.take_admissions()] == [GRANTED]


def test_only_a_granted_reservation_can_be_activated() -> None:
    it = scheduler(4)
    granted(it, prompt("large", 16, max_tokens=1))
    waiting = prompt("waiting", 6)
    it.reserve(waiting)
    for each in (prompt("stranger", 6), waiting):
        with pytest.raises(EngineFault):
            it.activate(each)


def test_a_reservation_reuses_the_prefix_that_is_here() -> None:
    it = scheduler(prefix_cache=True)
    first = prompt("first", 12)
    it.add(first)
    apply(it.schedule())
    it.blocks.register(first, 0)
    second = granted(it, prompt("second", 11))
    assert (second.cached_tokens, second.tables[0][:2]) == (8, first.tables[0][:2])


def test_a_reservation_waits_for_room_in_its_place() -> None:
    it = scheduler(4)
    first = granted(it, prompt("first", 8))
    it.reserve(prompt("second", 12, max_tokens=1))
    it.reserve(prompt("third", 4, max_tokens=1))
    assert said(it) == []
    it.remove(first)
    assert said(it) == [(GRANTED, "second"), (GRANTED, "third")]


def test_an_event_of_whoever_is_gone_is_not_told() -> None:
    it = scheduler()
    reserved = prompt("reserved", 6)
    it.reserve(reserved)
    it.admit()
    it.remove(reserved)
    assert it.take_admissions() == ()


def test_a_reservation_yields_to_an_older_head_and_to_no_younger_one() -> None:
    it = scheduler(8)
    it.add(prompt("running", 12, ticket=1))
    apply(it.schedule())
    it.add(prompt("head", 21, ticket=3))
    it.reserve(prompt("later", 4, ticket=4))
    assert shape(apply(it.schedule())) == [("running", 12, 1, True)]
    assert said(it) == []
    it.reserve(prompt("earlier", 4, ticket=2))
    assert said(it) == [(GRANTED, "earlier")]


def test_a_large_reservation_is_not_starved_by_prompts_that_come_later() -> None:
    """40 of 64 blocks once waited for 20,000 steps, while 7,618 later prompts were admitted."""
    it = scheduler(64, max_num_seqs=64, max_num_batched_tokens=256)
    large, later = prompt("large", 160), 0
    for index in range(12):
        it.add(prompt(f"earlier {index}", 12, max_tokens=8))
    finish_some(it)
    it.reserve(large)
    while large.status is Status.WAITING:
        it.add(prompt(f"later {later}", 12, max_tokens=8))
        later += 1
        finish_some(it)
        assert large.status is Status.RESERVED or it.waiting == later + 1
        assert later < 10


def finish_some(it: Scheduler) -> None:
    """One step, after which whoever has 8 tokens is done."""
    decision = it.schedule()
    for part in apply(decision).parts if decision else ():
        if part.sequence.output_tokens == 8:
            it.remove(part.sequence)


def test_a_reservation_passes_prompts_that_wait_only_for_compute() -> None:
    it = scheduler(13, max_num_seqs=1)
    it.add(prompt("running", 4))
    apply(it.schedule())
    it.add(prompt("waits for a place", 16))
    it.reserve(prompt("passes", 16))
    it.reserve(prompt("would take its blocks", 16, max_tokens=17))
    assert said(it) == [(GRANTED, "passes")]
    assert it.waiting == 2


def test_a_reservation_passes_no_prompt_that_waits_for_blocks() -> None:
    it = scheduler(8, max_num_seqs=1)
    it.add(prompt("running", 20))
    apply(it.schedule())
    it.add(prompt("waits for blocks too", 16))
    it.reserve(prompt("small", 1))
    assert said(it) == []


def test_a_reservation_passes_only_so_many() -> None:
    for passed, kinds in ((64, [GRANTED]), (65, [])):
        it = scheduler(1000, max_num_seqs=1, max_waiting_tokens=10_000)
        it.add(prompt("running", 4))
        apply(it.schedule())
        for index in range(passed):
            it.add(prompt(f"s{index}", 4))
        it.reserve(prompt("passes", 4))
        assert [kind for kind, _ in said(it)] == kinds


# --- wound-wait -----------------------------------------------------------------------------------------------------------


def test_an_older_claim_takes_the_blocks_of_the_youngest_that_no_engine_has_room_for() -> None:
    it = scheduler(8)
    for name, ticket in (("old", 1), ("young", 4), ("younger", 5)):
        held(it, prompt(name, 8, hold=True, ticket=ticket))
    claim = prompt("claim", 12, ticket=3)
    it.reserve(claim)
    assert said(it) == [(TAKEN_BACK, "younger"), (GRANTED, "claim")]
    assert len(claim.tables[0]) == 3
    assert it.check() == []


def test_a_prompt_that_lost_its_blocks_is_read_again_in_its_old_place() -> None:
    it = scheduler(4)
    wounded = held(it, prompt("wounded", 16, hold=True, ticket=5))
    claim = prompt("claim", 9, max_tokens=1, ticket=3)
    it.reserve(claim)
    assert said(it) == [(TAKEN_BACK, "wounded"), (GRANTED, "claim")]
    assert (wounded.status, len(wounded.tokens), wounded.computed_tokens, wounded.tables) == (Status.WAITING, 16, 0, [])
    it.add(prompt("younger", 4, ticket=6))
    assert it.schedule() is None
    it.remove(claim)
    assert shape(apply(it.schedule())) == [("wounded", 0, 16, True)]
    assert said(it) == [(ADMITTED, "wounded")]


def test_no_claim_takes_the_blocks_of_an_older_prompt_or_of_a_pinned_one() -> None:
    for ticket, pinned in ((1, False), (5, True)):
        it = scheduler(4)
        each = held(it, prompt("each", 16, hold=True, ticket=ticket))
        each.pinned = pinned
        it.reserve(prompt("claim", 4, ticket=3))
        assert said(it) == []
        assert it.schedule() is None
        assert len(each.tables[0]) == 4


@pytest.mark.parametrize("busy", ["decoding", "reserved", "pinned", "ready", "reading", "in flight"])
def test_nobody_loses_blocks_while_somebody_will_free_his_by_himself(busy: str) -> None:
    it = scheduler(8, max_num_batched_tokens=8)
    victim = held(it, prompt("victim", 16, hold=True, ticket=5))
    other = prompt("other", 16, max_tokens=1, hold=busy in ("pinned", "reading"), ticket=1)
    if busy in ("decoding", "reading"):
        it.add(other)
        apply(it.schedule())
    elif busy == "pinned":
        held(it, other).pinned = True
    elif busy != "in flight":
        granted(it, other)
        it.activate(other) if busy == "ready" else None
    it.take_admissions()
    it.reserve(prompt("claim", 17 if busy == "in flight" else 16, max_tokens=1, ticket=3))
    it.admit(may_preempt=busy != "in flight")
    assert it.take_admissions() == ()
    assert victim.status is Status.HELD
    if busy == "in flight":
        assert said(it) == [(TAKEN_BACK, "victim"), (GRANTED, "claim")]


def test_nobody_loses_blocks_to_a_claim_that_passes_an_older_one() -> None:
    it = scheduler(8)
    held(it, prompt("held", 24, hold=True, ticket=5))
    it.add(prompt("next", 8, max_tokens=1, ticket=1))
    it.reserve(prompt("reserved", 12, max_tokens=1, ticket=2))
    assert said(it) == []
    assert shape(it.schedule()) == [("next", 0, 8, True)]


def test_room_kept_for_whoever_gives_way_is_room_for_others() -> None:
    it = scheduler(8, headroom_tokens=16)
    writer = started(it, prompt("writer", 4, max_tokens=17, ticket=8))
    it.reserve(prompt("claim", 24, max_tokens=1, ticket=5))
    assert said(it) == []
    assert it._preempt() is writer
    assert said(it) == [(GRANTED, "claim")]


def test_room_kept_for_whoever_is_passed_is_room_for_others_once_that_is_served() -> None:
    it = scheduler(16, max_num_seqs=1, max_num_batched_tokens=32, prefix_cache=True)
    cached = held(it, prompt("cached", 16, hold=True, ticket=1))
    it.blocks.register(cached, 0)
    running = sequence("running", [40] * 4, 8, ticket=1)
    it.add(running)
    apply(it.schedule())
    it.add(prompt("passed", 17, max_tokens=1, ticket=2))
    it.reserve(sequence("claim", [41] * 32, 1, ticket=3))
    assert said(it) == []
    it.remove(running)
    assert shape(apply(it.schedule())) == [("passed", 16, 1, True)]
    assert said(it) == [(GRANTED, "claim")]


def test_nobody_loses_blocks_that_would_not_do() -> None:
    it = scheduler(8)
    held(it, prompt("old", 16, hold=True, ticket=1))
    young = held(it, prompt("young", 16, hold=True, ticket=5))
    it.reserve(prompt("claim", 17, ticket=3))
    assert said(it) == []
    assert young.status is Status.HELD


def test_blocks_that_are_shared_make_no_room() -> None:
    it = scheduler(8, prefix_cache=True)
    old = held(it, prompt("old", 17, hold=True, ticket=1))
    it.blocks.register(old, 0)
    held(it, prompt("young", 18, hold=True, ticket=5))
    assert it.blocks.free_blocks == 2
    it.reserve(sequence("claim", [40] * 16, 1, ticket=3))
    assert said(it) == []
    it.reserve(sequence("smaller", [40] * 12, 1, ticket=2))
    assert said(it) == [(TAKEN_BACK, "young"), (GRANTED, "smaller")]


# --- running --------------------------------------------------------------------------------------------------------------


def test_the_started_beyond_the_batch_run_as_soon_as_there_is_a_place() -> None:
    it = scheduler(max_num_seqs=1)
    first, second = prompt("first", 4), prompt("second", 4)
    for each in (first, second):
        started(it, each)
    it.add(prompt("new", 4))
    assert [name for name, *_ in shape(apply(it.schedule()))] == ["first"]
    assert len(it.active()) == 2
    it.remove(first)
    assert [name for name, *_ in shape(apply(it.schedule()))] == ["second"]


def test_the_ready_give_way_before_earlier_arrivals_that_run() -> None:
    it = scheduler(4, max_num_seqs=1)
    first, second = prompt("first", 8), prompt("second", 8)
    for each in (first, second):
        granted(it, each)
    for each in (first, second):
        it.activate(each)
        each.tokens.append(1)
    plan = apply(it.schedule())
    assert plan.preempted == (second,)
    assert shape(plan) == [("first", 8, 1, True)]
    assert it.check() == []


def test_the_ready_take_over_when_whoever_ran_gives_way_to_them() -> None:
    it = scheduler(4, max_num_seqs=1)
    first, second = prompt("first", 8), prompt("second", 8)
    for each in (first, second):
        granted(it, each)
    for each in (second, first):
        it.activate(each)
        each.tokens.append(1)
    plan = apply(it.schedule())
    assert plan.preempted == (second,)
    assert shape(plan) == [("first", 8, 1, True)]


def test_there_is_no_work_while_every_block_is_kept_for_a_transfer() -> None:
    it = scheduler(4)
    keeper = held(it, prompt("held", 16, hold=True))
    assert not it.has_work
    it.add(prompt("next", 16, hold=True))
    assert it.has_work
    assert it.schedule() is None
    assert not it.has_work
    it.remove(keeper)
    assert it.has_work
    assert [name for name, *_ in shape(it.schedule())] == ["next"]


def test_a_sequence_that_gives_itself_up_lets_the_ready_go_on() -> None:
    it = scheduler(4, max_num_seqs=1)
    pinned, growing = prompt("pinned", 8), prompt("growing", 8)
    granted(it, pinned)
    started(it, growing)
    assert it.schedule() is None
    assert growing.status is Status.WAITING
    assert it.schedule() is None
    it.remove(pinned)
    assert [name for name, *_ in shape(it.schedule())] == ["growing"]


@pytest.mark.parametrize("state", ["waiting", "queued", "running", "ready", "reserved", "held"])
def test_removal_frees_everything_in_any_state(state: str) -> None:
    it = scheduler(8, max_num_seqs=1)
    each = prompt("each", 8, hold=state == "held")
    if state in ("running", "held", "waiting"):
        it.add(each)
    if state == "queued":
        it.reserve(each)
    if state in ("running", "held"):
        apply(it.schedule())
    if state == "held":
        it.hold(each)
    if state in ("ready", "reserved"):
        granted(it, each)
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
    it._residents.running.clear()
    assert it.check()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda it, each: setattr(each["queued"], "tables", [[3]]),
        lambda it, each: setattr(each["queued"], "pinned", True),
        lambda it, each: setattr(each["queued"], "incoming", False),
        lambda it, each: setattr(each["queued"], "status", Status.RESERVED),
        lambda it, each: each["queued"].tokens.append(1),
        lambda it, each: setattr(each["reserved"], "incoming", False),
        lambda it, each: setattr(each["reserved"], "pinned", True),
        lambda it, each: setattr(each["held"], "hold", False),
        lambda it, each: setattr(each["held"], "status", Status.RUNNING),
        lambda it, each: setattr(each["running"], "incoming", True),
    ],
)
def test_the_checker_sees_states_that_do_not_go_together(spoil: Callable[[Scheduler, dict[str, Sequence]], None]) -> None:
    it = scheduler(8)
    each = {"held": held(it, prompt("held", 8, hold=True)), "running": prompt("running", 8)}
    it.add(each["running"])
    apply(it.schedule())
    each["reserved"] = granted(it, prompt("reserved", 4))
    each["queued"] = prompt("queued", 32, max_tokens=1)
    it.reserve(each["queued"])
    assert said(it) == []
    assert it.check() == []
    spoil(it, each)
    assert it.check()
