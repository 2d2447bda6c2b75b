"""Messages survive the wire, and nothing else gets through it."""

from __future__ import annotations

import contextlib

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.attempts import Phase
from core.cost import CostModel
from core.errors import ProtocolError
from core.layout import KVLayout, LayerShape
from core.messages import (
    Address,
    AttemptState,
    Cancel,
    Failed,
    Grant,
    Heartbeat,
    Keep,
    Load,
    Message,
    Renew,
    ServedBy,
    Submit,
    TokenItem,
    TokenLogprobs,
    Tokens,
    Wanted,
    Withdrawn,
)
from core.request import FinishReason
from core.sampling import SamplingParams
from core.tokens import pack_tokens, unpack_tokens
from core.wire import PROTOCOL_VERSION, decode, encode, unpack_bounded

WORKER = Address("decode-0", 3, "tcp://127.0.0.1:1")
SAMPLING = SamplingParams(max_tokens=9, temperature=0.5, logit_bias={7: -1.5}, stop_token_ids=(2, 3), logprobs=2, seed=5)
MESSAGES: tuple[Message, ...] = (
    Submit(
        attempt="a",
        gateway=WORKER,
        tokens=pack_tokens([1, 2, 3]),
        prompt_tokens=2,
        sampling=SAMPLING,
        stage="prefill",
        peer=WORKER,
        salt=b"tenant",
    ),
    Keep(gateway=WORKER, wanted=(Wanted("a", 0), Wanted("b", 7))),
    Cancel(attempt="a"),
    Grant(attempt="a", grant=4, decode=WORKER, endpoints=("127.0.0.1:9",), first_token=16, windowed=True, lease_s=5.0, answers=3),
    Renew(worker=WORKER, number=7, states=(AttemptState("a", Phase.ADMITTED), AttemptState("b", Phase.RUNNING))),
    Withdrawn(worker=WORKER, attempt="a", reason="gone"),
    Tokens(
        worker=WORKER,
        items=(
            TokenItem(
                attempt="a",
                position=0,
                tokens=(5,),
                logprobs=(TokenLogprobs(-0.5, ((5, -0.5), (6, -1.0))),),
                finish=FinishReason.LENGTH,
                served=ServedBy(kv_bytes=9),
            ),
        ),
    ),
    Failed(worker=WORKER, attempt="a", code="engine_fault", message="no"),
    Heartbeat(
        worker=WORKER,
        role="decode",
        accelerator="L40S",
        model="m",
        fingerprint="f",
        layout=KVLayout.whole(layers=(LayerShape(2, 64, 64),), dtype="bfloat16", block_size=16),
        total_blocks=10,
        capacity_tokens=160,
        max_model_len=100,
        max_num_seqs=4,
        kv_endpoint="127.0.0.1:9",
        cost=CostModel(),
        load=Load(running=1),
    ),
)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_is_the_same_after_the_wire(message: Message) -> None:
    assert decode(encode(message)) == message


@given(st.binary(max_size=300))
@settings(max_examples=300)
def test_random_bytes_are_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data)


@given(st.sampled_from(MESSAGES), st.data())
@settings(max_examples=400)
def test_a_damaged_message_is_a_protocol_error_or_another_valid_message(message: Message, data: st.DataObject) -> None:
    packed = bytearray(encode(message))
    packed[data.draw(st.integers(0, len(packed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(ProtocolError):
        assert isinstance(decode(bytes(packed)), Message)


def test_another_protocol_version_is_refused_by_number() -> None:
    with pytest.raises(ProtocolError, match=f"version 999 but this process speaks {PROTOCOL_VERSION}"):
        decode(msgspec.msgpack.encode((999, MESSAGES[1])))


@pytest.mark.parametrize("field", ["attempt", "prompt_tokens", "sampling"])
def test_a_field_of_the_wrong_type_is_refused_by_name(field: str) -> None:
    raw = msgspec.to_builtins(MESSAGES[0]) | {field: None}
    raw["tokens"] = b""
    raw["salt"] = b""
    with pytest.raises(ProtocolError, match=field):
        decode(msgpack.packb([PROTOCOL_VERSION, raw]))


def test_sampling_out_of_range_is_refused_on_the_wire_too() -> None:
    raw = msgspec.msgpack.decode(msgspec.msgpack.encode(MESSAGES[0]))
    raw["sampling"]["temperature"] = -1.0
    with pytest.raises(ProtocolError, match="temperature"):
        decode(msgspec.msgpack.encode((PROTOCOL_VERSION, raw)))


def test_containers_are_bounded_before_they_are_built() -> None:
    with pytest.raises(ProtocolError):
        unpack_bounded(msgpack.packb([None] * 5000), max_bytes=1 << 20)
    with pytest.raises(ProtocolError):
        unpack_bounded(b"\xdd\xff\xff\xff\xff", max_bytes=1 << 20)  # an array that claims four thousand million entries
    with pytest.raises(ProtocolError):
        unpack_bounded(b"\x91" * 10_000, max_bytes=1 << 20)  # ten thousand levels deep


def test_extension_types_are_refused() -> None:
    with pytest.raises(ProtocolError):
        unpack_bounded(msgpack.packb(msgpack.ExtType(5, b"x")), max_bytes=1024)


@given(st.lists(st.integers(0, 2**31 - 1), max_size=50))
def test_token_ids_survive_packing(tokens: list[int]) -> None:
    assert unpack_tokens(pack_tokens(tokens)) == tokens


@pytest.mark.parametrize("data", [b"\x01", b"\x00\x00\x00\xff"])
def test_torn_or_negative_token_ids_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack_tokens(data)
