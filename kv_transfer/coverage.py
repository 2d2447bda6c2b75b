"""Which tokens of which heads of which layers are there, each at most once. Pure.

A layer is kept as *bands*: adjacent ranges of heads whose tokens arrived together, each with sorted, disjoint, merged token
ranges. A rank that is given all its heads at once, as between equal shards, has one band a layer.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field

from core.layout import Region, Span

_Ranges = list[tuple[int, int]]


@dataclass(slots=True)
class _Band:
    start: int
    stop: int
    ranges: _Ranges = field(default_factory=list)


class Coverage:
    """Of `regions`, which say what is wanted: at most one for a layer, and nothing outside them is taken."""

    def __init__(self, regions: Iterable[Region]) -> None:
        self._wanted: dict[int, tuple[Span, Span]] = {}
        for region in regions:
            for layer in range(region.layers.start, region.layers.stop):
                if layer in self._wanted:
                    raise ValueError(f"Got {layer = } twice but expected one region for each layer")
                if region.heads.size < 0 or region.tokens.size < 0:
                    raise ValueError(f"Got {region = } but expected ranges that do not end before they start")
                self._wanted[layer] = region.heads, region.tokens
        self._bands = {layer: [_Band(heads.start, heads.stop)] for layer, (heads, _) in self._wanted.items()}
        self._remaining = sum(heads.size * tokens.size for heads, tokens in self._wanted.values())

    @property
    def complete(self) -> bool:
        return self._remaining == 0

    @property
    def remaining(self) -> int:
        """Rows still missing: one for each token of each head of each layer."""
        return self._remaining

    def wanted(self, layer: int) -> Span:
        """Which tokens of a layer are wanted at all; none of a layer that is not."""
        return self._wanted[layer][1] if layer in self._wanted else Span(0, 0)

    def missing(self, layer: int, heads: Span, tokens: Span) -> list[tuple[Span, Span]]:
        """The parts (heads, tokens) of it that are wanted and not there yet, in order."""
        if layer not in self._wanted:
            return []
        bounds = self._wanted[layer][1]
        low, high = max(tokens.start, bounds.start), min(tokens.stop, bounds.stop)
        found = []
        for band in self._bands[layer]:
            first, last = max(band.start, heads.start), min(band.stop, heads.stop)
            if first < last:
                found += [(Span(first, last), gap) for gap in _gaps(band.ranges, low, high)]
        return found

    def add(self, layer: int, heads: Span, tokens: Span) -> None:
        """Raises ValueError, and changes nothing, if any of it is not wanted or there already."""
        bounds = self._wanted.get(layer)
        if bounds is None or heads.size < 1 or tokens.size < 1 or not (heads.within(bounds[0]) and tokens.within(bounds[1])):
            raise ValueError(f"Got {_named(layer, heads, tokens)} but expected them within {bounds or 'a layer that is wanted'}")
        bands = self._cut(layer, heads)
        if any(_overlaps(band.ranges, tokens) for band in bands):
            raise ValueError(f"Got {_named(layer, heads, tokens)} but some of them are there already")
        for band in bands:
            _insert(band.ranges, tokens)
        self._remaining -= heads.size * tokens.size

    def _cut(self, layer: int, heads: Span) -> list[_Band]:
        """The bands that are `heads` and nothing else, made so where they reach beyond."""
        bands = self._bands[layer]
        for edge in (heads.start, heads.stop):
            for at, band in enumerate(bands):
                if band.start < edge < band.stop:
                    bands.insert(at + 1, _Band(edge, band.stop, list(band.ranges)))
                    band.stop = edge
                    break
        return [band for band in bands if heads.start <= band.start and band.stop <= heads.stop]


def _named(layer: int, heads: Span, tokens: Span) -> str:
    return f"layer {layer}, heads [{heads.start}, {heads.stop}), tokens [{tokens.start}, {tokens.stop})"


def _gaps(ranges: _Ranges, at: int, stop: int) -> list[Span]:
    """What of `[at, stop)` is in none of the ranges."""
    gaps = []
    for low, high in ranges:
        if low >= stop:
            break
        if low > at:
            gaps.append(Span(at, low))
        at = max(at, high)
    if at < stop:
        gaps.append(Span(at, stop))
    return gaps


def _overlaps(ranges: _Ranges, tokens: Span) -> bool:
    at = bisect_right(ranges, (tokens.start, tokens.stop))
    return (at > 0 and ranges[at - 1][1] > tokens.start) or (at < len(ranges) and ranges[at][0] < tokens.stop)


def _insert(ranges: _Ranges, tokens: Span) -> None:
    """Add what overlaps none of them, joined to its neighbours."""
    at = bisect_right(ranges, (tokens.start, tokens.stop))
    joins_left = at > 0 and ranges[at - 1][1] == tokens.start
    joins_right = at < len(ranges) and ranges[at][0] == tokens.stop
    low = ranges[at - 1][0] if joins_left else tokens.start
    high = ranges[at][1] if joins_right else tokens.stop
    ranges[at - joins_left : at + joins_right] = [(low, high)]
