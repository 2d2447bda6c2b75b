"""Writes an answer as it arrives, breaking lines between words."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from hetserve.printable import printable


class Typist:
    """Text comes in pieces, of words too; a word is written once it is whole, so that the line can end before it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._column = 0
        self._word = ""

    def write(self, piece: str) -> None:
        for letter in printable(piece):
            if letter in " \n":
                self._flush()
                self._break() if letter == "\n" else self._space()
            else:
                self._word += letter
                if len(self._word) >= self._console.width:
                    self._flush()

    def mark(self, text: str, style: str) -> None:
        """Put in something that is no part of the answer: between two words, or inside one, where it fell."""
        self._flush()
        self._put(text, style)

    def end(self) -> None:
        """Write what is left, and end the line."""
        self._flush()
        self._break()

    def _flush(self) -> None:
        if self._word:
            self._put(self._word, "")
            self._word = ""

    def _put(self, word: str, style: str) -> None:
        if self._column + len(word) > self._console.width and self._column:
            self._break()
        self._console.print(Text(word, style), end="", soft_wrap=True)
        self._column += len(word)

    def _space(self) -> None:
        if 0 < self._column < self._console.width:
            self._console.print(" ", end="", soft_wrap=True)
            self._column += 1

    def _break(self) -> None:
        self._console.print()
        self._column = 0
