"""How many blocks a claim needs, whether they are there, and whose would make room.

A claim that writes tokens here needs more than it has tokens: some room is kept for its output, and for that of all others that
write here, so that admitting somebody does not soon cost somebody else his blocks. Keeping a number of tokens for each is
SGLang's idea (its reserved decode tokens).

A claim that finds no room is not looked at again before something has changed that could help it, so that a large prompt at the
head of the queue costs nothing while it waits.

Neighbours: `engine.scheduler` asks, `engine.block_manager` counts. Nothing is decided here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engine.block_manager import BlockManager, Fit
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A claim that found no room, and why. `given_up` is what was until then, `registered` how many blocks had ever been in the
    cache; `in_vain` is set when not even the blocks of all that may lose theirs would do."""

    claim: Sequence
    fit: Fit
    given_up: int
    registered: int
    in_vain: bool = False


class Room:
    """The arithmetic of admission. `headroom_tokens` is the most output that room is kept for, of each sequence."""

    def __init__(self, blocks: BlockManager, headroom_tokens: int) -> None:
        self._blocks = blocks
        self._headroom_tokens = headroom_tokens
        self._given_up = 0
        self._refusal: _Refusal | None = None

    def wanted(self, sequence: Sequence) -> int:
        """Blocks for its tokens and for the output that room is kept for: what a claim needs, without what the prefix cache
        has of it."""
        written, windows = self._written(sequence), self._blocks.windows
        reading = windows.promise(sequence, len(sequence.tokens), sequence.incoming)
        return self._blocks.kept_for(written) + max(reading, windows.promise(sequence, written, True))

    def headroom(self, sequence: Sequence) -> int:
        """Of these, the blocks that somebody who has his tokens' blocks neither owns nor is promised yet."""
        if not sequence.tables:
            return self.wanted(sequence)
        return self._blocks.lacking_for(sequence, self._written(sequence))

    def give_up(self, blocks: int) -> None:
        """So many blocks need not be kept any longer: whoever they were kept for is gone."""
        self._given_up += blocks

    def take(self, claim: Sequence, writers: Iterable[Sequence], passed_blocks: int) -> bool:
        """Give a claim blocks for all its tokens, if there is room for it and besides for the output of all `writers`, and for
        what it passes in the queue. False, with nothing changed, if not. O(1) if it was refused and nothing that could help
        it has happened since."""
        if self._still_refused(claim):
            return False
        spare = self._spare(claim, writers) + passed_blocks
        fit = self._blocks.fit(claim, spare)
        if fit.lacking == 0:
            self._blocks.give(claim, fit.match.tables)
            self._refusal = None  # it may have been about somebody who passed this claim
            return True
        self._refusal = self._refused(claim, fit)
        return False

    def made_by(self, claim: Sequence, owners: Iterable[Sequence]) -> list[Sequence]:
        """Where nobody writes: the first of `owners` whose blocks together would make room for a claim that `take` refused;
        none if not even all of theirs would, or if that was so before and nothing was given up since."""
        refusal = self._refusal
        if refusal is not None and refusal.claim is claim and refusal.in_vain and refusal.given_up == self._ever_given_up():
            return []
        spare = self._spare(claim, ())
        found = self._blocks.owners_in_the_way(claim, spare, owners)
        if not found:
            fit = self._blocks.fit(claim, spare)
            self._refusal = self._refused(claim, fit, in_vain=True)
        return found

    def _written(self, sequence: Sequence) -> int:
        """Its tokens and the output that room is kept for."""
        if sequence.hold:
            return sequence.total_tokens
        return min(sequence.total_tokens + self._headroom_tokens, sequence.most_tokens)

    def _spare(self, claim: Sequence, writers: Iterable[Sequence]) -> int:
        own = self.wanted(claim) - self._blocks.wanted(claim)
        return own + sum(map(self.headroom, writers))

    def _refused(self, claim: Sequence, fit: Fit, in_vain: bool = False) -> _Refusal:
        return _Refusal(claim, fit, self._ever_given_up(), self._blocks.registered, in_vain)

    def _still_refused(self, claim: Sequence) -> bool:
        """What it lacks shrinks by no more than the blocks that were freed and the room that others no longer need, or by a
        longer match in the cache. That begins where the last one ended, but for what windows lacked: any block may bring that."""
        refusal = self._refusal
        if refusal is None or refusal.claim is not claim:
            return False
        match = refusal.fit.match
        if match.next_content is not None and self._blocks.is_cached(match.next_content):
            return False
        latent = match.latent if self._blocks.registered != refusal.registered else 0
        return self._ever_given_up() - refusal.given_up + latent < refusal.fit.lacking

    def _ever_given_up(self) -> int:
        return self._given_up + self._blocks.freed
