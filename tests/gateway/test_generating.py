"""What the HTTP door accepts, refuses and answers."""

from __future__ import annotations

import contextlib
import json
import socket
import threading

import pytest

from core.errors import PortInUse
from gateway.gateway import Gateway
from gateway.http.guard import tenant_salt
from tests.gateway.fake_worker import expected_text


@pytest.fixture
def http(stage):
    stage.worker("m0")
    return stage.http


def post(http, path="/v1/completions", **fields):
    body = {"model": "tiny", **fields}
    body.setdefault("messages" if "chat" in path else "prompt", [{"role": "user", "content": "hi"}] if "chat" in path else "hi")
    return http.post(path, json=body)


def error_of(response, status):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def events(response):
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


# --- answers


def test_prompts_may_be_text_ids_or_lists_of_either(stage, http):
    ids = stage.ids("hi")
    one = expected_text(ids, 1, 6)
    for prompt, texts in (
        ("hi", [one]),
        (ids, [one]),
        (["hi", "ho"], [one, expected_text(stage.ids("ho"), 1, 6)]),
        ([ids], [one]),
    ):
        body = post(http, prompt=prompt, max_tokens=6, seed=1).json()
        assert [choice["text"] for choice in body["choices"]] == texts
        assert [choice["index"] for choice in body["choices"]] == list(range(len(texts)))
        assert body["usage"]["prompt_tokens"] == 2 * len(texts)


def test_n_generations_draw_with_seeds_that_follow_each_other(stage, http):
    body = post(http, n=3, seed=10, max_tokens=8).json()
    assert [choice["text"] for choice in body["choices"]] == [expected_text(stage.ids("hi"), 10 + i, 8) for i in range(3)]
    assert body["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 24,
        "total_tokens": 26,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_a_streamed_n_keeps_the_generations_apart(stage, http):
    chunks = events(post(http, n=3, seed=10, max_tokens=8, stream=True))
    texts = ["", "", ""]
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [expected_text(stage.ids("hi"), 10 + i, 8) for i in range(3)]


def test_without_a_seed_the_server_draws_one_for_each_request(stage, http):
    for _ in range(2):
        post(http)
    seeds = [submit.sampling.seed for submit in stage.workers[0].submits]
    assert seeds[0] != seeds[1]


def test_without_a_seed_equal_prompts_of_one_request_draw_apart(stage, http):
    post(http, prompt=["hi", "hi"], max_tokens=2)
    seeds = [submit.sampling.seed for submit in stage.workers[0].submits]
    assert len(set(seeds)) == 2


def test_with_a_seed_equal_prompts_of_one_request_draw_alike(stage, http):
    first, second = post(http, prompt=["hi", "hi"], max_tokens=8, seed=3).json()["choices"]
    assert first["text"] == second["text"]


def test_an_instance_with_a_small_context_does_not_bound_what_a_larger_one_serves(stage, http):
    stage.worker("large", max_model_len=8192)
    for _ in range(4):
        assert post(http, prompt=[1] * 2000, max_tokens=5, seed=1).json()["usage"]["prompt_tokens"] == 2000
    assert [len(submit.tokens) for submit in stage.workers[0].submits] == []


def test_sampling_parameters_reach_the_worker_as_given(stage, http):
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": 0.3}
    given |= {"frequency_penalty": -0.4, "min_tokens": 2, "ignore_eos": True, "seed": 9, "max_tokens": 4}
    assert post(http, **given, logit_bias={"5": -100, "6": 1.5}, stop_token_ids=[3]).status_code == 200
    sampling = stage.workers[0].submits[0].sampling
    assert {name: getattr(sampling, name) for name in given} == given
    assert sampling.logit_bias == {5: -100.0, 6: 1.5}
    assert sampling.stop_token_ids == (3,)


def test_completions_default_to_16_tokens_and_chat_to_the_rest_of_the_context(stage, http):
    assert post(http).json()["usage"]["completion_tokens"] == 16
    assert post(http, "/v1/chat/completions").json()["usage"]["total_tokens"] == 512


def test_chat_goes_through_the_models_template(stage, http):
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    assert post(http, "/v1/chat/completions", messages=messages, max_tokens=2).status_code == 200
    tokens = http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": "<|system|>be brief<|user|>a\nb<|assistant|>"}
    assert stage.workers[0].submits[0].prompt_tokens == len(tokens)


@pytest.mark.parametrize(
    ("fields", "begins"),
    [
        ({}, "<|user|>"),
        ({"reasoning_effort": "low"}, "[low]<|user|>"),
        ({"chat_template_kwargs": {"reasoning_effort": "high"}, "reasoning_effort": "low"}, "[high]<|user|>"),
    ],
)
def test_reasoning_effort_is_the_templates_to_read(stage, http, fields, begins):
    body = post(http, "/v1/chat/completions", max_tokens=1, return_token_ids=True, **fields).json()
    ids = body["prompt_token_ids"]
    assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": begins + "hi<|assistant|>"}


def test_streamed_chat_begins_with_the_role_and_ends_with_usage_when_asked(stage, http):
    chunks = events(post(http, "/v1/chat/completions", max_tokens=4, seed=2, stream=True, stream_options={"include_usage": True}))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 4
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]][-1] == "length"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_echo_puts_the_prompt_first_streamed_or_not(stage, http):
    text = "hi" + expected_text(stage.ids("hi"), 1, 5)
    assert post(http, echo=True, max_tokens=5, seed=1).json()["choices"][0]["text"] == text
    chunks = events(post(http, echo=True, max_tokens=5, seed=1, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text


@pytest.mark.parametrize("stream", [False, True])
def test_completion_logprobs_align_with_the_text(stage, http, stream):
    response = post(http, max_tokens=5, seed=1, logprobs=2, stream=stream)
    parts = [chunk["choices"][0] for chunk in events(response)] if stream else [response.json()["choices"][0]]
    tokens = [token for part in parts for token in part["logprobs"]["tokens"]]
    assert "".join(tokens) == "".join(part["text"] for part in parts) == expected_text(stage.ids("hi"), 1, 5)
    assert [offset for part in parts for offset in part["logprobs"]["text_offset"]] == [0, 1, 2, 3, 4]
    assert [value for part in parts for value in part["logprobs"]["token_logprobs"]] == [-0.25] * 5
    assert all(len(top) >= 2 for part in parts for top in part["logprobs"]["top_logprobs"])


def test_chat_logprobs_name_each_token_and_its_alternatives(stage, http):
    body = post(http, "/v1/chat/completions", max_tokens=3, logprobs=True, top_logprobs=2).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == body["choices"][0]["message"]["content"]
    assert [len(entry["top_logprobs"]) for entry in content] == [2, 2, 2]
    assert all(bytes(entry["bytes"]).decode() == entry["token"] for entry in content)


def test_token_ids_come_back_when_asked_for(stage, http):
    choice = post(http, max_tokens=4, seed=1, return_token_ids=True).json()["choices"][0]
    assert choice["prompt_token_ids"] == stage.ids("hi")
    assert choice["token_ids"] == stage.ids(choice["text"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_says_its_prompts_ids_at_the_top_and_completions_in_the_choice(stage, http, stream):
    """As vLLM does: a chat has one prompt, a completion has one for each choice."""
    for path, on_top in (("/v1/chat/completions", True), ("/v1/completions", False)):
        response = post(http, path, max_tokens=4, n=2, return_token_ids=True, stream=stream)
        parts = events(response) if stream else [response.json()]
        at_top = [part["prompt_token_ids"] for part in parts if "prompt_token_ids" in part]
        inside = [choice["prompt_token_ids"] for part in parts for choice in part["choices"] if "prompt_token_ids" in choice]
        said, other = (at_top, inside) if on_top else (inside, at_top)
        assert other == []
        assert len(said) == (1 if on_top and not stream else 2)
        ids = http.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()["tokens"]
        assert all(one == (ids if on_top else stage.ids("hi")) for one in said)


def test_where_it_was_served_is_told_only_to_those_who_ask(stage, http):
    body = {"model": "tiny", "prompt": "hi"}
    assert "hetserve" not in http.post("/v1/completions", json=body).json()
    traced = http.post("/v1/completions", json=body, headers={"x-hetserve-trace": "1"})
    assert traced.json()["hetserve"]["decode"] == "m0"
    assert traced.json()["hetserve"]["id"].startswith(traced.headers["x-request-id"])


def test_models_are_listed_with_their_context(stage, http):
    (model,) = http.get("/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == ("tiny", 512)
    assert http.get("/v1/models/tiny").json() == model
    error_of(http.get("/v1/models/other/one"), 404)


def test_the_configured_context_limit_wins_when_it_is_smaller(set_stage):
    stage = set_stage(max_model_len=64, gateway={"port": 0, "served_model_name": "org/tiny"})
    stage.worker("m0")
    assert stage.http.get("/v1/models/org/tiny").json()["max_model_len"] == 64
    assert error_of(post(stage.http, model="org/tiny", max_tokens=63), 400)["code"] == "context_length_exceeded"


def test_the_server_makes_the_request_id(http):
    response = http.post("/v1/completions", json={"model": "tiny", "prompt": "hi"}, headers={"x-request-id": "mine"})
    assert response.headers["x-request-id"] != "mine"
    assert response.json()["id"] == "cmpl-" + response.headers["x-request-id"]
    assert http.get("/nope").headers["x-request-id"]


def test_metrics_count_what_happened(http):
    post(http, max_tokens=5)
    post(http, n=99)
    text = http.get("/metrics").text
    assert 'hetserve_requests_total{outcome="completed"} 1.0' in text
    assert "hetserve_output_tokens_total 5.0" in text
    assert 'hetserve_errors_total{code="invalid_request"} 1.0' in text
    assert "hetserve_ttft_seconds_count 1.0" in text
    assert 'hetserve_instance_free_blocks{accelerator="CPU",instance="m0",role="mixed"} 1000.0' in text


def test_tokenize_and_detokenize_are_inverse(http):
    body = http.post("/tokenize", json={"prompt": "héllo 😀", "return_token_strs": True}).json()
    assert body["count"] == len(body["tokens"]) == len("héllo 😀".encode())
    assert body["max_model_len"] == 512
    assert http.post("/detokenize", json={"tokens": body["tokens"]}).json() == {"prompt": "héllo 😀"}


@pytest.mark.parametrize("path", ["/health", "/ready", "/ping"])
def test_health_says_why_not(stage, path):
    down = stage.http.get(path)
    assert down.status_code == 503
    assert down.json()["reasons"] == ["no live instance can decode"]
    assert down.json()["instances"] == {}
    stage.worker("m0")
    up = stage.http.get(path)
    assert (up.status_code, up.json()["instances"]) == (200, {"mixed": 1})


def test_a_gateway_that_can_serve_nobody_or_drains_is_alive(stage):
    assert stage.http.get("/ready").status_code == 503
    assert (stage.http.get("/live").status_code, stage.http.get("/live").json()) == (200, {"status": "ok"})
    stage.worker("m0")
    assert stage.service.drain(10)
    assert stage.http.get("/ready").status_code == 503
    assert stage.http.get("/live").status_code == 200


def test_load_counts_generations_under_way(stage):
    go_on = threading.Event()
    stage.worker("m0", behave=lambda worker, submit: (go_on.wait(20), worker.answer(submit)))
    assert stage.http.get("/load").json() == {"server_load": 0}
    client = threading.Thread(target=lambda: post(stage.http, n=3, max_tokens=2))
    client.start()
    stage.until(lambda: stage.http.get("/load").json() == {"server_load": 3})
    go_on.set()
    client.join()
    assert stage.http.get("/load").json() == {"server_load": 0}


@pytest.mark.parametrize(
    ("path", "status"), [("/health", 200), ("/v1/models", 200), ("/v1/models/none", 404), ("/v1/completions", 405)]
)
def test_head_is_get_without_the_body(http, path, status):
    response = http.head(path)
    assert (response.status_code, response.content) == (status, b"")
    assert response.headers["x-request-id"]
    assert int(response.headers["content-length"]) == len(http.get(path).content)
    assert http.get("/version").json()["version"]  # the connection is as good as before


def test_the_document_describes_every_body(http):
    document = http.get("/openapi.json").json()
    reference = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert reference == {"$ref": "#/components/schemas/ChatRequest"}
    assert "Message" in document["components"]["schemas"]


# --- refusals

COMPLETION_REFUSALS = [
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [264]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": "10"}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": 1e9}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"best_of": 2}, "best_of"),
    ({"suffix": "tail"}, "suffix"),
    ({"logprobs": 21}, "logprobs"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": ["x", ""]}, "stop"),
    ({"stop": 3}, "stop"),
    ({"stop_token_ids": [9999]}, "stop_token_ids"),
    ({"stop_token_ids": list(range(257))}, "stop_token_ids"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"9999": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"min_tokens": 17}, "min_tokens"),
    ({"seed": 2**70}, "seed"),
    ({"stream": "yes"}, "stream"),
    ({"guided_json": {}}, "guided_json"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ({"guided_regex": ""}, "guided_regex"),
    ({"allowed_token_ids": [1]}, "allowed_token_ids"),
    ({"bad_words": ["a"]}, "bad_words"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"vllm_xargs": {"a": 1}}, "vllm_xargs"),
    ({"response_format": {"type": "json_object"}}, "response_format.type"),
    ({"max_tokens": 1e30}, "max_tokens"),
]
CHAT_REFUSALS = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "a king", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "k" * 65, "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": "a", "audio": {"id": "x"}}]}, "messages[0].audio"),
    ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ({"verbosity": "low"}, "verbosity"),
    ({"reasoning_effort": 3}, "reasoning_effort"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "response_format.type"),
    ({"chat_template": "{{ x }}"}, "chat_template"),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize"),
    ({"top_logprobs": 2}, None),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"modalities": ["audio"]}, "modalities[0]"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"include_reasoning": False}, "include_reasoning"),
]


def test_every_wrong_completion_field_is_refused_by_name(stage, http):
    for fields, param in COMPLETION_REFUSALS:
        error = error_of(post(http, **fields), 400)
        assert error["param"] == param, (fields, error)
        assert error["type"] == "invalid_request_error"
    assert stage.workers[0].submits == []
    stage.at_rest()


def test_every_wrong_chat_field_is_refused_by_name(stage, http):
    for fields, param in CHAT_REFUSALS:
        error = error_of(post(http, "/v1/chat/completions", **fields), 400)
        assert error["param"] == param, (fields, error)
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]
    assert error_of(post(http, "/v1/chat/completions", messages=image), 400)["param"].startswith("messages[0].content")
    assert stage.workers[0].submits == []


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe{}", b'{"prompt": "\xff"}', b'{"temperature": NaN}', b"[" * 100_000]
)
def test_bodies_that_are_not_json_objects_are_refused(http, body):
    error_of(http.post("/v1/completions", content=body, headers={"content-type": "application/json"}), 400)


def test_the_wrong_media_type_is_refused(http):
    error_of(http.post("/v1/completions", data={"prompt": "hi"}), 400)


def test_unknown_paths_methods_and_models_have_the_same_error_shape(http):
    assert error_of(http.get("/v2/nothing"), 404)["code"] == "not_found"
    assert error_of(http.get("/v1/completions"), 405)["code"] == "method_not_allowed"
    assert error_of(post(http, model="gpt-17"), 404)["code"] == "model_not_found"


def test_an_over_long_prompt_or_completion_is_a_context_error(stage, http):
    for fields in (
        {"prompt": "x" * 512},
        {"prompt": "x" * 510, "max_tokens": 3},
        {"prompt": [1] * 512},
        {"prompt": "hi", "max_tokens": 511},
        {"prompt": "x" * 200_000},
        {"prompt": "x" * 10_000_000},
    ):
        assert error_of(post(http, **fields), 400)["code"] == "context_length_exceeded"
    long_chat = [{"role": "user", "content": "x" * 600}]
    assert error_of(post(http, "/v1/chat/completions", messages=long_chat), 400)["code"] == "context_length_exceeded"
    assert post(http, prompt="x" * 500, max_tokens=12).status_code == 200


@pytest.mark.parametrize(("prompt_tokens", "completion_tokens"), [(496, 16), (500, 12), (511, 1)])
def test_the_default_of_16_tokens_shrinks_to_what_the_context_has_room_for(http, prompt_tokens, completion_tokens):
    assert post(http, prompt="x" * prompt_tokens).json()["usage"]["completion_tokens"] == completion_tokens


def test_a_prompt_that_fills_the_context_is_refused_by_its_own_name(http):
    assert error_of(post(http, prompt="x" * 512), 400)["param"] == "prompt"


def test_too_large_a_body_is_refused_declared_or_not(set_stage):
    stage = set_stage(gateway={"port": 0, "max_body_bytes": 2048})
    stage.worker("m0")
    big = json.dumps({"model": "tiny", "prompt": "x" * 4000}).encode()
    headers = {"content-type": "application/json"}
    assert error_of(stage.http.post("/v1/completions", content=big, headers=headers), 413)["code"] == "payload_too_large"
    chunks = (big[start : start + 500] for start in range(0, len(big), 500))
    assert error_of(stage.http.post("/v1/completions", content=chunks, headers=headers), 413)
    assert post(stage.http).status_code == 200


def test_full_queues_are_429_with_a_time_to_come_back(set_stage):
    stage = set_stage(engine={"max_waiting_tokens": 100})
    stage.worker("m0", waiting=2, waiting_tokens=99)
    response = post(stage.http)
    assert error_of(response, 429)["code"] == "overloaded"
    assert int(response.headers["retry-after"]) >= 1
    stage.at_rest()


def test_the_gateways_own_bound_counts_every_generation_of_a_request(set_stage):
    stage = set_stage(gateway={"port": 0, "max_concurrent": 4})
    m0 = stage.worker("m0", behave=lambda worker, submit: None)
    answers = []
    first = threading.Thread(target=lambda: answers.append(post(stage.http, n=4, max_tokens=2)))
    first.start()
    stage.until(lambda: len(m0.submits) == 4)
    assert error_of(post(stage.http), 429)["code"] == "overloaded"
    m0.later(lambda: [m0.answer(submit) for submit in m0.submits])
    first.join()
    assert answers[0].status_code == 200


def test_more_generations_than_can_ever_be_in_flight_are_refused_for_good(set_stage):
    stage = set_stage(gateway={"port": 0, "max_concurrent": 4})
    m0 = stage.worker("m0")
    assert error_of(post(stage.http, n=5), 400)["param"] == "n"
    assert error_of(post(stage.http, "/v1/chat/completions", n=5), 400)["param"] == "n"
    assert error_of(post(stage.http, n=2, prompt=["a", "b", "c"]), 400)["param"] == "prompt"
    assert error_of(post(stage.http, prompt=[[1]] * 5), 400)["param"] == "prompt"
    assert m0.submits == []
    assert post(stage.http, n=2, prompt=["a", "b"]).status_code == 200


def test_without_an_instance_requests_are_503(stage):
    response = post(stage.http)
    assert error_of(response, 503)["code"] == "unavailable"
    assert response.headers["retry-after"]
    assert response.headers["x-should-retry"] == "true"


def test_clients_are_told_not_to_retry_their_own_mistakes(stage):
    stage.worker("m0")
    for response, status in (
        (post(stage.http, max_tokens=-1), 400),
        (stage.http.get("/nowhere"), 404),
        (stage.http.get("/v1/completions"), 405),
    ):
        assert error_of(response, status)
        assert response.headers["x-should-retry"] == "false"


# --- the key


def test_every_route_but_probes_and_the_version_needs_the_key(set_stage):
    stage = set_stage(gateway={"port": 0, "api_key": "secret-key"})
    stage.worker("m0")
    for path in (
        "/v1/models",
        "/load",
        "/metrics",
        "/debug/instances",
        "/debug/requests",
        "/debug/invariants",
        "/openapi.json",
        "/nope",
    ):
        for given in ({"authorization": ""}, {"authorization": "Bearer wrong-key"}, {"authorization": "Basic secret-key"}):
            assert error_of(stage.http.get(path, headers=given), 401)["code"] == "invalid_api_key"
    for path in ("/health", "/ready", "/live", "/ping"):
        assert stage.http.get(path, headers={"authorization": ""}).status_code == 200
    assert stage.http.get("/version", headers={"authorization": ""}).json()["version"]
    assert post(stage.http).status_code == 200
    assert stage.http.get("/debug/invariants").status_code == 200


def test_prefixes_are_salted_by_the_key_that_came_with_the_request(set_stage):
    salts = []
    for key in ("secret-key", "other-secret", None):
        stage = set_stage(gateway={"port": 0, "api_key": key})
        worker = stage.worker("m0")
        for fields in ({}, {"prompt": "something else"}):
            assert post(stage.http, **fields).status_code == 200
        first, second = (submit.salt for submit in worker.submits)
        assert first == second
        salts.append(first)
    assert salts[2] == b""
    assert [len(salt) for salt in salts[:2]] == [16, 16]
    assert salts[0] != salts[1]


def test_salts_follow_the_key_and_the_clusters_secret_and_nothing_else():
    assert tenant_salt(b"key", b"secret") == tenant_salt(b"key", b"secret")
    assert len({tenant_salt(b"key", b"secret"), tenant_salt(b"kez", b"secret"), tenant_salt(b"key", b"other")}) == 3


# --- the socket


def test_a_taken_port_is_a_typed_error(stage, model_path):
    config = stage.config.model_copy(
        update={"gateway": stage.config.gateway.model_copy(update={"port": int(stage.service.url.rsplit(":", 1)[1])})}
    )
    with pytest.raises(PortInUse, match="already in use"):
        Gateway(config, stage.keys, model_path).start()


def talk(stage, raw: bytes) -> bytes:
    """Everything that a server says to raw bytes until it hangs up."""
    port = int(stage.service.url.rsplit(":", 1)[1])
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client, contextlib.suppress(ConnectionError):
        client.sendall(raw)
        while part := client.recv(65536):
            answer += part
    return answer


@pytest.mark.parametrize(
    "raw",
    [
        b"NONSENSE\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
    ],
)
def test_malformed_http_is_answered_in_the_same_shape_and_hung_up_on(stage, raw):
    answer = talk(stage, raw)
    assert answer.startswith(b"HTTP/1.1 400")
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["code"] == "malformed_http"
    assert stage.http.get("/version").status_code == 200


@pytest.mark.parametrize(
    "raw",
    [
        b"GET /version HTTP/1.1\r\nhost: x\r\na: " + b"b" * 1_000_000,
        b"GET /version HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
        b"GET /" + b"a" * 1_000_000,
    ],
)
def test_endless_headers_and_paths_are_hung_up_on(stage, raw):
    answer = talk(stage, raw)
    assert not answer or answer.startswith(b"HTTP/1.1 400")
    assert stage.http.get("/version").status_code == 200
