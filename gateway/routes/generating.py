"""The routes that generate, and those around them that need the tokenizer. What they accept is `gateway.protocol.bodies`'s."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from core.clock import Clock
from core.config import GatewayConfig
from core.errors import InvalidRequest
from gateway.http.body import read_body
from gateway.http.json_response import JSON
from gateway.protocol.answers import Answer, AnswerOptions, ChatShape, Choice, CompletionShape, Shape
from gateway.protocol.bodies import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest, parse
from gateway.protocol.large_bodies import LARGE_BODY_BYTES, parse_large
from gateway.routes.call import Call, EventStream, collect
from gateway.serving.inbox import Inbox
from gateway.serving.intake import Intake, Prepared
from gateway.serving.metrics import Metrics

B = TypeVar("B", bound=BaseModel)

WRITE_SLACK_S = 60.0


@dataclass(frozen=True)
class GeneratingRoutes:
    """Request handlers; each raises typed errors and leaves their shape to the application."""

    intake: Intake
    config: GatewayConfig
    clock: Clock
    metrics: Metrics

    async def completions(self, request: Request) -> Response:
        arrived_s = self.clock.now()
        body = await self._parse(CompletionRequest, request)
        prepared = await self.intake.prepare(body)
        shape = CompletionShape(prepared.prompt_texts, prepared.n)
        return await self._answer(request, prepared, shape, arrived_s, body.logprobs is not None)

    async def chat(self, request: Request) -> Response:
        arrived_s = self.clock.now()
        body = await self._parse(ChatRequest, request)
        prepared = await self.intake.prepare(body)
        return await self._answer(request, prepared, ChatShape(self.intake.codec.token_bytes), arrived_s, bool(body.logprobs))

    async def tokenize(self, request: Request) -> Response:
        body = await self._parse(TokenizeRequest, request)
        self.intake.check_model(body.model)
        if body.prompt is not None:
            tokens = await self.intake.encode_text(body.prompt, body.add_special_tokens is not False)
        else:
            tokens = await self.intake.encode_chat(
                body.messages or [],
                body.add_generation_prompt,
                body.continue_final_message,
                special=bool(body.add_special_tokens),
            )
        token_strs = await self.intake.token_strs(tokens) if body.return_token_strs else None
        return JSON(
            {
                "count": len(tokens),
                "max_model_len": self.intake.max_model_len,
                "tokens": tokens,
                "token_strs": token_strs,
            }
        )

    async def detokenize(self, request: Request) -> Response:
        body = await self._parse(DetokenizeRequest, request)
        self.intake.check_model(body.model)
        return JSON({"prompt": await self.intake.decode_ids(body.tokens, "tokens")})

    async def _parse(self, kind: type[B], request: Request) -> B:
        body = await self._read(request)
        if len(body) <= LARGE_BODY_BYTES:
            return parse(kind, body)
        return await self.intake.off_loop(partial(parse_large, kind, body, self.intake.max_model_len))

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
            self.intake.model.name,
            int(time.time()),
            self.intake.codec.token_text,
            options,
        )
        generations = await self.intake.start(prepared, request.state.request_id, arrived_s, inbox, request.state.salt)
        call = Call(
            intake=self.intake,
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
