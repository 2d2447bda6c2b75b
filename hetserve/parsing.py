"""JSON to the dataclasses of `hetserve.types`. Pure; anything that does not fit raises InvalidResponse.

Unknown fields are let through, so that an older client understands a newer server.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hetserve.errors import InvalidResponse
from hetserve.types import (
    Choice,
    Chunk,
    Completion,
    Instance,
    Model,
    Tokenization,
    TokenLogprob,
    TopLogprob,
    Trace,
    Usage,
)

Json = Mapping[str, Any]


@contextmanager
def promised(what: str) -> Iterator[None]:
    """Turns the errors of taking apart a wrong shape into one that says what was being read."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InvalidResponse(f"the server's {what} is not in the API's shape: {type(error).__name__} {error}") from error


def parse_object(data: bytes | str, what: str) -> dict[str, Any]:
    """A JSON object. Raises InvalidResponse."""
    try:
        value = json.loads(data)
    except ValueError as error:
        raise InvalidResponse(f"the server's {what} is not JSON: {data[:80]!r}") from error
    except RecursionError as error:
        raise InvalidResponse(f"the server's {what} is JSON nested without end: {data[:80]!r}") from error
    if not isinstance(value, dict):
        raise InvalidResponse(f"the server's {what} is a JSON {type(value).__name__}, not an object")
    return value


def completion(data: Json, request_id: str | None = None) -> Completion:
    with promised("completion"):
        return Completion(
            id=_str(data["id"]),
            model=_str(data["model"]),
            created=int(data["created"]),
            choices=tuple(_choice({"prompt_token_ids": data.get("prompt_token_ids"), **item}) for item in data["choices"]),
            usage=_usage(data.get("usage")),
            traces=_traces(data.get("hetserve")),
            request_id=request_id,
        )


def chunk(data: Json) -> Chunk:
    with promised("stream chunk"):
        return Chunk(
            id=_str(data["id"]),
            model=_str(data["model"]),
            created=int(data["created"]),
            choices=tuple(_choice({"prompt_token_ids": data.get("prompt_token_ids"), **item}) for item in data["choices"]),
            usage=_usage(data.get("usage")),
            traces=_traces(data.get("hetserve")),
        )


def detokenization(data: Json) -> str:
    with promised("detokenization"):
        return _str(data["prompt"])


def models(data: Json) -> tuple[Model, ...]:
    with promised("list of models"):
        return tuple(
            Model(_str(m["id"]), int(m.get("created") or 0), _str(m.get("owned_by") or ""), _int(m.get("max_model_len")))
            for m in data["data"]
        )


def tokenization(data: Json) -> Tokenization:
    with promised("tokenization"):
        tokens = _ids(data["tokens"])
        return Tokenization(tokens, int(data.get("count", len(tokens))), _int(data.get("max_model_len")))


def instances(data: Json) -> tuple[Instance, ...]:
    with promised("list of instances"):
        return tuple(_instance(item) for item in data["instances"])


def requests(data: Json) -> tuple[Trace, ...]:
    with promised("list of requests"):
        return tuple(_trace(item) for item in data["recent"])


def running(data: Json) -> tuple[Trace, ...]:
    with promised("list of requests"):
        return tuple(_trace(item) for item in data["running"])


def _choice(data: Json) -> Choice:
    """A choice of either endpoint, whole (`text`, `message`) or a piece (`text`, `delta`)."""
    message = data.get("message") or data.get("delta")
    text = _text(data.get("text") if message is None else message.get("content"))
    stop = data.get("stop_reason")
    return Choice(
        index=int(data["index"]),
        text=text or "",
        finish_reason=_text(data.get("finish_reason")),
        role=_text(message.get("role")) if message else None,
        logprobs=_logprobs(data.get("logprobs")),
        token_ids=_ids(data["token_ids"]) if data.get("token_ids") is not None else None,
        prompt_token_ids=_ids(data["prompt_token_ids"]) if data.get("prompt_token_ids") is not None else None,
        stop_reason=stop if isinstance(stop, int) else _text(stop),
    )


def _usage(data: Json | None) -> Usage | None:
    if data is None:
        return None
    details = data.get("prompt_tokens_details") or {}
    return Usage(
        prompt_tokens=int(data["prompt_tokens"]),
        completion_tokens=int(data.get("completion_tokens") or 0),
        total_tokens=int(data["total_tokens"]),
        cached_tokens=int(details.get("cached_tokens") or 0),
    )


def _traces(data: Json | list[Json] | None) -> tuple[Trace, ...]:
    """The `hetserve` object of an answer: a list where there are several generations."""
    if data is None:
        return ()
    return tuple(_trace(item) for item in data) if isinstance(data, list) else (_trace(data),)


def _trace(data: Json) -> Trace:
    return Trace(
        id=_str(data.get("id") or ""),
        prefill=_text(data.get("prefill")),
        decode=_text(data.get("decode")),
        local=bool(data.get("local")),
        outcome=_str(data.get("outcome") or ""),
        attempts=int(data.get("attempts") or 1),
        prompt_tokens=int(data.get("prompt_tokens") or 0),
        tokens=int(data.get("tokens") or 0),
        cached_tokens=int(data.get("cached_tokens") or 0),
        kv_bytes=int(data.get("kv_bytes") or 0),
        ttft_s=_float(data.get("ttft_s")),
        tpot_s=_float(data.get("tpot_s")),
        error=_text(data.get("error")),
        raw=data,
    )


def _logprobs(data: Json | None) -> tuple[TokenLogprob, ...] | None:
    if data is None:
        return None
    if "content" in data:
        return tuple(
            TokenLogprob(
                token=_str(item["token"]),
                logprob=_float(item["logprob"]),
                top=tuple(
                    TopLogprob(_str(t["token"]), float(t["logprob"]), _bytes(t.get("bytes")))
                    for t in item.get("top_logprobs") or ()
                ),
                bytes=_bytes(item.get("bytes")),
            )
            for item in data["content"] or ()
        )
    count = len(data["tokens"])
    tops = data.get("top_logprobs") or [None] * count
    offsets = data.get("text_offset") or [None] * count
    return tuple(
        TokenLogprob(
            token=_str(token),
            logprob=_float(logprob),
            top=tuple(TopLogprob(t, float(p)) for t, p in sorted((top or {}).items(), key=lambda pair: -pair[1])),
            text_offset=_int(offset),
        )
        for token, logprob, top, offset in zip(data["tokens"], data["token_logprobs"], tops, offsets, strict=True)
    )


def _instance(data: Json) -> Instance:
    counts = ("running", "waiting", "waiting_tokens", "context_tokens", "free_blocks", "held_blocks", "total_blocks", "steps")
    return Instance(
        name=_str(data["name"]),
        role=_str(data["role"]),
        accelerator=_str(data["accelerator"]),
        node=_str(data["node"]),
        incarnation=int(data["incarnation"]),
        state=_str(data["state"]),
        last_seen_s=float(data["last_seen_s"]),
        **{name: int(data[name]) for name in counts},
        raw=data,
    )


def _ids(value: Sequence[Any]) -> tuple[int, ...]:
    return tuple(int(token) for token in value)


def _bytes(value: Sequence[int] | None) -> bytes | None:
    if value is None:
        return None
    if not isinstance(value, list):  # `bytes` of a number is that many zeros
        raise TypeError(f"expected a list of bytes, got {type(value).__name__}")
    return bytes(value)


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {type(value).__name__}")
    return value


def _text(value: Any) -> str | None:
    return None if value is None else _str(value)


def _float(value: Any) -> float | None:
    return None if value is None else float(value)


def _int(value: Any) -> int | None:
    return None if value is None else int(value)
