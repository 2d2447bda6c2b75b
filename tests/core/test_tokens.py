from __future__ import annotations

import pytest

from core.errors import ProtocolError
from core.tokens import pack_tokens, unpack_tokens, within


@pytest.mark.parametrize(
    ("tokens", "inside"),
    [([0], True), ([9], True), ([0, 9, 5], True), ([10], False), ([-1], False), ([3, -1, 3], False), ([3, 1 << 70], False)],
)
def test_tokens_are_within_a_vocabulary_or_not(tokens: list[int], inside: bool) -> None:
    assert within(tokens, 10) is inside


def test_tokens_come_back_as_they_were_packed_and_torn_or_negative_ones_are_refused() -> None:
    assert unpack_tokens(pack_tokens([0, 7, 2**31 - 1])) == [0, 7, 2**31 - 1]
    with pytest.raises(ProtocolError):
        unpack_tokens(b"123")
    with pytest.raises(ProtocolError):
        unpack_tokens(pack_tokens([1, -1]))
