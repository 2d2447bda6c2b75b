"""Mail that misbehaves does exactly what its plan says, and no more."""

from __future__ import annotations

import heapq
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.messages import Address, Cancel, Failed, Message
from mail.faults import AlarmClock, Delay, Drop, Duplicate, Fault, FaultyPeers, Letter, Plan, RandomFaults, Reorder

A, B = "tcp://a", "tcp://b"
WORKER = Address("w", 1, A)


class VirtualTime:
    """`later` as a simulator has it."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now_s + seconds, next(self._order), action))

    def run(self, until_s: float = 1e9) -> None:
        while self._queue and self._queue[0][0] <= until_s:
            self.now_s, _, action = heapq.heappop(self._queue)
            action()


class Recorder:
    """What left, to whom, and when."""

    def __init__(self, time: VirtualTime) -> None:
        self._time = time
        self.left: list[tuple[float, str, str]] = []
        self.forgotten: list[str] = []
        self.answer = True
        self.lost = 7

    def send(self, endpoint: str, message: Message) -> bool:
        self.left.append((self._time.now_s, endpoint, message.attempt))
        return self.answer

    def forget(self, endpoint: str) -> None:
        self.forgotten.append(endpoint)

    def close(self, linger_s: float = 0.5) -> None:
        self.answer = False

    def to(self, endpoint: str) -> list[str]:
        return [attempt for _, to, attempt in self.left if to == endpoint]


def by_number(*faults: Fault | None) -> Plan:
    return lambda letter: faults[letter.number] if letter.number < len(faults) else None


def sent(plan: Plan, *attempts: str, run: bool = True) -> Recorder:
    time = VirtualTime()
    recorder = Recorder(time)
    peers = FaultyPeers(recorder, plan, time.later)
    for attempt in attempts:
        assert peers.send(A, Cancel(attempt=attempt))
    if run:
        time.run()
    return recorder


@pytest.mark.parametrize(
    ("fault", "order"),
    [
        (None, "abc"),
        (Drop(), "bc"),
        (Delay(1.0), "bca"),
        (Duplicate(), "aabc"),
        (Duplicate(after_s=1.0), "abca"),
        (Reorder(), "bac"),
    ],
)
def test_each_fault_does_what_it_is_called(fault: Fault | None, order: str) -> None:
    assert "".join(sent(by_number(fault), "a", "b", "c").to(A)) == order


def test_a_message_to_be_overtaken_by_nobody_leaves_by_itself() -> None:
    assert sent(by_number(None, Reorder(0.5)), "a", "b", run=False).left == [(0.0, A, "a")]
    assert sent(by_number(None, Reorder(0.5)), "a", "b").left == [(0.0, A, "a"), (0.5, A, "b")]


def test_a_late_message_lets_those_go_that_waited_for_the_next_one() -> None:
    recorder = sent(by_number(Delay(0.1), Reorder(0.5)), "a", "b")
    assert recorder.left == [(0.1, A, "a"), (0.1, A, "b")]


def test_peers_do_not_wait_for_each_other() -> None:
    time = VirtualTime()
    recorder = Recorder(time)
    peers = FaultyPeers(recorder, by_number(Reorder(0.5)), time.later)
    peers.send(A, Cancel(attempt="a"))
    peers.send(B, Cancel(attempt="b"))
    assert recorder.left == [(0.0, B, "b")]


def test_after_forgetting_a_peer_what_waited_for_it_does_not_leave_and_after_closing_nothing_does() -> None:
    time = VirtualTime()
    recorder = Recorder(time)
    peers = FaultyPeers(recorder, by_number(Reorder(0.5), Delay(1.0)), time.later)
    peers.send(A, Cancel(attempt="a"))
    peers.forget(A)
    peers.send(A, Cancel(attempt="b"))
    peers.close()
    time.run()
    assert recorder.left == []
    assert recorder.forgotten == [A]


def test_who_sends_is_told_what_the_mail_below_says() -> None:
    recorder = Recorder(VirtualTime())
    peers = FaultyPeers(recorder, by_number(None, Drop()), recorder._time.later)
    recorder.answer = False
    assert not peers.send(A, Cancel(attempt="a"))
    assert peers.send(A, Cancel(attempt="b"))
    assert peers.lost == 7


faults = st.one_of(
    st.none(),
    st.just(Drop()),
    st.floats(0.01, 2).map(Delay),
    st.floats(0, 2).map(Duplicate),
    st.floats(0.01, 2).map(Reorder),
)


@settings(max_examples=200, deadline=None)
@given(plan=st.lists(faults, max_size=30), to=st.lists(st.sampled_from([A, B]), min_size=30, max_size=30), gaps=st.floats(0, 1))
def test_every_message_leaves_as_often_as_planned_and_faultless_ones_at_once_and_in_order(plan, to, gaps) -> None:
    time = VirtualTime()
    recorder = Recorder(time)
    peers = FaultyPeers(recorder, by_number(*plan), time.later)
    sent_s = []
    for number, endpoint in enumerate(to):
        time.run(until_s=number * gaps)
        time.now_s = number * gaps
        sent_s.append(time.now_s)
        peers.send(endpoint, Cancel(attempt=str(number)))
    time.run()
    planned = [plan[number] if number < len(plan) else None for number in range(30)]
    times = {Drop: 0, Duplicate: 2}
    left = Counter(int(attempt) for _, _, attempt in recorder.left)
    assert left == Counter({number: times.get(type(fault), 1) for number, fault in enumerate(planned)})
    assert all(to[int(attempt)] == endpoint for _, endpoint, attempt in recorder.left)
    latest = {Delay: lambda fault: fault.seconds, Duplicate: lambda fault: fault.after_s, Reorder: lambda fault: fault.at_most_s}
    for at_s, _, attempt in recorder.left:
        fault = planned[int(attempt)]
        late_s = latest[type(fault)](fault) if type(fault) in latest else 0.0
        assert sent_s[int(attempt)] <= at_s <= sent_s[int(attempt)] + late_s + 1e-9
    plain = [int(attempt) for _, _, attempt in recorder.left if planned[int(attempt)] is None]
    assert plain == sorted(plain)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), share=st.sampled_from([0.0, 0.01, 0.1, 1.0]))
def test_drawn_faults_depend_on_seed_and_number_alone_and_are_as_frequent_as_asked(seed: int, share: float) -> None:
    chosen = (Drop(), Delay(0.1), Duplicate(), Reorder())
    plan = RandomFaults(seed, share, chosen, of=(Cancel,))
    drawn = [plan(Letter("w", A, Cancel(attempt="a"), number)) for number in range(4000)]
    assert drawn == [plan(Letter("w", B, Cancel(attempt="b"), number)) for number in range(4000)]
    assert not any(plan(Letter("w", A, Failed(worker=WORKER, attempt="a", code="", message=""), number)) for number in range(100))
    hits = Counter(type(fault) for fault in drawn if fault)
    assert abs(hits.total() - 4000 * share) <= 6 * (4000 * share * (1 - share)) ** 0.5
    if share == 1.0:
        assert all(800 < hits[type(fault)] < 1200 for fault in chosen)
        assert drawn != [RandomFaults(seed + 1, share, chosen)(Letter("w", A, Cancel(attempt="a"), n)) for n in range(4000)]


def test_numbers_count_each_type_of_message_by_itself() -> None:
    seen: defaultdict[str, list[int]] = defaultdict(list)

    def plan(letter: Letter) -> None:
        seen[type(letter.message).__name__].append(letter.number)

    peers = FaultyPeers(Recorder(VirtualTime()), plan, VirtualTime().later)
    for message in (Cancel(attempt="a"), Failed(worker=WORKER, attempt="a", code="", message=""), Cancel(attempt="b")):
        peers.send(A, message)
    assert seen == {"Cancel": [0, 1], "Failed": [0]}


def test_an_alarm_clock_rings_in_order_on_its_own_thread_and_not_after_it_is_closed() -> None:
    alarm, rung, done = AlarmClock(), [], threading.Event()
    alarm.later(600.0, lambda: rung.append("never"))
    alarm.later(0.05, done.set)
    alarm.later(0.03, lambda: rung.append(threading.current_thread().name))
    alarm.later(0.0, lambda: rung.append("now"))
    assert done.wait(30)
    alarm.close()
    assert rung == ["now", "late-mail"]
