"""Fifty completions at once, each with a trace of who served it:  python examples/many_at_once.py [URL]"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter

from hetserve import AsyncClient, Completion


async def main() -> None:
    async with AsyncClient(sys.argv[1] if len(sys.argv) > 1 else None) as client:

        async def one(number: int) -> Completion:
            return await client.completions(f"Fact number {number}:", max_tokens=32, seed=number, trace=True)

        answers = await asyncio.gather(*(one(number) for number in range(50)))
    pairs = Counter((answer.trace.prefill, answer.trace.decode) for answer in answers if answer.trace is not None)
    for (prefill, decode), count in pairs.most_common():
        print(f"{count:3d} answers: prompt read by {prefill}, tokens written by {decode}")


if __name__ == "__main__":
    asyncio.run(main())
