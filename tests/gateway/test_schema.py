"""What the published document says of answers is what they are: every route, every kind of answer."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from tests.gateway.test_generating import events, post

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"


@pytest.fixture
def http(stage):
    stage.worker("m0")
    return stage.http


@pytest.fixture
def document(http) -> dict[str, Any]:
    return http.get("/openapi.json").json()


def closed(schema: Any) -> Any:
    """The schema, with objects of named fields closed: an answer with a field that it does not list breaks it."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    return {**inner, "additionalProperties": False} if isinstance(inner.get("properties"), dict) and "type" in inner else inner


def check(document: dict[str, Any], shape: str, data: Any, open_too: bool = False) -> None:
    schemas = document["components"]["schemas"] if open_too else closed(document["components"]["schemas"])
    jsonschema.Draft202012Validator({"$ref": f"#/components/schemas/{shape}", "components": {"schemas": schemas}}).validate(data)


def conforms(document: dict[str, Any], response: Any, path: str, **options: bool) -> None:
    """The response is one that the document has for its path, method, status and media type."""
    said = document["paths"][path][response.request.method.lower()]["responses"][str(response.status_code)]
    media = response.headers["content-type"]
    content = said["content"].get(media) or said["content"][media.partition(";")[0]]
    if "$ref" in content["schema"]:
        check(document, content["schema"]["$ref"].rpartition("/")[2], response.json(), **options)
    else:
        assert content["schema"]["type"] == "string"


def test_the_document_lists_every_route(stage, document):
    assert sorted(document["paths"]) == [
        "/debug/instances",
        "/debug/invariants",
        "/debug/requests",
        "/detokenize",
        "/health",
        "/live",
        "/load",
        "/metrics",
        "/ping",
        "/ready",
        "/tokenize",
        CHAT,
        COMPLETION,
        "/v1/models",
        "/v1/models/{model_id}",
        "/version",
    ]


def test_every_get_answers_what_the_document_says(http, document):
    post(http, max_tokens=2)
    post(http, CHAT, max_tokens=2)
    for path in (
        "/v1/models",
        "/health",
        "/ready",
        "/ping",
        "/live",
        "/load",
        "/version",
        "/metrics",
        "/debug/instances",
        "/debug/requests",
    ):
        response = http.get(path)
        assert response.status_code == 200
        conforms(document, response, path)
    conforms(document, http.get("/debug/invariants"), "/debug/invariants", open_too=True)
    conforms(document, http.get("/v1/models/tiny"), "/v1/models/{model_id}")
    conforms(document, http.get("/v1/models/none"), "/v1/models/{model_id}")
    assert http.get("/debug/requests").json()["recent"]
    assert http.get("/debug/instances").json()["instances"]


def test_what_cannot_be_served_yet_conforms_too(stage):
    document = stage.http.get("/openapi.json").json()
    for path in ("/health", "/v1/models", "/debug/instances", "/debug/requests"):
        conforms(document, stage.http.get(path), path)
    response = post(stage.http)
    assert response.status_code == 503
    conforms(document, response, COMPLETION)


ASKED = [{}, {"n": 2, "return_token_ids": True}, {"logprobs": 1}, {"echo": True}, {"stop": ["a", "e", "i", "o", "u", " "]}]


@pytest.mark.parametrize("traced", ["0", "1"])
@pytest.mark.parametrize("fields", ASKED)
@pytest.mark.parametrize("path", [COMPLETION, CHAT])
def test_every_kind_of_answer_conforms(http, document, path, fields, traced):
    chat = path == CHAT
    if chat:
        fields = {**fields, **({"logprobs": True, "top_logprobs": 1} if "logprobs" in fields else {}), "echo": None}
    http.headers["x-hetserve-trace"] = traced
    response = post(http, path, max_tokens=8, **fields)
    assert response.status_code == 200, response.text
    conforms(document, response, path)
    for options in ({}, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}):
        streamed = post(http, path, max_tokens=8, stream=True, stream_options=options, **fields)
        conforms(document, streamed, path)
        for chunk in events(streamed):
            check(document, "ChatChunk" if chat else "CompletionChunk", chunk)


def test_tokens_and_errors_conform(http, document):
    conforms(document, http.post("/tokenize", json={"prompt": "hi", "return_token_strs": True}), "/tokenize")
    conforms(document, http.post("/tokenize", json={"prompt": "hi"}), "/tokenize")
    conforms(document, http.post("/detokenize", json={"tokens": [1]}), "/detokenize")
    conforms(document, post(http, max_tokens=0), COMPLETION)
    conforms(document, post(http, CHAT, model="other"), CHAT)


def test_an_error_within_a_stream_conforms(stage):
    def breaks(worker, submit):
        worker.send(worker.item(submit, 0))
        worker.fail(submit, "made_up_code", "it broke")

    stage.worker("m0", behave=breaks)
    document = stage.http.get("/openapi.json").json()
    lines = [line for line in post(stage.http, stream=True).text.split("\n\n") if line]
    check(document, "ErrorBody", json.loads(lines[-1].removeprefix("data: ")))


def test_a_key_is_asked_for_where_it_is_needed(set_stage):
    stage = set_stage(gateway={"port": 0, "api_key": "secret-key"})
    document = stage.http.get("/openapi.json").json()
    needs = {path for path, methods in document["paths"].items() for said in methods.values() if "security" in said}
    assert document["paths"].keys() - needs == {"/health", "/ready", "/ping", "/live", "/version"}
    response = stage.http.get("/v1/models", headers={"authorization": "Bearer wrong-key"})
    assert response.status_code == 401
    conforms(document, response, "/v1/models")
