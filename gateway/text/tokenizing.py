"""Where tokenizer work runs: off the event loop, in few threads, with a bounded queue. Encoding releases the GIL."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from core.errors import Overloaded

T = TypeVar("T")


class Tokenizing:
    """A few threads for tokenizer work, and a bound on how much of it waits."""

    def __init__(self, threads: int = 2, max_pending: int = 512) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tokenize")
        self._max_pending = max_pending
        self._pending = 0

    async def run(self, work: Callable[[], T]) -> T:
        """Raises Overloaded when too much is waiting already."""
        if self._pending >= self._max_pending:
            raise Overloaded("too many prompts are waiting to be tokenised")
        self._pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        finally:
            self._pending -= 1

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
