"""One connection's frames, damaged in every way we can think of: never committed, never outside the grant, never a crash.

The link runs in the test's thread over a scripted stream, so that thousands of cases take seconds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from core.clock import ManualClock
from core.errors import CorruptTransfer, LeaseExpired, TransferAborted, TransferError
from core.layout import Region, Span
from kv_transfer.byte_store import ByteStore
from kv_transfer.carriers.inline import InlineEnd
from kv_transfer.events import Broken, Received
from kv_transfer.frames import (
    HEADER_BYTES,
    NOWHERE,
    PIECE_BYTES,
    Abort,
    Begin,
    Commit,
    Finish,
    Kind,
    SessionDigest,
    abort_of,
    pack_body,
    pack_frame,
    parse_header,
    unpack_body,
)
from kv_transfer.grants import GrantTable
from kv_transfer.protocol import Identity, Peer
from kv_transfer.receive_link import ReceiveLink
from kv_transfer.terms import Terms
from tests.kv_transfer.rig import (
    Inbox,
    ScriptedConnection,
    filled,
    layout,
    poisoned,
    sequence_bytes,
    session_frames,
    untouched_outside,
)

SEED, BACK_SEED = 0xFEED, 0xBEEF
GRANT, ATTEMPT = 41, "attempt-1"
FIRST, STOP = 2, 7
SOURCE_BLOCKS, TARGET_BLOCKS = [6, 2], [11, 5, 3]
PUSHES = [(1, 0, 4), (0, 0, 7), (2, 0, 7), (1, 4, 3)]
SOURCE = filled(layout(4), 8)
TARGET_LAYOUT = layout(3)
TERMS = Terms(GRANT, ATTEMPT, FIRST, STOP, 5.0)
FRAMES = session_frames(SOURCE, SEED, TERMS, [SOURCE_BLOCKS], PUSHES)
OTHER_ATTEMPT = session_frames(filled(layout(4), 8, seed=2), SEED, replace(TERMS, attempt="attempt-0"), [SOURCE_BLOCKS], PUSHES)
OTHER_GRANT = session_frames(SOURCE, SEED, replace(TERMS, grant=GRANT + 1), [SOURCE_BLOCKS], PUSHES)
OTHER_CONNECTION = session_frames(SOURCE, SEED + 1, TERMS, [SOURCE_BLOCKS], PUSHES)
PEER = Peer(Identity("m", SOURCE.layout, 1), BACK_SEED, SEED, "inline")


@dataclass
class Outcome:
    store: ByteStore
    inbox: Inbox
    connection: ScriptedConnection
    clock: ManualClock
    grants: GrantTable

    @property
    def replies(self) -> list[tuple[Kind, int]]:
        headers = [parse_header(sent[:HEADER_BYTES], BACK_SEED) for sent in self.connection.sent]
        assert [header.sequence for header in headers] == list(range(len(headers)))
        return [(header.kind, header.grant) for header in headers]


def receive(stream: bytes, open_grant: bool = True, lease_s: float = 5.0) -> Outcome:
    store, inbox, clock, connection = poisoned(TARGET_LAYOUT, 12), Inbox(), ManualClock(), ScriptedConnection(stream)
    grants = GrantTable(store, clock, inbox)
    if open_grant:
        grants.open(replace(TERMS, lease_s=lease_s), [TARGET_BLOCKS])
    ReceiveLink(connection, PEER, InlineEnd(PIECE_BYTES), grants).run()
    return Outcome(store, inbox, connection, clock, grants)


def assert_refused(outcome: Outcome) -> None:
    """Not committed, nothing outside the grant written, and the grant's end is known at the latest when its lease is over."""
    assert not outcome.inbox.of(Received)
    assert Kind.COMMIT not in [kind for kind, _ in outcome.replies]
    assert untouched_outside(outcome.store, TARGET_BLOCKS, FIRST, STOP)
    assert outcome.connection.closed
    outcome.clock.advance(5.0)
    outcome.grants.expire()
    (broken,) = outcome.inbox.events
    assert isinstance(broken, Broken)
    assert (broken.grant, broken.attempt) == (GRANT, ATTEMPT)
    assert len(outcome.grants) == 0


def assert_committed(outcome: Outcome) -> None:
    (received,) = outcome.inbox.events
    assert isinstance(received, Received)
    assert (received.grant, received.attempt, received.tail) == (GRANT, ATTEMPT, b"tail")
    assert received.kv_bytes == (STOP - FIRST) * TARGET_LAYOUT.bytes_per_token
    expected = sequence_bytes(SOURCE, SOURCE_BLOCKS, FIRST, STOP)
    assert sequence_bytes(outcome.store, TARGET_BLOCKS, FIRST, STOP) == expected
    assert untouched_outside(outcome.store, TARGET_BLOCKS, FIRST, STOP)
    assert next(kind for kind, grant in outcome.replies if grant == GRANT) is Kind.COMMIT


def test_an_honest_session_is_committed() -> None:
    assert_committed(receive(b"".join(FRAMES)))


def test_every_flipped_bit_of_a_session_is_detected() -> None:
    stream = b"".join(FRAMES)
    for bit in range(len(stream) * 8):
        damaged = bytearray(stream)
        damaged[bit // 8] ^= 1 << bit % 8
        assert_refused(receive(bytes(damaged)))


def test_a_session_cut_at_any_byte_is_not_committed() -> None:
    stream = b"".join(FRAMES)
    for length in range(len(stream)):
        assert_refused(receive(stream[:length]))


def test_a_byte_lost_or_added_anywhere_is_detected() -> None:
    stream = b"".join(FRAMES)
    for at in range(len(stream)):
        assert_refused(receive(stream[:at] + stream[at + 1 :]))
        assert_refused(receive(stream[:at] + b"\x00" + stream[at:]))


@pytest.mark.parametrize("at", range(len(FRAMES)))
def test_a_dropped_frame_is_detected(at: int) -> None:
    assert_refused(receive(b"".join(FRAMES[:at] + FRAMES[at + 1 :])))


@pytest.mark.parametrize("at", range(len(FRAMES)))
@pytest.mark.parametrize("before", range(len(FRAMES)))
def test_a_frame_sent_twice_is_detected(at: int, before: int) -> None:
    outcome = receive(b"".join([*FRAMES[:before], FRAMES[at], *FRAMES[before:]]))
    if at == before == len(FRAMES) - 1:
        assert_committed(outcome)  # the first FINISH was in its place
    else:
        assert_refused(outcome)


def test_frames_after_the_finish_change_nothing() -> None:
    for late in FRAMES:
        outcome = receive(b"".join([*FRAMES, late]))
        assert_committed(outcome)
        assert outcome.replies[1:] == [(Kind.ABORT, GRANT)]


@pytest.mark.parametrize("one", range(len(FRAMES)))
@pytest.mark.parametrize("other", range(len(FRAMES)))
def test_frames_that_change_places_are_detected(one: int, other: int) -> None:
    frames = list(FRAMES)
    frames[one], frames[other] = frames[other], frames[one]
    if one == other:
        assert_committed(receive(b"".join(frames)))
    else:
        assert_refused(receive(b"".join(frames)))


@pytest.mark.parametrize("donor", [OTHER_ATTEMPT, OTHER_GRANT, OTHER_CONNECTION])
@pytest.mark.parametrize("at", range(1, len(FRAMES)))
def test_a_frame_spliced_in_from_another_session_is_detected(donor: list[bytes], at: int) -> None:
    assert_refused(receive(b"".join([*FRAMES[:at], donor[at], *FRAMES[at + 1 :]])))


@pytest.mark.parametrize("at", range(len(FRAMES)))
def test_a_payload_under_another_header_is_detected(at: int) -> None:
    for donor in (OTHER_ATTEMPT, OTHER_CONNECTION):
        mixed = FRAMES[at][:HEADER_BYTES] + donor[at][HEADER_BYTES:]
        if mixed != FRAMES[at]:
            assert_refused(receive(b"".join([*FRAMES[:at], mixed, *FRAMES[at + 1 :]])))


def mutations(count: int, seed: int) -> Iterator[bytes]:
    """Streams with several faults at once."""
    dice = random.Random(seed)
    pool = [FRAMES, OTHER_ATTEMPT, OTHER_GRANT, OTHER_CONNECTION]
    while count:
        frames = list(FRAMES)
        for _ in range(dice.randint(1, 4)):
            at = dice.randrange(len(frames))
            what = dice.randrange(5)
            if what == 0:
                frames.insert(dice.randrange(len(frames) + 1), dice.choice(dice.choice(pool)))
            elif what == 1 and len(frames) > 1:
                del frames[at]
            elif what == 2:
                dice.shuffle(frames)
            elif what == 3:
                frames[at] = frames[at][: dice.randrange(len(frames[at]) + 1)]
            else:
                damaged = bytearray(frames[at] or b"?")
                damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
                frames[at] = bytes(damaged)
        stream = b"".join(frames)
        if not stream.startswith(b"".join(FRAMES)):
            count -= 1
            yield stream


def test_thousands_of_compound_faults_never_commit_wrong_bytes() -> None:
    committed = 0
    for stream in mutations(4000, seed=20):
        outcome = receive(stream)
        if outcome.inbox.of(Received):
            # All that was added before the end belonged to another grant: ours is there, whole and in order.
            committed += 1
            assert_committed(outcome)
        else:
            assert_refused(outcome)
    assert committed < 400


@settings(max_examples=300)
@given(st.binary(max_size=400))
def test_random_bytes_after_the_handshake_never_crash_it(stream: bytes) -> None:
    assert_refused(receive(stream))


def forged(
    kind: Kind,
    payload: bytes,
    sequence: int = 1,
    grant: int = GRANT,
    layers: Span = Span(0, 1),
    heads: Span = Span(0, 2),
    start: int = 0,
    count: int = 0,
) -> bytes:
    """A frame with right digests from a peer that is proved but not honest."""
    region = Region(layers, heads, Span(start, start + count)) if kind is Kind.DATA or start or count else NOWHERE
    return pack_frame(kind, grant, sequence, payload, SEED, region) + payload


def begin_of(attempt: str, first: int, stop: int, windowed: bool = False) -> bytes:
    return pack_body(Begin(attempt, TARGET_LAYOUT.region(Span(first, stop)), windowed))


ROW = TARGET_LAYOUT.layer_bytes_per_token(0)


@pytest.mark.parametrize(
    "frame",
    [
        forged(Kind.DATA, bytes(ROW), layers=Span(3, 4), start=FIRST, count=1),
        forged(Kind.DATA, bytes(ROW), layers=Span(2**16 - 1, 2**16), start=FIRST, count=1),
        forged(Kind.DATA, bytes(ROW), layers=Span(0, 2**16 - 1), start=FIRST, count=1),
        forged(Kind.DATA, bytes(2 * ROW), layers=Span(2, 4), start=FIRST, count=1),
        forged(Kind.DATA, bytes(ROW), layers=Span(0, 2), start=FIRST, count=1),
        forged(Kind.DATA, b"", layers=Span(1, 1), start=FIRST, count=1),
        forged(Kind.DATA, bytes(ROW), start=FIRST - 1, count=1),
        forged(Kind.DATA, bytes(ROW), start=STOP, count=1),
        forged(Kind.DATA, bytes(ROW * 2), start=STOP - 1, count=2),
        forged(Kind.DATA, bytes(ROW), start=2**32 - 2, count=1),
        forged(Kind.DATA, bytes(ROW - 1), start=FIRST, count=1),
        forged(Kind.DATA, bytes(ROW + 1), start=FIRST, count=1),
        forged(Kind.DATA, bytes(ROW), start=FIRST, count=2**32 - 1),
        forged(Kind.DATA, b"", start=FIRST, count=0),
        forged(Kind.COMMIT, pack_body(Commit(0))),
        forged(Kind.FINISH, pack_body(Finish(1, 0, b""))),
        forged(Kind.FINISH, pack_body(Finish(0, 0, b"")), start=1),
        forged(Kind.FINISH, b"\xc1"),
        forged(Kind.ABORT, pack_body(abort_of(TransferAborted("changed my mind")))),
        forged(Kind.BEGIN, begin_of(ATTEMPT, FIRST, STOP)),
        forged(Kind.DATA, bytes(ROW), heads=Span(0, 1), start=FIRST, count=1),
        forged(Kind.DATA, bytes(ROW), heads=Span(1, 3), start=FIRST, count=1),
        forged(Kind.DATA, bytes(ROW), heads=Span(0, 2**16 - 1), start=FIRST, count=1),
        forged(Kind.DATA, bytes(ROW // 2), heads=Span(0, 1), start=FIRST, count=1),
    ],
)
def test_a_frame_that_no_honest_sender_makes_ends_the_session_at_once(frame: bytes) -> None:
    outcome = receive(FRAMES[0] + frame)
    (broken,) = outcome.inbox.of(Broken)
    assert broken.error.code in ("corrupt_transfer", "transfer_aborted")
    assert broken.given_up == ("changed my mind" in str(broken.error))
    assert (Kind.ABORT, GRANT) in outcome.replies
    assert_refused(outcome)


def test_a_finish_without_all_tokens_is_refused_though_its_digest_is_right() -> None:
    digest = SessionDigest()
    for frame in FRAMES[:-2]:
        digest.add(frame)
    finish = forged(Kind.FINISH, pack_body(Finish(len(FRAMES) - 2, digest.value(), b"")), sequence=len(FRAMES) - 2)
    outcome = receive(b"".join([*FRAMES[:-2], finish]))
    assert isinstance(outcome.inbox.of(Broken)[0].error, CorruptTransfer)
    assert "missing" in str(outcome.inbox.of(Broken)[0].error)
    assert_refused(outcome)


@pytest.mark.parametrize(
    "body",
    [
        begin_of("attempt-0", FIRST, STOP),
        begin_of(ATTEMPT, FIRST + 1, STOP),
        begin_of(ATTEMPT, FIRST, STOP - 1),
        begin_of(ATTEMPT, FIRST, STOP, windowed=True),
        pack_body(Begin(ATTEMPT, Region(Span(0, 2), Span(0, 2), Span(FIRST, STOP)), False)),
        pack_body(Begin(ATTEMPT, Region(Span(0, 3), Span(0, 1), Span(FIRST, STOP)), False)),
    ],
)
def test_a_stale_sender_is_turned_away_and_the_grant_stays_open_for_the_right_one(body: bytes) -> None:
    stale = forged(Kind.BEGIN, body, sequence=0)
    outcome = receive(stale + b"".join(FRAMES))
    assert outcome.replies == [(Kind.ABORT, GRANT)]  # it has been told that it is over, so over it is
    assert outcome.inbox.events == []
    ReceiveLink(ScriptedConnection(b"".join(FRAMES)), PEER, InlineEnd(PIECE_BYTES), outcome.grants).run()
    assert [type(event) for event in outcome.inbox.events] == [Received]


def test_a_second_connection_cannot_touch_a_grant_that_is_bound_to_another() -> None:
    store, inbox = poisoned(TARGET_LAYOUT, 12), Inbox()
    grants = GrantTable(store, ManualClock(), inbox)
    grants.open(TERMS, [TARGET_BLOCKS])

    class Interrupted(ScriptedConnection):
        """Between two frames of the first sender, a second one tries everything."""

        def recv_into(self, view: memoryview) -> None:
            if not self.closed and self._position == len(b"".join(FRAMES[:3])):
                second = ScriptedConnection(b"".join(FRAMES) + forged(Kind.ABORT, pack_body(Abort("x", "y"))))
                ReceiveLink(second, PEER, InlineEnd(PIECE_BYTES), grants).run()
                assert {parse_header(sent[:HEADER_BYTES], BACK_SEED).kind for sent in second.sent} == {Kind.ABORT}
            super().recv_into(view)

    ReceiveLink(Interrupted(b"".join(FRAMES)), PEER, InlineEnd(PIECE_BYTES), grants).run()
    assert [type(event) for event in inbox.events] == [Received]
    assert untouched_outside(store, TARGET_BLOCKS, FIRST, STOP)


def test_a_session_with_a_wrong_payload_ends_alone() -> None:
    """The framing is sound, so the connection's other session goes on."""
    store, inbox = poisoned(TARGET_LAYOUT, 12), Inbox()
    grants = GrantTable(store, ManualClock(), inbox)
    grants.open(TERMS, [TARGET_BLOCKS])
    grants.open(replace(TERMS, grant=GRANT + 1), [[0, 1, 2]])
    frames = [frame for pair in zip(FRAMES, OTHER_GRANT, strict=True) for frame in pair]
    frames[4] = frames[4][:-1] + bytes([frames[4][-1] ^ 1])
    connection = ScriptedConnection(b"".join(frames))
    ReceiveLink(connection, PEER, InlineEnd(PIECE_BYTES), grants).run()
    (broken,), (received,) = inbox.of(Broken), inbox.of(Received)
    assert isinstance(broken.error, CorruptTransfer)
    assert (broken.grant, received.grant) == (GRANT, GRANT + 1)
    assert sequence_bytes(store, [0, 1, 2], FIRST, STOP) == sequence_bytes(SOURCE, SOURCE_BLOCKS, FIRST, STOP)


class ActingStore(ByteStore):
    """Does something right before its n-th write."""

    def __init__(self, at: int, act: Callable[[], None]) -> None:
        super().__init__(TARGET_LAYOUT, 12)
        for page in (page for pair in self.pages for page in pair):
            page[:] = 0xA5
        self._left, self._act = at, act

    def write(self, layer: int, blocks: Sequence[int], start: int, count: int, data: memoryview) -> None:
        self._left -= 1
        if self._left == 0:
            self._act()
        super().write(layer, blocks, start, count, data)


def test_a_store_that_fails_ends_the_session_and_not_the_connection() -> None:
    def fail() -> None:
        raise RuntimeError("out of memory")

    store, inbox = ActingStore(2, fail), Inbox()
    grants = GrantTable(store, ManualClock(), inbox)
    grants.open(TERMS, [TARGET_BLOCKS])
    grants.open(replace(TERMS, grant=GRANT + 1), [[0, 1, 2]])
    stream = b"".join(FRAMES) + b"".join(OTHER_GRANT)
    ReceiveLink(ScriptedConnection(stream), PEER, InlineEnd(PIECE_BYTES), grants).run()
    (broken,) = inbox.of(Broken)
    assert "out of memory" in str(broken.error)
    assert [received.grant for received in inbox.of(Received)] == [GRANT + 1]


def test_a_frame_that_comes_after_the_lease_is_not_written_even_before_anyone_swept() -> None:
    clock = ManualClock()
    store, inbox = poisoned(TARGET_LAYOUT, 12), Inbox()
    grants = GrantTable(store, clock, inbox)
    grants.open(TERMS, [TARGET_BLOCKS])

    class Slow(ScriptedConnection):
        def recv_into(self, view: memoryview) -> None:
            if self._position == len(FRAMES[0]):
                clock.advance(5.0)
            super().recv_into(view)

    ReceiveLink(Slow(b"".join(FRAMES)), PEER, InlineEnd(PIECE_BYTES), grants).run()
    (broken,) = inbox.events
    assert isinstance(broken, Broken)
    assert isinstance(broken.error, LeaseExpired)
    assert untouched_outside(store, TARGET_BLOCKS, 0, 0)


def test_the_sender_of_an_unknown_grant_is_told_once_for_all_its_frames() -> None:
    outcome = receive(b"".join(FRAMES), open_grant=False)
    assert outcome.inbox.events == []
    assert outcome.replies == [(Kind.ABORT, GRANT)]
    abort = unpack_body(outcome.connection.sent[0][HEADER_BYTES:], Abort)
    assert abort.code == TransferAborted.code


def test_a_header_that_claims_more_than_a_piece_ends_the_connection_before_it_is_read() -> None:
    for kind, length in ((Kind.DATA, PIECE_BYTES + 1), (Kind.FINISH, 1 << 17), (Kind.DATA, 2**32 - 1)):
        fields = bytearray(pack_frame(kind, GRANT, 1, b"", SEED)[:-8])
        fields[28:32] = length.to_bytes(4, "little")
        header = bytes(fields) + xxhash.xxh3_64_intdigest(fields, SEED).to_bytes(8, "little")
        assert parse_header(header, SEED).length == length
        outcome = receive(FRAMES[0] + header + bytes(100))
        assert isinstance(outcome.inbox.of(Broken)[0].error, CorruptTransfer)
        assert_refused(outcome)


def test_the_error_of_a_lost_connection_is_a_transfer_error() -> None:
    outcome = receive(FRAMES[0])
    (broken,) = outcome.inbox.of(Broken)
    assert type(broken.error) is TransferError
