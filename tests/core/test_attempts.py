"""The life of an attempt: which phases follow which, what the other half's word brings about, and what ends it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.attempts import Effect, Ending, Half, LifeCycle, Phase, Told
from core.errors import DeadlineExceeded, EngineFault, LeaseExpired

LEASE_S = 5.0
PATHS = {
    Half.PREFILL: {
        Phase.WAITING: [],
        Phase.ADMITTED: [Phase.ADMITTED],
        Phase.GRANTED: [Phase.ADMITTED, Phase.GRANTED],
    },
    Half.DECODE: {
        Phase.WAITING: [],
        Phase.ADMITTED: [Phase.ADMITTED],
        Phase.GRANTED: [Phase.ADMITTED, Phase.GRANTED],
        Phase.RUNNING: [Phase.ADMITTED, Phase.GRANTED, Phase.RUNNING],
    },
    Half.WHOLE: {Phase.RUNNING: []},
}
LEGAL = {
    (Half.PREFILL, Phase.WAITING): {Phase.ADMITTED},
    (Half.PREFILL, Phase.ADMITTED): {Phase.WAITING, Phase.GRANTED},
    (Half.DECODE, Phase.WAITING): {Phase.ADMITTED},
    (Half.DECODE, Phase.ADMITTED): {Phase.WAITING, Phase.GRANTED},
    (Half.DECODE, Phase.GRANTED): {Phase.WAITING, Phase.RUNNING},
}
STANDINGS = [(half, phase) for half, phases in PATHS.items() for phase in phases]


def life(half: Half, phase: Phase | None = None, deadline_s: float = 100.0) -> LifeCycle:
    made = LifeCycle(half, deadline_s, LEASE_S, 0.0)
    for step in PATHS[half][phase or made.phase]:
        made.move(step)
    return made


@pytest.mark.parametrize("to", [phase for phase in Phase if phase is not Phase.ENDED])
@pytest.mark.parametrize(("half", "phase"), STANDINGS)
def test_only_legal_transitions_are_made(half: Half, phase: Phase, to: Phase) -> None:
    attempt = life(half, phase)
    if to in LEGAL.get((half, phase), set()):
        attempt.move(to)
        assert attempt.phase is to
    else:
        with pytest.raises(EngineFault, match=f"from {phase.value} to {to.value}"):
            attempt.move(to)
        assert attempt.phase is phase


@pytest.mark.parametrize(("half", "phase"), STANDINGS)
def test_an_attempt_ends_once_from_anywhere(half: Half, phase: Phase) -> None:
    attempt = life(half, phase)
    assert not attempt.ended
    attempt.end(Ending.CANCELLED)
    assert attempt.ended
    assert not attempt.shared
    for to in Phase:
        with pytest.raises(EngineFault):
            attempt.move(to)


@pytest.mark.parametrize(("half", "phase"), STANDINGS)
@pytest.mark.parametrize("ending", Ending)
def test_who_is_told_of_an_end(half: Half, phase: Phase, ending: Ending) -> None:
    told = life(half, phase).end(ending)
    match ending:
        case Ending.FAILED:
            assert told == Told(gateway=True, peer=phase is not Phase.RUNNING)
        case Ending.FINISHED:
            assert told == Told(peer=half is Half.PREFILL)
        case _:
            assert told == Told()


EFFECTS = {
    (Half.PREFILL, Phase.ADMITTED, Phase.WAITING): Effect.SAY,
    (Half.PREFILL, Phase.GRANTED, Phase.RUNNING): Effect.RELEASE,
    (Half.DECODE, Phase.WAITING, Phase.ADMITTED): Effect.RESERVE,
    (Half.DECODE, Phase.ADMITTED, Phase.WAITING): Effect.TAKE_BACK,
    (Half.DECODE, Phase.GRANTED, Phase.WAITING): Effect.TAKE_BACK,
    (Half.DECODE, Phase.GRANTED, Phase.ADMITTED): Effect.GRANT,
    (Half.DECODE, Phase.GRANTED, Phase.GRANTED): Effect.KEEP_OPEN,
    (Half.DECODE, Phase.RUNNING, Phase.GRANTED): Effect.SAY,
}


@pytest.mark.parametrize("theirs", Phase)
@pytest.mark.parametrize(("half", "phase"), STANDINGS)
def test_what_follows_from_what_the_other_half_says(half: Half, phase: Phase, theirs: Phase) -> None:
    attempt = life(half, phase)
    assert attempt.renewed(theirs, 1, 0.0) is EFFECTS.get((half, phase, theirs))
    assert attempt.phase is phase


def test_an_old_or_repeated_renewal_is_void_and_no_sign_of_life() -> None:
    attempt = life(Half.DECODE)
    assert attempt.renewed(Phase.ADMITTED, 7, 0.0) is Effect.RESERVE
    for number in (7, 6, 0):
        assert attempt.renewed(Phase.ADMITTED, number, 4.0) is None
    assert attempt.heard == 7
    attempt.wanted(4.0)
    assert isinstance(attempt.overdue(LEASE_S), LeaseExpired)


@pytest.mark.parametrize(("half", "phase"), STANDINGS)
def test_a_silent_gateway_ends_an_attempt_after_a_lease(half: Half, phase: Phase) -> None:
    attempt = life(half, phase)
    attempt.wanted(3.0)
    attempt.alive(3.0)
    assert attempt.overdue(7.9) is None
    attempt.alive(7.9)
    error = attempt.overdue(8.0)
    assert isinstance(error, LeaseExpired)
    assert "gateway" in str(error)


@pytest.mark.parametrize(("half", "phase"), STANDINGS)
def test_a_silent_other_half_ends_an_attempt_that_leans_on_it(half: Half, phase: Phase) -> None:
    attempt = life(half, phase)
    attempt.alive(3.0)
    attempt.wanted(7.0)
    assert attempt.overdue(7.9) is None
    error = attempt.overdue(8.0)
    leans = half is Half.PREFILL or (half is Half.DECODE and phase in (Phase.WAITING, Phase.ADMITTED))
    assert (error is not None) == leans
    if leans:
        assert isinstance(error, LeaseExpired)
        assert ("decode side" if half is Half.PREFILL else "prefill side") in str(error)


@pytest.mark.parametrize(("half", "phase"), STANDINGS)
def test_the_deadline_ends_an_attempt_that_is_wanted_and_alive(half: Half, phase: Phase) -> None:
    attempt = life(half, phase, deadline_s=6.0)
    attempt.alive(5.0)
    attempt.wanted(5.0)
    assert attempt.overdue(5.9) is None
    assert isinstance(attempt.overdue(6.0), DeadlineExceeded)


@given(st.lists(st.tuples(st.sampled_from(["prefill", "decode"]), st.sampled_from(list(Phase)), st.integers(0, 9))))
def test_nothing_that_a_peer_says_raises(said: list[tuple[str, Phase, int]]) -> None:
    halves = {"prefill": life(Half.PREFILL, Phase.GRANTED), "decode": life(Half.DECODE, Phase.GRANTED)}
    for half, phase, number in said:
        halves[half].renewed(phase, number, 0.0)
        assert halves[half].phase is Phase.GRANTED
