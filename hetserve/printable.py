"""Text of a model, as a terminal may see it."""

from __future__ import annotations

KEPT = "\n\t\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"


def printable(text: str) -> str:
    """The text without what a terminal would obey: random weights draw control characters too."""
    return "".join(letter if letter.isprintable() or letter in KEPT else "\N{REPLACEMENT CHARACTER}" for letter in text)
