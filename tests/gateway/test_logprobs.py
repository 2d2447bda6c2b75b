"""Tokens, their bytes and their offsets add up to the text, whatever the tokenizer does with spaces and characters."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from core.messages import TokenItem, TokenLogprobs
from core.request import FinishReason
from gateway.protocol.answers import Answer, AnswerOptions, ChatShape, Choice, CompletionShape
from gateway.text.codec import TextCodec
from gateway.text.token_reader import TextOptions, TokenReader

WORKER = ("m0", 1)


@pytest.fixture
def sentencepiece(byte_fallback):
    codec = TextCodec(PreTrainedTokenizerFast(tokenizer_object=byte_fallback), byte_fallback.get_vocab_size())
    return codec, byte_fallback.token_to_id


@pytest.fixture
def byte_codec(byte_level):
    return TextCodec(PreTrainedTokenizerFast(tokenizer_object=byte_level), byte_level.get_vocab_size())


def answered(codec, prompt, tokens, shape, *, skip=True, finish=FinishReason.LENGTH, **options):
    """The one choice of a whole answer of `tokens`, each of which comes in a message of its own."""
    decode = codec.skip_special if skip else codec.show_all
    hidden = {"skipped": codec.special_ids} if skip and hasattr(codec, "special_ids") else {}
    reader, choice = TokenReader(prompt, TextOptions(decode, **hidden, **options)), Choice(0, prompt)
    for position, token in enumerate(tokens):
        top = ((token, -0.5), (7, -1.5))
        last = position == len(tokens) - 1
        item = TokenItem(
            attempt="a",
            position=position,
            tokens=(token,),
            logprobs=(TokenLogprobs(logprob=-0.5, top=top),),
            finish=finish if last else None,
        )
        delta = reader.take(WORKER, item)
        if delta is not None:
            choice.add(delta)
    answer = Answer(shape, "id", "m", 0, codec.token_text, AnswerOptions(with_logprobs=True))
    return json.loads(answer.whole([choice], {}, None))["choices"][0]


def as_completion(codec, prompt, tokens, **options):
    choice = answered(codec, prompt, tokens, CompletionShape(), **options)
    return choice["text"], choice["logprobs"]


def as_chat(codec, prompt, tokens, **options):
    choice = answered(codec, prompt, tokens, ChatShape(codec.token_bytes), **options)
    return choice["message"]["content"], choice["logprobs"]["content"]


def test_spaces_of_sentencepiece_tokens_are_theirs(sentencepiece):
    codec, id_of = sentencepiece
    tokens = [id_of(piece) for piece in ("▁world", "▁the", "lo", "<0xE2>", "<0x82>", "<0xAC>", "▁world")]
    text, said = as_completion(codec, [id_of("▁Hello")], tokens)
    assert text == " world thelo€ world"
    assert said["tokens"] == [" world", " the", "lo", "", "", "€", " world"]
    assert [text[start : start + len(token)] for start, token in zip(said["text_offset"], said["tokens"], strict=True)] == (
        said["tokens"]
    )
    content, entries = as_chat(codec, [id_of("▁Hello")], tokens)
    assert "".join(entry["token"] for entry in entries) == content == text
    assert bytes(byte for entry in entries for byte in entry["bytes"]) == text.encode()


def test_alternatives_have_their_spaces_too(sentencepiece):
    codec, id_of = sentencepiece
    assert [codec.token_text(id_of(piece)) for piece in ("▁world", "lo", "▁")] == [" world", "lo", " "]
    assert bytes(codec.token_bytes(id_of("▁world"))) == b" world"


def test_a_text_that_begins_with_a_token_loses_its_space_in_its_bytes_too(sentencepiece):
    codec, id_of = sentencepiece
    content, (entry,) = as_chat(codec, [], [id_of("▁world")])
    assert content == entry["token"] == "world"
    assert bytes(entry["bytes"]) == b"world"


def test_what_the_text_does_not_show_has_a_name_and_no_room(byte_codec, letters, byte_level):
    end = byte_level.token_to_id("<|user|>")
    tokens = [letters["a"], end, letters["b"]]
    text, said = as_completion(byte_codec, [letters["x"]], tokens)
    assert text == "ab"
    assert (said["tokens"], said["text_offset"]) == (["a", "<|user|>", "b"], [0, 1, 1])
    text, said = as_completion(byte_codec, [letters["x"]], tokens, skip=False)
    assert text == "".join(said["tokens"]) == "a<|user|>b"
    assert said["text_offset"] == [0, 1, 9]


def test_the_drawn_token_is_among_its_alternatives_under_its_own_name(sentencepiece):
    codec, id_of = sentencepiece
    _, said = as_completion(codec, [], [id_of("▁world"), id_of("<0xE2>"), id_of("<0x82>"), id_of("<0xAC>")])
    for token, top in zip(said["tokens"], said["top_logprobs"], strict=True):
        assert max(top, key=top.get) == token


@pytest.mark.parametrize(("skip", "include", "text"), [(True, False, "a"), (False, False, "a"), (False, True, "a<|end|>")])
def test_an_end_token_is_text_only_where_stops_are(byte_codec, letters, byte_level, skip, include, text):
    """`skip_special_tokens: false` is about the others; as in vLLM."""
    tokens = [letters["a"], byte_level.token_to_id("<|end|>")]
    choice = answered(
        byte_codec, [letters["x"]], tokens, CompletionShape(), skip=skip, finish=FinishReason.STOP, include_stop=include
    )
    assert choice["text"] == text
    assert choice["logprobs"]["tokens"] == ["a", "<|end|>"]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_token_strings_always_make_the_text(byte_fallback, data):
    codec = TextCodec(PreTrainedTokenizerFast(tokenizer_object=byte_fallback), byte_fallback.get_vocab_size())
    ids = st.lists(st.integers(0, byte_fallback.get_vocab_size() - 1), min_size=1, max_size=12)
    text, said = as_completion(codec, data.draw(ids), data.draw(ids))
    assert "".join(said["tokens"]) == text
