"""Drives `Client` and `AsyncClient` through one set of tests: a call is made, awaited where need be, and its value returned."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx

from hetserve import AsyncClient, Chunk, Client


class Either:
    """`call(name, ...)` runs one method of a fresh client; `collect(name, ...)` runs a streaming one to its end and returns
    the chunks received, with the error that ended them. `slept` are the waits between tries."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.slept: list[float] = []

    def call(self, name: str, *args: Any, client: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        if self.kind == "sync":
            with Client(**self._settings(client)) as sync_client:
                return getattr(sync_client, name)(*args, **kwargs)

        async def run() -> Any:
            async with AsyncClient(**self._settings(client)) as async_client:
                return await getattr(async_client, name)(*args, **kwargs)

        return asyncio.run(run())

    def collect(
        self, name: str, *args: Any, client: dict[str, Any] | None = None, stop_after: int | None = None, **kwargs: Any
    ) -> tuple[list[Chunk], Exception | None]:
        if self.kind == "sync":
            return self._collect_sync(name, args, client, stop_after, kwargs)
        return asyncio.run(self._collect_async(name, args, client, stop_after, kwargs))

    def _collect_sync(
        self, name: str, args: Any, client: dict[str, Any] | None, stop_after: int | None, kwargs: Any
    ) -> tuple[list[Chunk], Exception | None]:
        chunks: list[Chunk] = []
        with Client(**self._settings(client)) as c, getattr(c, name)(*args, **kwargs) as stream:
            try:
                for chunk in stream:
                    chunks.append(chunk)
                    if len(chunks) == stop_after:
                        break
            except Exception as error:
                return chunks, error
        return chunks, None

    async def _collect_async(
        self, name: str, args: Any, client: dict[str, Any] | None, stop_after: int | None, kwargs: Any
    ) -> tuple[list[Chunk], Exception | None]:
        chunks: list[Chunk] = []
        async with AsyncClient(**self._settings(client)) as c, await getattr(c, name)(*args, **kwargs) as stream:
            try:
                async for chunk in stream:
                    chunks.append(chunk)
                    if len(chunks) == stop_after:
                        break
            except Exception as error:
                return chunks, error
        return chunks, None

    def _settings(self, client: dict[str, Any] | None) -> dict[str, Any]:
        return {"sleep": self._sleep if self.kind == "sync" else self._sleep_async, "draw": lambda: 0.0, **(client or {})}

    def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    async def _sleep_async(self, seconds: float) -> None:
        self.slept.append(seconds)


def mock(handler: Callable[[httpx.Request], httpx.Response]) -> dict[str, Any]:
    """Client settings that answer from `handler`, with no network."""
    return {"url": "http://server.test", "transport": httpx.MockTransport(handler)}
