"""What requests may carry beside the plain fields: numbers as clients write them, nulls, fields of other servers."""

from __future__ import annotations

import json

import pytest

from gateway.protocol.bodies import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest, parse
from gateway.protocol.fields import MAX_HEADER_CHARS, header_value, ignored_fields
from gateway.text.codec import TextCodec
from tests.gateway.fake_worker import expected_text
from tests.gateway.test_generating import error_of, events, post

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
USER = {"role": "user", "content": "hi"}


@pytest.fixture
def http(stage):
    stage.worker("m0")
    return stage.http


TAKEN = [
    (COMPLETION, {"max_tokens": 3.0, "n": 1.0, "top_k": 5.0, "seed": 4.0, "logprobs": 1.0, "min_tokens": 0.0}),
    (COMPLETION, {"stop_token_ids": [3.0], "best_of": 1.0}),
    (COMPLETION, {"response_format": {"type": "text"}}),
    (COMPLETION, {"guided_json": None, "use_beam_search": False, "bad_words": [], "vllm_xargs": {}, "logit_bias": {}}),
    (CHAT, {"max_completion_tokens": 3.0, "top_logprobs": 0}),
    (CHAT, {"top_logprobs": 0, "logprobs": False}),
    (CHAT, {"tools": [], "tool_choice": "none", "functions": None, "documents": [], "echo": False, "verbosity": "medium"}),
    (CHAT, {"chat_template_kwargs": {"a": 0.5, "b": [1, "x"], "c": {"d": None}}}),
    (CHAT, {"messages": [{"role": "critic-2", "content": "hi"}]}),
    (CHAT, {"messages": [USER, {"role": "assistant", "content": "a", "tool_calls": [], "annotations": [], "refusal": None}]}),
]


@pytest.mark.parametrize(("path", "fields"), TAKEN)
def test_what_asks_for_nothing_special_is_taken(http, path, fields):
    response = post(http, path, **{"max_tokens": 2, **fields})
    assert response.status_code == 200, response.text
    assert "x-hetserve-ignored" not in response.headers


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest])
def test_null_is_as_good_as_nothing_in_every_optional_field(kind):
    needed = {"prompt": "hi", "messages": [USER], "tokens": [1]}
    must = {name: needed[name] for name, field in kind.model_fields.items() if field.is_required()}
    if kind is TokenizeRequest:
        must = {"prompt": "hi"}
    plain = parse(kind, json.dumps(must).encode())
    for name in kind.model_fields.keys() - must.keys():
        assert parse(kind, json.dumps({**must, name: None}).encode()).model_dump() == plain.model_dump(), name


def test_whole_numbers_reach_the_worker_as_integers(stage, http):
    assert post(http, max_tokens=3.0, seed=4.0).json()["choices"][0]["text"] == expected_text(stage.ids("hi"), 4, 3)
    assert type(stage.workers[0].submits[0].sampling.max_tokens) is int


def test_a_templates_variables_may_be_of_any_kind(model_path):
    codec = TextCodec.load(model_path)
    codec._tokenizer.chat_template = "{{ a }} {{ b[1] }} {{ c.d }}"
    variables = {"a": 0.5, "b": [1, "x"], "c": {"d": 7}}
    body = parse(ChatRequest, json.dumps({"messages": [USER], "chat_template_kwargs": variables}).encode())
    assert codec.render([USER], False, False, body.template_options) == "0.5 x 7"


def test_roles_are_the_templates_to_know(http):
    body = post(http, CHAT, messages=[{"role": "critic", "content": "hi"}], max_tokens=1, return_token_ids=True).json()
    text = http.post("/detokenize", json={"tokens": body["prompt_token_ids"]}).json()["prompt"]
    assert text == "<|critic|>hi<|assistant|>"


def test_reasoning_of_earlier_turns_goes_to_the_template_under_both_names():
    for name in ("reasoning", "reasoning_content"):
        body = parse(ChatRequest, json.dumps({"messages": [{"role": "assistant", "content": "a", name: "since b"}]}).encode())
        turn = {"role": "assistant", "content": "a", "reasoning": "since b", "reasoning_content": "since b"}
        assert body.messages[0].plain() == turn


# --- unknown fields


@pytest.mark.parametrize("stream", [False, True])
def test_fields_that_nobody_reads_are_named_in_the_answer(http, stream):
    parts = [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]
    fields = {"made_up": {"a": [1]}, "messages": [{**USER, "x": 1}, {"role": "user", "content": parts, "x": 2}]}
    options = {"stream_options": {"include_usage": True, "later": 1}} if stream else {}
    response = post(http, CHAT, max_tokens=1, stream=stream, **fields, **options)
    assert response.status_code == 200
    named = response.headers["x-hetserve-ignored"].split(",")
    assert named == ["made_up", *(["stream_options.later"] if stream else []), "messages.x", "messages.content.cache_control"]


def test_every_route_with_a_body_names_them(http):
    for path, body in (("/tokenize", {"prompt": "hi"}), ("/detokenize", {"tokens": [1]}), (COMPLETION, {"prompt": "hi"})):
        response = http.post(path, json={**body, "made_up": None})
        assert (response.status_code, response.headers["x-hetserve-ignored"]) == (200, "made_up")


def test_names_in_a_header_are_plain_and_few(http):
    odd = {"a\r\nx-evil: 1": 1, "é,b": 2, "": 3, **{f"field{index:04}" + "x" * 100: 1 for index in range(1000)}}
    response = http.post(COMPLETION, json={"prompt": "hi", "max_tokens": 1, **odd})
    assert response.status_code == 200
    value = response.headers["x-hetserve-ignored"]
    assert len(value) <= MAX_HEADER_CHARS
    assert value.startswith("a??x-evil??1,??b,field0000xxx")
    assert value.endswith(",...")
    assert "x-evil" not in response.headers


def test_the_same_name_is_said_once():
    assert header_value(["a", "b", "a"]) == "a,b"
    assert header_value([]) == ""
    assert list(ignored_fields(parse(DetokenizeRequest, b'{"tokens": [1]}'))) == []


def test_a_large_body_names_them_too_and_bounds_those_that_have_another_routes_name(http):
    body = {"prompt": [1] * 40_000, "max_tokens": 1, "made_up": 1}
    assert error_of(http.post(COMPLETION, json=body), 400)["code"] == "context_length_exceeded"
    response = http.post(COMPLETION, json={"prompt": "hi", "max_tokens": 1, "tokens": [1] * 40_000})
    assert (response.status_code, response.headers["x-hetserve-ignored"]) == (200, "tokens")
    refused = error_of(http.post(COMPLETION, json={"prompt": [1] * 400_000, "tokens": [1] * 400_000}), 400)
    assert refused["param"] == "tokens"


# --- what answers say


def test_usage_may_run_along_in_every_chunk(stage, http):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(post(http, CHAT, max_tokens=3, n=2, stream=True, stream_options=options))
    prompt_tokens = chunks[-1]["usage"]["prompt_tokens"]
    seen = {0: [], 1: []}
    for chunk in chunks[:-1]:
        usage = chunk["usage"]
        assert (usage["prompt_tokens"], usage["total_tokens"]) == (prompt_tokens, prompt_tokens + usage["completion_tokens"])
        seen[chunk["choices"][0]["index"]].append(usage["completion_tokens"])
    assert seen == {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 6


def test_usage_that_runs_along_needs_usage(http):
    chunks = events(post(http, max_tokens=2, stream=True, stream_options={"continuous_usage_stats": True}))
    assert all("usage" not in chunk for chunk in chunks)


def test_echo_gives_a_text_back_as_it_came(stage, http):
    prompt = "<|user|>hi<|end|>"
    text = post(http, prompt=prompt, echo=True, max_tokens=2, seed=1).json()["choices"][0]["text"]
    assert text.startswith(prompt)
    ids = http.post("/tokenize", json={"prompt": prompt}).json()["tokens"]
    for shown, begins in ((True, "hi"), (False, prompt)):
        body = post(http, prompt=ids, echo=True, max_tokens=1, seed=1, skip_special_tokens=shown).json()
        assert body["choices"][0]["text"] == begins + expected_text(ids, 1, 1)


def test_errors_name_all_that_is_wrong_and_what_would_be_right(http):
    said = error_of(post(http, logit_bias={"x": 1, "5": 1, "y z": 1, "-1": 1}), 400)["message"]
    assert said == "logit_bias: keys must be token ids, got 'x', 'y z', '-1'"
    said = error_of(post(http, logit_bias={"263": 1, "264": 1, "999": 1}), 400)["message"]
    assert said == "logit_bias: the model has 264 token ids, 0 to 263; got 264, 999"
    said = error_of(post(http, prompt=[1, *range(264, 284)]), 400)["message"]
    assert said.endswith("got 264, 265, 266, 267, 268, 269, 270, 271 and 12 more")


def test_prompt_tokens_are_counted_once_for_all_generations(http):
    post(http, n=3, max_tokens=2)
    post(http, prompt=["hi", "hello"], n=2, max_tokens=2, stream=True)
    text = http.get("/metrics").text
    assert "hetserve_prompt_tokens_total 9.0" in text
    assert "hetserve_cached_prompt_tokens_total 6.0" in text


def test_long_generations_have_buckets_of_their_own(http):
    post(http, max_tokens=1)
    text = http.get("/metrics").text
    for seconds in ("60.0", "600.0", "3600.0"):
        assert f'hetserve_e2e_seconds_bucket{{le="{seconds}"}} 1.0' in text


# --- names and defaults


def test_a_model_has_as_many_names_as_it_was_given(set_stage):
    stage = set_stage(gateway={"port": 0, "served_model_name": ["org/first", "second"]})
    stage.worker("m0")
    cards = stage.http.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["org/first", "second"]
    assert {card["root"] for card in cards} == {"tiny"}
    assert stage.http.get("/v1/models/second").json()["id"] == "second"
    for name in ("org/first", "second", None):
        body = {"prompt": "hi", "max_tokens": 1} | ({} if name is None else {"model": name})
        assert stage.http.post(COMPLETION, json=body).json()["model"] == "org/first"
    assert "`org/first`, `second`" in error_of(post(stage.http, model="third"), 404)["message"]
