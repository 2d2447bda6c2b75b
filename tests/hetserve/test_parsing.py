"""Answers as servers write them."""

from __future__ import annotations

import pytest

from hetserve import parsing


@pytest.mark.parametrize("read", [parsing.completion, parsing.chunk])
def test_a_prompts_ids_are_read_where_chats_and_where_completions_say_them(read):
    head = {"id": "x", "model": "m", "created": 0, "usage": {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}}
    chat = {**head, "prompt_token_ids": [1, 2], "choices": [{"index": 0, "message": {"role": "assistant", "content": "a"}}]}
    plain = {**head, "choices": [{"index": 0, "text": "a", "prompt_token_ids": [1, 2]}]}
    assert [choice.prompt_token_ids for said in (chat, plain) for choice in read(said).choices] == [(1, 2), (1, 2)]
    assert read({**plain, "choices": [{"index": 0, "text": "a"}]}).choices[0].prompt_token_ids is None
