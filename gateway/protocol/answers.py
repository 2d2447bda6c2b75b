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
    """One generation's answer as it grows. `text_offset` counts characters of text, for completion logprobs; `sent` counts the
    tokens of all chunks so far."""

    index: int
    prompt: Sequence[int]
    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    pieces: list[str | None] = field(default_factory=list)
    finish: FinishReason | None = None
    stop: str | int | None = None
    text_offset: int = 0
    sent: int = 0
    opened: bool = False

    def add(self, delta: Delta) -> None:
        self.text.append(delta.text)
        self.tokens += delta.tokens
        self.logprobs += delta.logprobs
        self.pieces += delta.pieces
        self.finish, self.stop = delta.finish, delta.stop


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token with what is known of it. `piece` is what it added to the text, None if it is not shown."""

    token: int
    logprobs: TokenLogprobs
    piece: str | None

    def text(self, text_of: TokenText) -> str:
        return text_of(self.token) if self.piece is None else self.piece


class Shape(Protocol):
    """What differs between chat and plain completions. `prompt_ids_on_top`: where an answer says them, as in vLLM: a chat has one
    prompt, and completions one for each choice."""

    prompt_ids_on_top: bool
    id_prefix: str
    object_whole: str
    object_chunk: str

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """The choice part of a chunk that must come before the first text, if there is one."""

    def piece(self, choice: Choice, text: str, logprobs: Any) -> dict[str, Any]:
        """The choice part of a chunk with `text`."""

    def whole(self, choice: Choice, text: str, logprobs: Any) -> dict[str, Any]:
        """The choice part of a whole response."""

    def logprobs(self, choice: Choice, drawn: Sequence[Drawn], text_of: TokenText) -> Any:
        """Token strings, put together, are the text; those of tokens that the text does not show are their names."""


class ChatShape:
    """`bytes_of` gives a token's UTF-8 bytes, None where they cannot be known."""

    prompt_ids_on_top = True
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

    def logprobs(self, choice: Choice, drawn: Sequence[Drawn], text_of: TokenText) -> Any:
        def entry(token: int, text: str, logprob: float) -> dict[str, Any]:
            return {"token": text, "logprob": _finite(logprob), "bytes": self._bytes_of(token)}

        content = []
        for one in drawn:
            top = [entry(token, text_of(token), logprob) for token, logprob in one.logprobs.top]
            said = entry(one.token, one.text(text_of), one.logprobs.logprob)
            content.append({**said, "bytes": self._bytes_drawn(one), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _bytes_drawn(self, one: Drawn) -> list[int] | None:
        """A text that begins with the token may have lost the token's leading space: then its bytes have lost it too."""
        known = self._bytes_of(one.token)
        shown = list((one.piece or "").encode("utf-8", "replace"))
        return shown if shown and known is not None and known[-len(shown) :] == shown else known


class CompletionShape:
    prompt_ids_on_top = False
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

    def logprobs(self, choice: Choice, drawn: Sequence[Drawn], text_of: TokenText) -> Any:
        texts, offsets = [], []
        tops: list[dict[str, float]] = []
        for one in drawn:
            text = one.text(text_of)
            texts.append(text)
            offsets.append(choice.text_offset)
            choice.text_offset += len(one.piece or "")
            top = {text if token == one.token else text_of(token): _finite(value) for token, value in one.logprobs.top}
            top.setdefault(text, _finite(one.logprobs.logprob))
            tops.append(top)
        values = [_finite(one.logprobs.logprob) for one in drawn]
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _echoed(self, choice: Choice) -> str:
        return self._echo[choice.index // self._n] if self._echo else ""


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """`with_usage`: streams end in a chunk with usage. `running_usage`: every chunk says that of its own choice so far."""

    with_logprobs: bool = False
    with_token_ids: bool = False
    with_usage: bool = False
    running_usage: bool = False


class Answer:
    """One HTTP request's answer, whole or in chunks. `request_id` is the server's."""

    def __init__(
        self, shape: Shape, request_id: str, model: str, created_s: int, text_of: TokenText, options: AnswerOptions
    ) -> None:
        self._shape = shape
        self._options = options
        self._text_of = text_of
        self._head = {"id": shape.id_prefix + request_id, "created": created_s, "model": model}
        self._fast_text = not (options.with_logprobs or options.with_token_ids or options.running_usage)
        self._fast: dict[int, tuple[bytes, bytes]] = {}

    def chunk(self, choice: Choice, delta: Delta) -> bytes:
        """Server-sent events for a delta; empty while its text is held back."""
        opening = b""
        if not choice.opened:
            choice.opened = True
            opening = self._opening(choice)
        if self._fast_text and delta.finish is None:
            if not delta.text:
                return opening
            before, after = self._fast.get(choice.index) or self._fast_parts(choice)
            return b"".join((opening, before, encode_json(delta.text), after))
        choice.sent += len(delta.tokens)
        logprobs = None
        if self._options.with_logprobs and delta.tokens:
            logprobs = self._shape.logprobs(choice, _drawn(delta), self._text_of)
        piece = self._shape.piece(choice, delta.text, logprobs)
        piece["finish_reason"] = None if delta.finish is None else delta.finish.value
        if delta.finish is not None:
            piece["stop_reason"] = delta.stop
        if self._options.with_token_ids:
            piece["token_ids"] = delta.tokens
        return opening + self._event(self._told({"choices": [piece]}, choice))

    def _opening(self, choice: Choice) -> bytes:
        first = self._shape.opening(choice)
        body: dict[str, Any] = {}
        if self._options.with_token_ids:
            first = first or self._shape.piece(choice, "", None) | {"finish_reason": None}
            (body if self._shape.prompt_ids_on_top else first)["prompt_token_ids"] = list(choice.prompt)
        return b"" if first is None else self._event(self._told({"choices": [first], **body}, choice))

    def _told(self, body: dict[str, Any], choice: Choice) -> dict[str, Any]:
        """With the usage so far, if that was asked for."""
        if self._options.running_usage:
            total = len(choice.prompt) + choice.sent
            body["usage"] = {"prompt_tokens": len(choice.prompt), "completion_tokens": choice.sent, "total_tokens": total}
        return body

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
                logprobs = self._shape.logprobs(choice, _drawn(choice), self._text_of)
            body = self._shape.whole(choice, "".join(choice.text), logprobs)
            body["finish_reason"] = None if choice.finish is None else choice.finish.value
            body["stop_reason"] = choice.stop
            if self._options.with_token_ids:
                body["token_ids"] = choice.tokens
                if not self._shape.prompt_ids_on_top:
                    body["prompt_token_ids"] = list(choice.prompt)
            bodies.append(body)
        whole = {**self._head, "object": self._shape.object_whole, "choices": bodies, "usage": usage}
        if self._options.with_token_ids and self._shape.prompt_ids_on_top:
            whole["prompt_token_ids"] = list(choices[0].prompt)
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


def _drawn(said: Choice | Delta) -> list[Drawn]:
    return [Drawn(*one) for one in zip(said.tokens, said.logprobs, said.pieces, strict=False)]


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LOWEST_LOGPROB
