"""Answers in OpenAI's JSON: whole responses, and stream chunks built for speed.

A chunk that carries nothing but text is three byte strings put together, of which only the middle one, the text, is
encoded at that time. All other chunks are dictionaries. `Shape` holds what differs between the two endpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from core.messages import TokenLogprobs
from core.request import FinishReason
from gateway.text.token_reader import Delta

LOWEST_LOGPROB = -9999.0
"""JSON has no minus infinity; OpenAI writes this."""

TokenText = Callable[[int], str]
TokenBytes = Callable[[int], list[int] | None]
encode_json = msgspec.json.encode


@dataclass(slots=True)
class Choice:
    """One generation's answer as it grows. `text_offset` counts characters of token texts, for completion logprobs."""

    index: int
    prompt: Sequence[int]
    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: FinishReason | None = None
    stop: str | int | None = None
    text_offset: int = 0
    opened: bool = False

    def add(self, delta: Delta) -> None:
        self.text.append(delta.text)
        self.tokens += delta.tokens
        self.logprobs += delta.logprobs
        self.finish, self.stop = delta.finish, delta.stop


class Shape(Protocol):
    """What differs between chat and plain completions."""

    id_prefix: str
    object_whole: str
    object_chunk: str

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """The choice part of a chunk that must come before the first text, if there is one."""

    def piece(self, choice: Choice, text: str, logprobs: Any) -> dict[str, Any]:
        """The choice part of a chunk with `text`."""

    def whole(self, choice: Choice, text: str, logprobs: Any) -> dict[str, Any]:
        """The choice part of a whole response."""

    def logprobs(self, choice: Choice, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs], text_of: TokenText) -> Any: ...


class ChatShape:
    """`bytes_of` gives a token's UTF-8 bytes, None where they cannot be known."""

    id_prefix = "chatcmpl-"
    object_whole = "chat.completion"
    object_chunk = "chat.completion.chunk"

    def __init__(self, bytes_of: TokenBytes) -> None:
        self._bytes_of = bytes_of

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        return {"index": choice.index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def piece(self, choice: Choice, text: str, logprobs: Any) -> dict[str, Any]:
        return {"index": choice.index, "delta": {"content": text} if text else {}, "logprobs": logprobs}

    def whole(self, choice: Choice, text: str, logprobs: Any) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": choice.index, "message": message, "logprobs": logprobs}

    def logprobs(self, choice: Choice, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs], text_of: TokenText) -> Any:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            return {"token": text_of(token), "logprob": _finite(logprob), "bytes": self._bytes_of(token)}

        content = [
            {**entry(token, drawn.logprob), "top_logprobs": [entry(*alternative) for alternative in drawn.top]}
            for token, drawn in zip(tokens, logprobs, strict=False)
        ]
        return {"content": content, "refusal": None}


class CompletionShape:
    id_prefix = "cmpl-"
    object_whole = "text_completion"
    object_chunk = "text_completion"

    def __init__(self, echo: Sequence[str] | None = None, n: int = 1) -> None:
        self._echo = echo
        self._n = n

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        echo = self._echoed(choice)
        return {"index": choice.index, "text": echo, "logprobs": None, "finish_reason": None} if echo else None

    def piece(self, choice: Choice, text: str, logprobs: Any) -> dict[str, Any]:
        return {"index": choice.index, "text": text, "logprobs": logprobs}

    def whole(self, choice: Choice, text: str, logprobs: Any) -> dict[str, Any]:
        return {"index": choice.index, "text": self._echoed(choice) + text, "logprobs": logprobs}

    def logprobs(self, choice: Choice, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs], text_of: TokenText) -> Any:
        texts = [text_of(token) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(choice.text_offset)
            choice.text_offset += len(text)
        tops: list[dict[str, float]] = []
        for text, drawn in zip(texts, logprobs, strict=False):
            top = {text_of(token): _finite(value) for token, value in drawn.top}
            top.setdefault(text, _finite(drawn.logprob))
            tops.append(top)
        values = [_finite(drawn.logprob) for drawn in logprobs]
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _echoed(self, choice: Choice) -> str:
        return self._echo[choice.index // self._n] if self._echo else ""


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    with_logprobs: bool = False
    with_token_ids: bool = False
    with_usage: bool = False


class Answer:
    """One HTTP request's answer, whole or in chunks. `request_id` is the server's."""

    def __init__(
        self, shape: Shape, request_id: str, model: str, created_s: int, text_of: TokenText, options: AnswerOptions
    ) -> None:
        self._shape = shape
        self._options = options
        self._text_of = text_of
        self._head = {"id": shape.id_prefix + request_id, "created": created_s, "model": model}
        self._fast_text = not (options.with_logprobs or options.with_token_ids)
        self._fast: dict[int, tuple[bytes, bytes]] = {}

    def chunk(self, choice: Choice, delta: Delta) -> bytes:
        """Server-sent events for a delta; empty while its text is held back."""
        opening = b""
        if not choice.opened:
            choice.opened = True
            first = self._shape.opening(choice)
            if self._options.with_token_ids:
                first = first or self._shape.piece(choice, "", None) | {"finish_reason": None}
                first["prompt_token_ids"] = list(choice.prompt)
            opening = b"" if first is None else self._event({"choices": [first]})
        if self._fast_text and delta.finish is None:
            if not delta.text:
                return opening
            before, after = self._fast.get(choice.index) or self._fast_parts(choice)
            return b"".join((opening, before, encode_json(delta.text), after))
        logprobs = None
        if self._options.with_logprobs and delta.tokens:
            logprobs = self._shape.logprobs(choice, delta.tokens, delta.logprobs, self._text_of)
        body = self._shape.piece(choice, delta.text, logprobs)
        body["finish_reason"] = None if delta.finish is None else delta.finish.value
        if delta.finish is not None:
            body["stop_reason"] = delta.stop
        if self._options.with_token_ids:
            body["token_ids"] = delta.tokens
        return opening + self._event({"choices": [body]})

    def last_chunk(self, usage: dict[str, Any] | None, trace: Any) -> bytes:
        """The chunk without choices that carries usage and, when asked for, where the request was served."""
        body: dict[str, Any] = {"choices": []}
        if usage is not None:
            body["usage"] = usage
        if trace is not None:
            body["hetserve"] = trace
        return self._event(body)

    def whole(self, choices: Sequence[Choice], usage: dict[str, Any], trace: Any) -> bytes:
        bodies = []
        for choice in choices:
            logprobs = None
            if self._options.with_logprobs:
                logprobs = self._shape.logprobs(choice, choice.tokens, choice.logprobs, self._text_of)
            body = self._shape.whole(choice, "".join(choice.text), logprobs)
            body["finish_reason"] = None if choice.finish is None else choice.finish.value
            body["stop_reason"] = choice.stop
            if self._options.with_token_ids:
                body["prompt_token_ids"], body["token_ids"] = list(choice.prompt), choice.tokens
            bodies.append(body)
        whole = {**self._head, "object": self._shape.object_whole, "choices": bodies, "usage": usage}
        if trace is not None:
            whole["hetserve"] = trace
        return encode_json(whole)

    def _event(self, body: dict[str, Any]) -> bytes:
        if self._options.with_usage:
            body.setdefault("usage", None)
        return b"data: " + encode_json({**self._head, "object": self._shape.object_chunk, **body}) + b"\n\n"

    def _fast_parts(self, choice: Choice) -> tuple[bytes, bytes]:
        marker = "\x00text\x00"
        event = self._event({"choices": [{**self._shape.piece(choice, marker, None), "finish_reason": None}]})
        before, _, after = event.partition(encode_json(marker))
        self._fast[choice.index] = (before, after)
        return before, after


def usage_of(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LOWEST_LOGPROB
