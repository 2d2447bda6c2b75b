"""Which tokens of which layers are there, each at most once. Pure."""

from __future__ import annotations

from bisect import bisect_right


class Coverage:
    """Token ranges `[start, stop)` per layer within `[first_token, num_tokens)`, kept as sorted, disjoint, merged ranges."""

    def __init__(self, layers: int, first_token: int, num_tokens: int) -> None:
        if not 0 <= first_token <= num_tokens:
            raise ValueError(f"Got {first_token = } but expected it within [0, {num_tokens}]")
        self.first_token = first_token
        self.num_tokens = num_tokens
        self._ranges: list[list[tuple[int, int]]] = [[] for _ in range(layers)]
        self._remaining = layers * (num_tokens - first_token)

    @property
    def complete(self) -> bool:
        return self._remaining == 0

    @property
    def remaining(self) -> int:
        """Tokens still missing, summed over layers."""
        return self._remaining

    def missing(self, layer: int, start: int, stop: int) -> list[tuple[int, int]]:
        """The parts of `[start, stop)` that lie within bounds and are not there yet, in order."""
        at, stop = max(start, self.first_token), min(stop, self.num_tokens)
        gaps = []
        for low, high in self._ranges[layer]:
            if low >= stop:
                break
            if low > at:
                gaps.append((at, low))
            at = max(at, high)
        if at < stop:
            gaps.append((at, stop))
        return gaps

    def add(self, layer: int, start: int, stop: int) -> None:
        """Raises ValueError, and changes nothing, if any of it is out of bounds or there already."""
        if not (0 <= layer < len(self._ranges) and self.first_token <= start < stop <= self.num_tokens):
            bounds = f"{len(self._ranges)} layers of [{self.first_token}, {self.num_tokens})"
            raise ValueError(f"Got layer {layer}, tokens [{start}, {stop}) but expected them within {bounds}")
        ranges = self._ranges[layer]
        at = bisect_right(ranges, (start, stop))
        joins_left = at > 0 and ranges[at - 1][1] == start
        joins_right = at < len(ranges) and ranges[at][0] == stop
        if (at > 0 and ranges[at - 1][1] > start) or (at < len(ranges) and ranges[at][0] < stop):
            raise ValueError(f"Got layer {layer}, tokens [{start}, {stop}) but some of them are there already")
        low = ranges[at - 1][0] if joins_left else start
        high = ranges[at][1] if joins_right else stop
        ranges[at - joins_left : at + joins_right] = [(low, high)]
        self._remaining -= stop - start
