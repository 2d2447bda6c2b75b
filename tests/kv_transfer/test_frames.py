"""Frames: what is packed comes back, and nothing else is believed."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import CorruptTransfer, LeaseExpired, TransferAborted, TransferError
from core.layout import LayerShape, Region, Span
from kv_transfer.frames import (
    HEADER_BYTES,
    MAX_CONTROL_BYTES,
    PIECE_BYTES,
    Abort,
    Begin,
    Commit,
    Finish,
    Kind,
    abort_of,
    check_payload,
    error_of,
    largest_piece_bytes,
    pack_body,
    pack_frame,
    parse_header,
    piece_tokens,
    unpack_body,
)
from tests.kv_transfer.rig import layout

U16, U32, U64 = st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
HEADER = pack_frame(Kind.DATA, 2**63 + 5, 17, b"payload", 99, Region(Span(3, 5), Span(2, 6), Span(1000, 1007)))


def spans(number: st.SearchStrategy[int]) -> st.SearchStrategy[Span]:
    return st.builds(lambda start, size: Span(start, start + size), number, number)


@given(st.sampled_from(Kind), U64, U32, st.binary(max_size=64), U64, st.builds(Region, spans(U16), spans(U16), spans(U32)))
def test_a_frame_comes_back_as_it_was_packed(
    kind: Kind, grant: int, sequence: int, payload: bytes, seed: int, region: Region
) -> None:
    packed = pack_frame(kind, grant, sequence, payload, seed, region)
    assert len(packed) == HEADER_BYTES
    header = parse_header(packed, seed)
    assert (header.kind, header.grant, header.sequence, header.length) == (kind, grant, sequence, len(payload))
    assert header.region == region
    check_payload(header, payload, seed)


@pytest.mark.parametrize("bit", range(HEADER_BYTES * 8))
def test_any_flipped_bit_of_a_header_is_noticed(bit: int) -> None:
    damaged = bytearray(HEADER)
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptTransfer):
        parse_header(damaged, 99)


@given(st.binary(max_size=HEADER_BYTES * 2), U64)
def test_random_bytes_are_never_a_header(data: bytes, seed: int) -> None:
    with pytest.raises(CorruptTransfer):
        parse_header(data, seed)


@given(U64.filter(lambda seed: seed != 99))
def test_a_header_of_another_connection_is_noise(seed: int) -> None:
    with pytest.raises(CorruptTransfer):
        parse_header(HEADER, seed)


@given(st.binary(min_size=7, max_size=7).filter(lambda data: data != b"payload"))
def test_another_payload_of_the_same_length_is_noticed(payload: bytes) -> None:
    with pytest.raises(CorruptTransfer):
        check_payload(parse_header(HEADER, 99), payload, 99)


@pytest.mark.parametrize(
    "body",
    [
        Begin("a", Region(Span(0, 3), Span(0, 2), Span(1, 2)), True),
        Finish(3, 2**64 - 1, b"\x00t"),
        Commit(7),
        Abort("code", "why"),
    ],
)
def test_bodies_come_back(body: Begin | Finish | Commit | Abort) -> None:
    assert unpack_body(pack_body(body), type(body)) == body


@given(st.binary(max_size=200), st.sampled_from([Begin, Finish, Commit, Abort]))
def test_random_bodies_are_corrupt_or_well_formed_but_never_crash(data: bytes, kind: type[Begin]) -> None:
    try:
        body = unpack_body(data, kind)
    except CorruptTransfer:
        return
    assert isinstance(body, kind)


def test_oversize_nested_and_wide_bodies_are_corrupt() -> None:
    for data in (b"\xc0" * (MAX_CONTROL_BYTES + 1), b"\x91" * 5000 + b"\xc0", b"\xdc\xff\xff" + b"\x80" * 65535):
        with pytest.raises(CorruptTransfer):
            unpack_body(data, Begin)


@pytest.mark.parametrize("error", [LeaseExpired("late"), CorruptTransfer("bad"), TransferAborted("no"), TransferError("odd")])
def test_an_abort_carries_its_error_to_the_other_side(error: TransferError) -> None:
    told = error_of(unpack_body(pack_body(abort_of(error)), Abort))
    assert type(told) is (TransferAborted if type(error) is TransferError else type(error))
    assert str(error) in str(told)


def test_an_endless_reason_still_fits_a_frame() -> None:
    assert len(pack_body(abort_of(TransferAborted("x" * 1_000_000)))) < 2000


def test_pieces_are_about_two_mebibytes_and_at_least_a_token() -> None:
    small = layout(shapes=[LayerShape(8, 128, 128)])
    assert piece_tokens(small, 0) * small.layer_bytes_per_token(0) == PIECE_BYTES == largest_piece_bytes(small)
    huge = layout(shapes=[LayerShape(1024, 1024, 1024)], dtype="float32")
    assert piece_tokens(huge, 0) == 1
    assert largest_piece_bytes(huge) == huge.layer_bytes_per_token(0)


@pytest.mark.parametrize("body", [{"frames": "3", "digest": 1, "tail": b""}, {"frames": 3, "digest": 1.0, "tail": b""}])
def test_a_field_of_another_type_is_corrupt(body: dict[str, object]) -> None:
    with pytest.raises(CorruptTransfer):
        unpack_body(msgspec.msgpack.encode(body), Finish)
