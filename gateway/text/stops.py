"""Stop strings over a stream of text: nothing that could still become part of a stop string is let out early.

The match that is complete first wins; of several complete at the same character, the longest. That makes the result
independent of how the text was cut into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Feeds on pieces of text; `matched` is the stop string found, after which it must not be fed.

    Args:
        stops: the strings; empty ones are not allowed.
        include: leave the stop string itself in the text.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        if not all(stops):
            raise ValueError("Got an empty stop string")
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def feed(self, piece: str, armed: bool = True) -> str:
        """Text that may go out now. While not `armed` nothing matches and nothing is held for a later match."""
        if not self._stops:
            return piece
        text = self._held + piece
        if not armed:
            self._held = ""
            return text
        end, stop = self._first_match(text)
        if stop is not None:
            self.matched, self._held = stop, ""
            return text[:end] if self._include else text[: end - len(stop)]
        keep = self._partial(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, once no more text will come."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str | None]:
        best_end, best = len(text) + 1, None
        for stop in self._stops:
            start = text.find(stop)
            if start < 0:
                continue
            end = start + len(stop)
            if end < best_end or (end == best_end and best is not None and len(stop) > len(best)):
                best_end, best = end, stop
        return best_end, best

    def _partial(self, text: str) -> int:
        """Length of the longest end of `text` that is the beginning of a stop string."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
