"""One generation's tokens as they arrive: put in order, freed of duplicates, turned into text, cut at stop strings.

Invariants:
- Output positions come out in order, each once, whatever workers send: an item that starts later than the next position
  waits, one that was seen before is dropped. So it does not matter whether the prefill worker's first token or the decode
  worker's second arrives first, nor whether a retry repeats something.
- After `done` nothing more comes out.

Lives in the pump's thread (`gateway.serving.pump`); survives retries, so that text never changes once given out.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field

from core.messages import ServedBy, TokenItem, TokenLogprobs
from core.request import FinishReason
from gateway.text.detokenizer import Decode, Detokenizer
from gateway.text.stops import StopMatcher
from router.state import InstanceKey

MAX_EARLY_ITEMS = 4096


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How tokens become text. `decode` already knows whether special tokens are shown; `skipped` are those that are not."""

    decode: Decode
    skipped: Set[int] = frozenset()
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    min_tokens: int = 0


@dataclass(slots=True)
class Delta:
    """What one message added to a generation: tokens in order, the text they settled, and how it ended if it did.

    `pieces` come with `logprobs`: what each token added to the text, before stop strings cut it, or None for one that is not
    shown; put together they are the text. `stop` is the stop string or stop token id that ended it. `cut` says that the gateway
    ended it, and workers do not know. `worker` sent the last of the tokens.
    """

    worker: InstanceKey
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    pieces: list[str | None] = field(default_factory=list)
    text: str = ""
    finish: FinishReason | None = None
    stop: str | int | None = None
    cut: bool = False
    served: list[tuple[InstanceKey, ServedBy]] = field(default_factory=list)


class TokenReader:
    """Takes items, gives deltas. Not thread-safe."""

    def __init__(self, prompt: Sequence[int], options: TextOptions) -> None:
        self._options = options
        self._detokenizer = Detokenizer(options.decode, prompt)
        self._stops = StopMatcher(options.stop, options.include_stop)
        self._early: dict[int, tuple[InstanceKey, TokenItem]] = {}
        self.next_position = 0
        self.done = False

    @property
    def gap(self) -> bool:
        """Whether something arrived that lies beyond a position that has not."""
        return bool(self._early) and not self.done

    def missing_from(self, position: int) -> int:
        """The first output position at or after `position` that has not arrived, not even ahead of a gap."""
        missing = max(position, self.next_position)
        for early in sorted(self._early):
            if early > missing:
                break
            missing = max(missing, early + len(self._early[early][1].tokens))
        return missing

    def forget_early(self) -> None:
        """A new attempt begins: what an old one sent ahead of a gap does not count."""
        self._early.clear()

    def take(self, worker: InstanceKey, item: TokenItem) -> Delta | None:
        """The delta that `item`, and whatever had waited for it, adds; None if nothing yet."""
        if self.done:
            return None
        if item.position > self.next_position:
            if len(self._early) < MAX_EARLY_ITEMS:
                self._early.setdefault(item.position, (worker, item))
            return None
        delta = Delta(worker)
        self._append(delta, worker, item)
        while self._early and not self.done:
            ready = [position for position in self._early if position <= self.next_position]
            if not ready:
                break
            for position in sorted(ready):
                self._append(delta, *self._early.pop(position))
        return delta if delta.tokens or delta.finish or delta.served else None

    def _append(self, delta: Delta, worker: InstanceKey, item: TokenItem) -> None:
        known = self.next_position - item.position
        fresh = item.tokens[known:]
        if self.done or known < 0 or known > len(item.tokens) or (not fresh and item.finish is None):
            return
        delta.worker = worker
        if item.served is not None:
            delta.served.append((worker, item.served))
        # a worker stops at a token, its end token or one of the request's: neither is text unless it was asked for
        ends = item.finish is FinishReason.STOP and not self._options.include_stop
        last = len(fresh) - 1
        for index, token in enumerate(fresh):
            self.next_position += 1
            delta.tokens.append(token)
            hidden = ends and index == last
            piece = "" if hidden else self._detokenizer.step(token)
            if item.logprobs:
                delta.logprobs.append(item.logprobs[known + index])
                delta.pieces.append(None if hidden or token in self._options.skipped else piece)
            if self._stopped(delta, piece):
                return
        if item.finish is not None:
            rest = self._detokenizer.flush()
            if rest and delta.pieces:
                delta.pieces[-1] = (delta.pieces[-1] or "") + rest
            if self._stopped(delta, rest):
                return
            delta.text += self._stops.flush()
            delta.finish, delta.stop = item.finish, item.stop_token
            self.done = True

    def _stopped(self, delta: Delta, piece: str) -> bool:
        """Add `piece` to the text; True when that completes a stop string."""
        if not piece:
            return False
        delta.text += self._stops.feed(piece, armed=self.next_position > self._options.min_tokens)
        if self._stops.matched is None:
            return False
        delta.finish, delta.stop, delta.cut = FinishReason.STOP, self._stops.matched, True
        self.done = True
        return True
