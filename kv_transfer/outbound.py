"""One attempt's KV on the sending side: what has been pushed, what goes next, and under which numbers. Pure; its owner's
lock guards it.

Pieces leave in the order in which their layers were first pushed; what is pushed while a layer waits joins the piece that
waits, so that a slow wire sees few large pieces and a fast one sees each at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from core.layout import KVLayout, Span, needed
from kv_transfer.coverage import Coverage
from kv_transfer.frames import MAX_TAIL_BYTES, Begin, Finish, Kind, SessionDigest, pack_body, pack_frame, piece_tokens
from kv_transfer.store import Fence
from kv_transfer.transport import Buffer


@dataclass(slots=True)
class Piece:
    """Tokens `[start, start + count)` of all `heads` that this rank holds of a layer, readable once `fence` has passed."""

    layer: int
    heads: Span
    start: int
    count: int
    fence: Fence | None


class Outbound:
    """`blocks` is kept by reference and may grow at its end: a push takes over the ids it needs at that moment."""

    def __init__(
        self,
        layout: KVLayout,
        attempt: str,
        grant: int,
        blocks: Sequence[int],
        first_token: int,
        num_tokens: int,
        windowed: bool = False,
    ) -> None:
        if not 0 <= grant < 1 << 64:
            raise ValueError(f"Got {grant = } but expected 64 bits")
        self.attempt = attempt
        self.grant = grant
        self.blocks: list[int] = []
        self.kv_bytes = 0
        self._layout = layout
        self._source = blocks
        tokens = Span(first_token, num_tokens)
        self._begin = Begin(attempt, layout.region(tokens), windowed)
        self._coverage = Coverage(needed(layout, tokens, windowed))
        self._waiting: OrderedDict[int, list[Piece]] = OrderedDict()
        self._tail: bytes | None = None
        self._begun = False
        self._finished = False
        self._frames = 0
        self._digest = SessionDigest()

    def has_next(self) -> bool:
        """Whether a frame can leave now."""
        return not self._begun or bool(self._waiting) or (self._tail is not None and not self._finished)

    @property
    def finished(self) -> bool:
        """Whether FINISH has left: only the commit is missing."""
        return self._finished

    @property
    def digest(self) -> int:
        """Over all frames so far; the receiver's commit must repeat it."""
        return self._digest.value()

    def push(self, layer: int, start: int, count: int, fence: Fence | None) -> None:
        """Queue what is within the grant and has not been pushed before; pushing twice is harmless.

        Raises:
            ValueError: no such layer, a negative range, tokens beyond `blocks`, blocks that are not those of an earlier
                push (the engine took them back: what waits here would be read from somebody else's), or after `finish`.
        """
        if not self._layout.holds(layer) or start < 0 or count < 0:
            raise ValueError(f"Got {layer = }, {start = }, {count = } but expected one of {len(self._layout.layers)} layers")
        wanted, heads = self._coverage.wanted(layer), self._layout.heads_of(layer)
        start, stop = max(start, wanted.start), min(start + count, wanted.stop)
        if stop <= start:
            return
        first, needed = start // self._layout.block_size, self._layout.blocks_for(stop)
        if needed > len(self._source):
            raise ValueError(f"Got tokens up to {stop} but expected them within {len(self._source)} blocks")
        self.blocks.extend(self._source[len(self.blocks) : needed])
        if list(self._source[first:needed]) != self.blocks[first:needed]:
            raise ValueError(f"Got a push of attempt {self.attempt} whose blocks have changed; abort before taking blocks back")
        gaps = self._coverage.missing(layer, heads, Span(start, stop))
        if gaps and self._tail is not None:
            raise ValueError(f"Got a push of attempt {self.attempt} after its finish")
        for _, gap in gaps:
            self._coverage.add(layer, heads, gap)
            self._queue(layer, heads, gap, fence)

    def finish(self, tail: bytes) -> None:
        """Raises ValueError if something has not been pushed, or the tail is too long, or it was finished before."""
        if not self._coverage.complete:
            raise ValueError(f"Got a finish of attempt {self.attempt} but {self._coverage.remaining} rows were not pushed")
        if len(tail) > MAX_TAIL_BYTES:
            raise ValueError(f"Got a tail of {len(tail)} bytes but expected at most {MAX_TAIL_BYTES}")
        if self._tail is not None:
            raise ValueError(f"Got a second finish of attempt {self.attempt}")
        self._tail = tail

    def next_frame(self) -> Piece | tuple[Kind, bytes]:
        """What goes next: a piece to read and stamp, or a control frame with its payload. Call only when `has_next`."""
        if not self._begun:
            self._begun = True
            return Kind.BEGIN, pack_body(self._begin)
        if not self._waiting:
            assert self._tail is not None
            self._finished = True
            return Kind.FINISH, pack_body(Finish(self._frames, self._digest.value(), self._tail))
        layer, pieces = next(iter(self._waiting.items()))
        piece = pieces[0]
        most = piece_tokens(self._layout, layer)
        if piece.count <= most:
            pieces.pop(0)
            if not pieces:
                del self._waiting[layer]
            return piece
        head = Piece(layer, piece.heads, piece.start, most, piece.fence)
        piece.start += most
        piece.count -= most
        return head

    def stamp(self, kind: Kind, payload: Buffer, seed: int, piece: Piece | None = None) -> bytes:
        """The header of the session's next frame. Frames must be sent in the order in which they are stamped."""
        if piece is None:
            header = pack_frame(kind, self.grant, self._frames, payload, seed)
        else:
            tokens = Span(piece.start, piece.start + piece.count)
            header = pack_frame(kind, self.grant, self._frames, payload, seed, piece.layer, piece.heads, tokens)
        self._frames += 1
        self._digest.add(header)
        if piece is not None:
            self.kv_bytes += piece.count * self._layout.layer_bytes_per_token(piece.layer)
        return header

    def _queue(self, layer: int, heads: Span, tokens: Span, fence: Fence | None) -> None:
        pieces = self._waiting.setdefault(layer, [])
        if pieces and pieces[-1].start + pieces[-1].count == tokens.start:
            # One thread steps an engine, so that a later fence includes what an earlier one stood for.
            pieces[-1].count += tokens.size
            pieces[-1].fence = fence
        else:
            pieces.append(Piece(layer, heads, tokens.start, tokens.size, fence))
