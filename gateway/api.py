"""The routes that generate, and those around them that need the tokenizer. What they accept is `gateway.openai`'s."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from core.clock import Clock
from core.config import GatewayConfig
from core.errors import InvalidRequest
from gateway.generate import Generator, Prepared
from gateway.guard import read_body
from gateway.inbox import Inbox
from gateway.large import LARGE_BODY_BYTES, parse_large
from gateway.metrics import Metrics
from gateway.openai import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest, parse
from gateway.respond import Call, EventStream, collect
from gateway.shapes import Answer, AnswerOptions, ChatShape, Choice, CompletionShape, Shape, encode_json

B = TypeVar("B", bound=BaseModel)

WRITE_SLACK_S = 60.0


class JSON(Response):
    """A body that is JSON already, or becomes it."""

    media_type = "application/json"

    def __init__(self, content: Any, status_code: int = 200, headers: dict[str, str] | None = None) -> None:
        super().__init__(content if isinstance(content, bytes) else encode_json(content), status_code, headers)


@dataclass(frozen=True)
class Api:
    """Request handlers; each raises typed errors and leaves their shape to the application."""

    generator: Generator
    config: GatewayConfig
    clock: Clock
    metrics: Metrics

    async def completions(self, request: Request) -> Response:
        arrived_s = self.clock.now()
        body = await self._parse(CompletionRequest, request)
        prepared = await self.generator.prepare(body)
        shape = CompletionShape(prepared.prompt_texts, prepared.n)
        return await self._answer(request, prepared, shape, arrived_s, body.logprobs is not None)

    async def chat(self, request: Request) -> Response:
        arrived_s = self.clock.now()
        body = await self._parse(ChatRequest, request)
        prepared = await self.generator.prepare(body)
        return await self._answer(request, prepared, ChatShape(self.generator.codec.token_bytes), arrived_s, bool(body.logprobs))

    async def tokenize(self, request: Request) -> Response:
        body = await self._parse(TokenizeRequest, request)
        self.generator.check_model(body.model)
        if body.prompt is not None:
            tokens = await self.generator.encode_text(body.prompt, body.add_special_tokens is not False)
        else:
            tokens = await self.generator.encode_chat(
                body.messages or [],
                body.add_generation_prompt,
                body.continue_final_message,
                special=bool(body.add_special_tokens),
            )
        token_strs = await self.generator.token_strs(tokens) if body.return_token_strs else None
        return JSON(
            {
                "count": len(tokens),
                "max_model_len": self.generator.max_model_len,
                "tokens": tokens,
                "token_strs": token_strs,
            }
        )

    async def detokenize(self, request: Request) -> Response:
        body = await self._parse(DetokenizeRequest, request)
        self.generator.check_model(body.model)
        return JSON({"prompt": await self.generator.decode_ids(body.tokens, "tokens")})

    async def _parse(self, kind: type[B], request: Request) -> B:
        body = await self._read(request)
        if len(body) <= LARGE_BODY_BYTES:
            return parse(kind, body)
        return await self.generator.off_loop(partial(parse_large, kind, body, self.generator.max_model_len))

    async def _read(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise InvalidRequest(f"content-type must be application/json, got {kind!r}")
        return await read_body(request, self.config.max_body_bytes, self.config.read_timeout_s)

    async def _answer(
        self, request: Request, prepared: Prepared, shape: Shape, arrived_s: float, with_logprobs: bool
    ) -> Response:
        body, inbox = prepared.body, Inbox()
        options = AnswerOptions(with_logprobs, bool(body.return_token_ids), body.wants_usage)
        answer = Answer(
            shape,
            request.state.request_id,
            self.generator.model.name,
            int(time.time()),
            self.generator.codec.token_text,
            options,
        )
        generations = await self.generator.start(prepared, request.state.request_id, arrived_s, inbox, request.state.salt)
        call = Call(
            generator=self.generator,
            generations=generations,
            inbox=inbox,
            choices=[Choice(index, prepared.prompts[index // prepared.n]) for index in range(len(generations))],
            answer=answer,
            with_usage=body.wants_usage,
            traced=request.headers.get("x-hetserve-trace") == "1",
            write_timeout_s=self.config.request_timeout_s + WRITE_SLACK_S,
            metrics=self.metrics,
        )
        if body.stream:
            return EventStream(call)
        return JSON(await collect(call, request.receive))
