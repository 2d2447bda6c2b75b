"""Large bodies: read like small ones, refused by counting, and never worked on by the thread that streams."""

from __future__ import annotations

import json
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import ContextLengthExceeded, InvalidRequest
from gateway.protocol import large_bodies
from gateway.protocol.bodies import MAX_PROMPTS, ChatRequest, CompletionRequest, DetokenizeRequest, parse
from gateway.protocol.fields import ignored_fields
from gateway.protocol.large_bodies import LARGE_BODY_BYTES, MAX_ELEMENTS, MAX_FIELD_BYTES, parse_large
from gateway.routes import generating
from gateway.text.codec import TextCodec
from gateway.text.detokenizer import MAX_CONTEXT_TOKENS

LIMIT = 8
spaces = st.sampled_from(["", " ", "\n\t "])
values = st.one_of(
    st.integers(-5, 300),
    st.booleans(),
    st.none(),
    st.text(alphabet='a[]",\\', max_size=3),
    st.floats(allow_nan=False, allow_infinity=False),
)
prompts = st.one_of(
    st.lists(st.integers(-5, 300), max_size=LIMIT),
    st.lists(st.lists(st.integers(-5, 300), max_size=LIMIT), max_size=4),
    st.lists(st.one_of(values, st.lists(values, max_size=3)), max_size=4),
    values,
)


def outcome(read):
    try:
        return read()
    except InvalidRequest as error:
        return error.param


@settings(max_examples=300, deadline=None)
@given(prompt=prompts, indent=st.sampled_from([None, 2]), space=spaces)
def test_a_large_body_reads_as_the_same_small_one_does(prompt, indent, space):
    body = (space + json.dumps({"model": "m", "prompt": prompt, "echo": True}, indent=indent) + space).encode()
    assert outcome(lambda: parse_large(CompletionRequest, body, LIMIT)) == outcome(lambda: parse(CompletionRequest, body))


@pytest.mark.parametrize(
    "text", ["[1,[2]]", "[[1]2]", "[[1],2]", "[[1],[2]", "[[1]],", "[[1][2]]", "[[[1]]]", "[[1],]", '[["a]"]]']
)
def test_lists_that_are_torn_or_mixed_are_refused(text):
    with pytest.raises(InvalidRequest):
        parse_large(CompletionRequest, b'{"prompt": ' + text.encode() + b"}", LIMIT)


def no_parser(*args, **kwargs):
    raise AssertionError("parsed what counting could refuse")


@pytest.mark.parametrize("prompt", [[1, *"not ids!"], [[1], [2, *"not ids!"]]])
def test_lists_beyond_the_context_are_refused_before_any_id_is_parsed(monkeypatch, prompt):
    monkeypatch.setattr(large_bodies, "parse", no_parser)
    with pytest.raises(ContextLengthExceeded, match="9 ids") as refused:
        parse_large(CompletionRequest, json.dumps({"prompt": prompt}).encode(), LIMIT)
    assert refused.value.param == "prompt"


def test_too_many_prompts_and_long_small_fields_are_refused_unparsed(monkeypatch):
    monkeypatch.setattr(large_bodies, "parse", no_parser)
    for fields, param in (
        ({"prompt": [[1]] * (MAX_PROMPTS + 1)}, "prompt"),
        ({"prompt": "a", "metadata": {"a": "b" * MAX_FIELD_BYTES}}, "metadata"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            parse_large(CompletionRequest, json.dumps(fields).encode(), LIMIT)
        assert refused.value.param == param


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages": [{"role": "user", "content": [' + b'{"type": "text", "text": ""},' * MAX_ELEMENTS + b"{}]}]}",
        b'{"messages": [' + b"{}," * MAX_ELEMENTS + b"{}]}",
        b'{"prompt": ["", ' + b"1," * MAX_ELEMENTS + b"1]}",
        b"{" + b'"": 1,' * MAX_ELEMENTS + b'"": 1}',
        b"[" * 2 * MAX_ELEMENTS,
        b'{"prompt": "' + b'\\"' * MAX_ELEMENTS,  # a string that never ends, and would be begun anew at each of its quotes
    ],
    ids=["parts", "messages", "prompts", "fields", "brackets", "quotes"],
)
def test_bodies_of_very_many_elements_are_refused_unparsed(monkeypatch, body):
    monkeypatch.setattr(large_bodies, "parse", no_parser)
    with pytest.raises(InvalidRequest):
        parse_large(CompletionRequest if b"prompt" in body else ChatRequest, body, 1 << 30)


def test_ids_where_none_belong_are_named_and_not_read():
    body = b'{"prompt": "a", "tokens": [' + b"1," * MAX_ELEMENTS + b"1]}"
    taken = parse_large(CompletionRequest, body, LIMIT)
    assert (list(ignored_fields(taken)), taken.model_extra) == (["tokens"], {"tokens": 0})


def test_what_looks_like_elements_within_a_text_is_none():
    text = '[{"a": ["b", ' * MAX_ELEMENTS
    assert parse_large(CompletionRequest, json.dumps({"prompt": text}).encode(), LIMIT).prompt == text
    body = {"messages": [{"role": "user", "content": text}] * 3}
    assert parse_large(ChatRequest, json.dumps(body).encode(), LIMIT).messages[2].content == text


def test_ids_to_detokenize_are_cut_out_as_well():
    assert parse_large(DetokenizeRequest, b'{"tokens": [1, 2]}', LIMIT).tokens == [1, 2]


@pytest.fixture
def worked(monkeypatch):
    """Names of the threads that did each kind of long work."""
    seen: dict[str, set[str]] = {"parse": set(), "decode": set()}

    def noted(kind, work):
        def call(*args, **kwargs):
            if kind == "parse" or len(args[0]) == 1 or len(args[0]) > MAX_CONTEXT_TOKENS:  # the end of a prompt is no long work
                seen[kind].add(threading.current_thread().name)
            return work(*args, **kwargs)

        return call

    monkeypatch.setattr(generating, "parse_large", noted("parse", parse_large))
    plain = TextCodec._decoder
    monkeypatch.setattr(TextCodec, "_decoder", lambda self, skip_special: noted("decode", plain(self, skip_special)))
    return seen


def test_long_work_is_done_in_the_tokenizers_threads(worked, set_stage):
    stage = set_stage()
    stage.worker("m0")
    body = {"model": "tiny", "prompt": [stage.ids("hi" * 100)] * 200, "max_tokens": 1}
    assert len(json.dumps(body)) > LARGE_BODY_BYTES
    assert len(stage.http.post("/v1/completions", json=body).json()["choices"]) == 200
    assert stage.http.post("/tokenize", json={"prompt": "hello", "return_token_strs": True}).json()["token_strs"] == [*"hello"]
    echoed = stage.http.post("/v1/completions", json={"model": "tiny", "prompt": "hi" * 50, "echo": True, "max_tokens": 1})
    assert echoed.json()["choices"][0]["text"].startswith("hi" * 50)
    assert worked["parse"]
    assert all(name.startswith("tokenize") for name in worked["parse"])
    assert any(name.startswith("tokenize") for name in worked["decode"])
    assert "gateway-http" not in worked["decode"]
