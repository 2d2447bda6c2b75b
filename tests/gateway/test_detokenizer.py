"""Pieces add up to the whole, whatever the tokens."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from gateway.text.detokenizer import CONTEXT_TOKENS, MAX_UNSETTLED_TOKENS, Detokenizer

quick = settings(max_examples=150, deadline=None)


def pieces(tokenizer, prompt, ids):
    stream = Detokenizer(tokenizer.decode, prompt)
    out = [stream.step(token) for token in ids]
    return [*out, stream.flush()]


@quick
@given(text=st.text(max_size=60), prompt=st.text(max_size=20))
def test_any_text_comes_back_piece_by_piece(byte_level, text, prompt):
    ids = byte_level.encode(text, add_special_tokens=False).ids
    assert "".join(pieces(byte_level, byte_level.encode(prompt, add_special_tokens=False).ids, ids)) == text


@quick
@given(st.data())
def test_random_byte_tokens_decode_as_the_whole_does(byte_level, data):
    ids = data.draw(st.lists(st.integers(0, byte_level.get_vocab_size() - 1), max_size=MAX_UNSETTLED_TOKENS - 2))
    assert "".join(pieces(byte_level, [], ids)) == byte_level.decode(ids)


@quick
@given(
    st.lists(st.sampled_from(["▁Hello", "▁world", "lo", "▁", "a", "b", "▁the", "é", "😀", "€"]), max_size=30), st.integers(0, 8)
)
def test_words_with_leading_spaces_and_byte_fallback_match_the_whole(byte_fallback, words, cut):
    vocab = byte_fallback.get_vocab()
    ids = []
    for word in words:
        ids += [vocab[word]] if word in vocab else [vocab[f"<0x{byte:02X}>"] for byte in word.encode()]
    prompt_words = [word for word in words[:cut] if word in vocab]
    prompt = [vocab[word] for word in prompt_words]
    ids = ids[len(prompt) :] if words[:cut] == prompt_words else ids
    whole = byte_fallback.decode(prompt + ids)
    # A prompt of bare spaces decodes to less than it is worth; only compare where the prompt is a true beginning.
    head = byte_fallback.decode(prompt)
    if whole.startswith(head) and (not prompt or head.strip()):
        assert "".join(pieces(byte_fallback, prompt, ids)) == whole[len(head) :]


@quick
@given(st.lists(st.integers(0, 400), max_size=200), st.lists(st.integers(0, 400), max_size=30))
def test_no_ids_whatever_make_it_raise(byte_fallback, ids, prompt):
    pieces(byte_fallback, prompt, ids)


def test_an_emoji_comes_out_once_and_whole(byte_level):
    ids = byte_level.encode("a😀b", add_special_tokens=False).ids
    assert pieces(byte_level, [], ids) == ["a", "", "", "", "😀", "b", ""]


def test_the_end_of_the_prompt_is_never_given_out_again(byte_level):
    half = byte_level.encode("😀", add_special_tokens=False).ids[:2]
    out = pieces(byte_level, byte_level.encode("hello ").ids + half, byte_level.encode("world").ids)
    assert "".join(out) == "world"


def test_endless_broken_bytes_are_let_out_in_bounded_time(byte_level):
    broken = byte_level.encode("é", add_special_tokens=False).ids[1]
    stream = Detokenizer(byte_level.decode)
    out = [stream.step(broken) for _ in range(3 * MAX_UNSETTLED_TOKENS)]
    assert sum(map(len, out)) >= MAX_UNSETTLED_TOKENS


@pytest.mark.parametrize("size", [100, 1000])
def test_a_run_of_tokens_without_text_costs_the_same_for_each_of_them(byte_level, size):
    special = byte_level.token_to_id("<|user|>")
    decoded = 0

    def counted(ids):
        nonlocal decoded
        decoded += len(ids)
        return byte_level.decode(ids)

    hello = byte_level.encode("hello ", add_special_tokens=False).ids
    stream = Detokenizer(counted, hello)
    assert "".join(stream.step(token) for token in [special] * size) == ""
    assert decoded <= size * 2 * (len(hello) + CONTEXT_TOKENS + 1)
    after = byte_level.encode("wörld", add_special_tokens=False).ids
    assert "".join([*map(stream.step, after), stream.flush()]) == "wörld"


@quick
@given(st.data())
def test_tokens_without_text_change_nothing_about_the_others(byte_fallback, data):
    tokenizer = Tokenizer.from_str(byte_fallback.to_str())
    tokenizer.add_special_tokens(["<|pad|>"])
    pad = tokenizer.token_to_id("<|pad|>")
    words = data.draw(st.lists(st.sampled_from(["▁Hello", "▁world", "lo", "a", "▁the", "é"]), min_size=1, max_size=6))
    ids = []
    for word in words:
        ids += [tokenizer.token_to_id(word)] + [pad] * data.draw(st.integers(0, 80))
    assert "".join(pieces(tokenizer, [], ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("words", [["<0x77>", "<0xBD>", "▁world"], ["<0x61>", "<0xC3>", "<0xC3>", "lo"]])
def test_ids_on_which_decode_stream_raises_are_read_to_their_end(byte_fallback, words):
    """Why docs/adr/0010 does without `DecodeStream`: a character spelled as a byte, then bytes that are none."""
    ids = [byte_fallback.token_to_id(word) for word in words]
    ready_made = DecodeStream(skip_special_tokens=False)
    with pytest.raises(Exception, match="Invalid prefix"):
        list(map(partial(ready_made.step, byte_fallback), ids))
    text = "".join(pieces(byte_fallback, [], ids))
    assert text.startswith(chr(int(words[0][3:5], 16)))
    assert text.endswith(words[-1].removeprefix("▁"))
