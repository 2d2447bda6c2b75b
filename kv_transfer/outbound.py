"""One attempt's KV on the sending side: what has been pushed, what goes next, and under which numbers. Pure; its owner's
lock guards it.

Regions leave in the order in which their layers were first pushed, those first that the device has written. What waits side by
side leaves as one once it is all written, tokens of a layer first, then small ones of adjacent layers: so a slow wire sees few
large pieces and a fast one sees each at once.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass

from core.groups import LayerGroups, Tables
from core.layout import KVLayout, Region, Span
from kv_transfer.coverage import Coverage
from kv_transfer.frames import (
    JOINED_BYTES,
    Begin,
    Finish,
    Kind,
    SessionDigest,
    begin_of,
    pack_body,
    pack_frame,
    pack_header,
    piece_tokens,
)
from kv_transfer.store import Fence
from kv_transfer.terms import Terms, check_blocks, check_push, check_tables, check_tail


@dataclass(slots=True)
class _Pushed:
    """Tokens `[start, start + count)` of a layer, readable once `fence` has passed."""

    start: int
    count: int
    fence: Fence | None

    @property
    def stop(self) -> int:
        return self.start + self.count

    def written(self) -> bool:
        """Whether it can be read. A fence that has passed is not asked again."""
        if self.fence is not None and self.fence.passed():
            self.fence = None
        return self.fence is None


class Outbound:
    """`tables`, one for each of `groups`, are kept by reference: a push takes over the ids it needs at that moment. They may grow
    at their ends, and lose what their windows have left at their starts.

    Raises:
        ValueError: another number of tables.
    """

    def __init__(self, layout: KVLayout, groups: LayerGroups, terms: Terms, tables: Tables) -> None:
        check_tables(tables, groups)
        self.attempt = terms.attempt
        self.grant = terms.grant
        self.kv_bytes = 0
        self._layout = layout
        self._groups = groups
        self._source = tables
        self._taken: list[list[int]] = [[] for _ in tables]
        self._begin = begin_of(terms, layout)
        self._coverage = Coverage(terms.needed(layout))
        self._waiting: OrderedDict[int, deque[_Pushed]] = OrderedDict()
        self._tail: bytes | None = None
        self._unstamped = 0
        self._begun = False
        self._finished = False
        self._frames = 0
        self._digest = SessionDigest()

    def pending(self) -> bool:
        """Whether there is a frame still to leave, now or once the device has written it."""
        return not self._begun or bool(self._waiting) or self._may_finish()

    def sendable(self) -> bool:
        """Whether a frame can leave now. Raises what a fence raises."""
        return not self._begun or self._written() is not None or self._may_finish()

    @property
    def digest(self) -> int:
        """Over all frames so far; the receiver's commit must repeat it."""
        return self._digest.value()

    def push(self, layer: int, start: int, count: int, fence: Fence | None) -> None:
        """Queue what is within the grant and has not been pushed before; pushing twice is harmless.

        Raises:
            ValueError: no such layer, a negative range, tokens without blocks, blocks that are not those of an earlier
                push (the engine took them back: what waits here would be read from somebody else's), or after `finish`.
        """
        check_push(self._layout, layer, start, count)
        wanted, heads = self._coverage.wanted(layer), self._layout.heads_of(layer)
        start, stop = max(start, wanted.start), min(start + count, wanted.stop)
        if stop <= start:
            return
        self._take_blocks(layer, Span(start, stop))
        gaps = self._coverage.missing(layer, heads, Span(start, stop))
        if gaps and self._tail is not None:
            raise ValueError(f"Got a push of attempt {self.attempt} after its finish")
        for _, gap in gaps:
            self._coverage.add(layer, heads, gap)
            self._queue(layer, _Pushed(gap.start, gap.size, fence))

    @property
    def tables(self) -> Tables:
        """One for each group, as far as pushes have taken them over."""
        return self._taken

    def finish(self, tail: bytes) -> None:
        """Raises ValueError if something has not been pushed, or the tail is too long, or it was finished before."""
        if not self._coverage.complete:
            raise ValueError(f"Got a finish of attempt {self.attempt} but {self._coverage.remaining} rows were not pushed")
        check_tail(tail)
        if self._tail is not None:
            raise ValueError(f"Got a second finish of attempt {self.attempt}")
        self._tail = tail

    # --- frames, in the order in which they are taken: BEGIN, DATA, FINISH - ------------------------------------------

    def take_begin(self, seed: int) -> bytes | None:
        """The session's first frame; None if it was taken before."""
        if self._begun:
            return None
        self._begun = True
        return self._control(Kind.BEGIN, self._begin, seed)

    def take_region(self, room_bytes: int | None = None) -> Region | None:
        """The next to read and stamp, if the device has written what fits. Raises what a fence raises."""
        layer = self._written()
        if layer is None:
            return None
        most = piece_tokens(self._layout, layer)
        if room_bytes is not None:
            most = min(most, room_bytes // max(1, self._layout.layer_bytes_per_token(layer)))
            if self._waiting[layer][0].count > most:
                return None
        self._unstamped += 1
        tokens, heads = self._take(layer, most), self._layout.heads_of(layer)
        last, left = layer, JOINED_BYTES if room_bytes is None else min(JOINED_BYTES, room_bytes)
        while True:
            left -= tokens.size * self._layout.layer_bytes_per_token(last)
            if not self._joins(last + 1, heads, tokens, left):
                return Region(Span(layer, last + 1), heads, tokens)
            last += 1
            self._take(last, tokens.size)

    def stamp_region(self, region: Region, length: int, digest: int, seed: int) -> bytes:
        """The header of the region whose bytes have this digest. Regions are stamped in the order in which they are taken and
        sent."""
        header = pack_header(Kind.DATA, self.grant, self._frames, length, digest, seed, region)
        self._unstamped -= 1
        self._count(header)
        self.kv_bytes += length
        return header

    def take_finish(self, seed: int) -> bytes | None:
        """The last frame, if all before it were stamped; None if it is not its turn or it was taken before."""
        if not self._begun or not self._may_finish():
            return None
        self._finished = True
        assert self._tail is not None
        return self._control(Kind.FINISH, Finish(self._frames, self._digest.value(), self._tail), seed)

    def _take_blocks(self, layer: int, tokens: Span) -> None:
        """Take over the ids where `tokens` are."""
        group, layout = self._groups.group_of(layer), self._layout
        source, taken = self._source[group], self._taken[group]
        check_blocks(layout, source, tokens)
        first, stop = tokens.start // layout.block_size, layout.blocks_for(tokens.stop)
        taken.extend(source[len(taken) : stop])
        if list(source[first:stop]) != taken[first:stop]:
            raise ValueError(f"Got a push of attempt {self.attempt} whose blocks have changed; abort before taking blocks back")

    def _control(self, kind: Kind, body: Begin | Finish, seed: int) -> bytes:
        packed = pack_body(body)
        header = pack_frame(kind, self.grant, self._frames, packed, seed)
        self._count(header)
        return header + packed

    def _count(self, header: bytes) -> None:
        self._frames += 1
        self._digest.add(header)

    def _may_finish(self) -> bool:
        return self._tail is not None and not self._finished and not self._waiting and not self._unstamped

    def _written(self) -> int | None:
        """The first layer that has something to read."""
        for layer, waiting in self._waiting.items():
            if waiting[0].written():
                return layer
        return None

    def _take(self, layer: int, most: int) -> Span:
        """The first tokens that wait of a layer, and those beside them that are written too: at most so many."""
        waiting = self._waiting[layer]
        first = waiting.popleft()
        while waiting and first.count < most and waiting[0].start == first.stop and waiting[0].written():
            first.count += waiting.popleft().count
        if first.count > most:
            waiting.appendleft(_Pushed(first.start + most, first.count - most, None))
            first.count = most
        if not waiting:
            del self._waiting[layer]
        return Span(first.start, first.stop)

    def _joins(self, layer: int, heads: Span, tokens: Span, room_bytes: int) -> bool:
        """Whether the same heads and tokens of this layer wait, are written, and fit."""
        waiting = self._waiting.get(layer)
        return (
            waiting is not None
            and (waiting[0].start, waiting[0].count) == (tokens.start, tokens.size)
            and self._layout.heads_of(layer) == heads
            and tokens.size * self._layout.layer_bytes_per_token(layer) <= room_bytes
            and waiting[0].written()
        )

    def _queue(self, layer: int, pushed: _Pushed) -> None:
        waiting = self._waiting.setdefault(layer, deque())
        if waiting and waiting[-1].stop == pushed.start and waiting[-1].fence is pushed.fence:
            waiting[-1].count += pushed.count
        else:
            waiting.append(pushed)
