"""What a token is made of."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from gateway.text.codec import TextCodec


@pytest.fixture
def codec_of():
    def make(tokenizer):
        return TextCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer), tokenizer.get_vocab_size())

    return make


def test_every_byte_of_a_byte_level_tokenizer_is_known(byte_level, codec_of):
    codec = codec_of(byte_level)
    text = "a é€😀\n\x00"
    ids = codec.encode(text, special=False)
    assert b"".join(bytes(codec.token_bytes(token)) for token in ids) == text.encode()
    assert {tuple(codec.token_bytes(token)) for token in range(256)} == {(byte,) for byte in range(256)}
    assert bytes(codec.token_bytes(byte_level.token_to_id("<|end|>"))) == b"<|end|>"


def test_byte_fallback_tokens_are_their_byte_and_words_their_text(byte_fallback, codec_of):
    codec = codec_of(byte_fallback)
    for token, expected in (("<0xE2>", [0xE2]), ("<0x41>", [0x41]), ("é", list("é".encode())), ("lo", [108, 111])):
        assert codec.token_bytes(byte_fallback.token_to_id(token)) == expected


def test_bytes_that_cannot_be_known_are_not_made_up(codec_of):
    codec = codec_of(Tokenizer(models.WordLevel({"a": 0, "x\ufffd": 1}, unk_token="a")))
    assert codec.token_bytes(0) == [97]
    assert codec.token_bytes(1) is None


def test_a_tokenizer_that_asks_for_truncation_and_padding_gets_neither(byte_level, codec_of):
    saved = Tokenizer.from_str(byte_level.to_str())
    saved.enable_truncation(4)
    saved.enable_padding(length=16)
    assert (
        codec_of(saved).encode("a text of 25 characters..", special=False) == byte_level.encode("a text of 25 characters..").ids
    )


def test_chat_logprobs_carry_the_bytes_of_half_a_character(stage, byte_level):
    first, second = byte_level.encode("é", add_special_tokens=False).ids
    stage.worker("m0").letters = {
        letter: first if index % 2 else second for index, letter in enumerate("abcdefghijklmnopqrstuvwxyz ")
    }
    ask = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "logprobs": True, "top_logprobs": 1}
    content = stage.http.post("/v1/chat/completions", json=ask)
    given = [entry["bytes"] for entry in content.json()["choices"][0]["logprobs"]["content"]]
    assert len(given) == 3
    assert all(entry in ([0xC3], [0xA9]) for entry in given)
