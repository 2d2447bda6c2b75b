"""What an engine tells of those who wait for blocks on two engines at once."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from engine.sequence import Sequence


class AdmissionKind(Enum):
    ADMITTED = "admitted"
    """A prompt with `hold` has its blocks. It is time to ask the other engine for room."""
    GRANTED = "granted"
    """A reservation has its blocks: KV may come in."""
    TAKEN_BACK = "taken back"
    """A prompt with `hold` lost its blocks to an older claim and waits again."""


@dataclass(frozen=True, slots=True)
class Admission:
    kind: AdmissionKind
    sequence: Sequence
