"""Token ids to text, one token at a time, such that the pieces add up to what decoding all at once gives.

A window of the last settled tokens plus the unsettled ones is decoded whole at each step (the offsets of Hugging Face's
TGI), because how a token reads depends on its neighbours: a character may span tokens, and some decoders drop a leading
space. `tokenizers.decoders.DecodeStream` would be the ready-made part; on arbitrary ids it raises ("invalid prefix"),
and it cannot be flushed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]
"""Ids to text; must be a pure function."""

UNFINISHED = "\ufffd"
CONTEXT_TOKENS = 6
MAX_CONTEXT_TOKENS = 24
MAX_UNSETTLED_TOKENS = 64


class Detokenizer:
    """One sequence's text. `prompt` is what comes before; only its end is looked at."""

    def __init__(self, decode: Decode, prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = _context(decode, prompt)
        self._settled = len(self._window)
        self._emitted = len(decode(self._window)) if self._window else 0

    def step(self, token: int) -> str:
        """The text that `token` settles; often empty in the middle of a character."""
        self._window.append(token)
        text = self._decode(self._window)
        unsettled = text.endswith(UNFINISHED) and len(self._window) - self._settled < MAX_UNSETTLED_TOKENS
        end = len(text.rstrip(UNFINISHED)) if unsettled else len(text)
        piece = text[self._emitted : end]
        if unsettled:
            self._emitted = max(self._emitted, end)
        elif piece:
            self._window = self._window[self._settled :]
            self._settled = len(self._window)
            self._emitted = len(self._decode(self._window))
        elif len(self._window) - self._settled > CONTEXT_TOKENS:
            self._trim(text)
        return piece

    def _trim(self, text: str) -> None:
        """Forget the oldest of the tokens that gave no text (special ones, mostly): each would make every step dearer."""
        shorter = self._window[: self._settled] + self._window[self._settled + 1 :]
        shown = self._decode(shorter)
        if shown == text or len(self._window) - self._settled > MAX_UNSETTLED_TOKENS:
            self._window = shorter
            self._emitted += len(shown) - len(text)

    def flush(self) -> str:
        """What is still unsettled, as it stands, once no more tokens will come."""
        text = self._decode(self._window)
        piece = text[self._emitted :]
        self._emitted = len(text)
        return piece


def _context(decode: Decode, prompt: Sequence[int]) -> list[int]:
    """The shortest end of the prompt, from a few tokens on, that begins and ends between characters."""
    for size in range(min(CONTEXT_TOKENS, len(prompt)), min(MAX_CONTEXT_TOKENS, len(prompt)) + 1):
        tail = list(prompt[len(prompt) - size :])
        if UNFINISHED not in decode(tail):
            return tail
    return list(prompt[-CONTEXT_TOKENS:])
