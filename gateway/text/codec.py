"""Text to tokens and back, with the model's own tokenizer and chat template; nothing here is ours but the bounds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from transformers import AutoTokenizer

from core.errors import ContextLengthExceeded, InvalidRequest, ModelError
from gateway.text.detokenizer import UNFINISHED, Decode

T = TypeVar("T")
Messages = Sequence[dict[str, Any]]

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
PROBE_CHARS_PER_TOKEN = 8
"""A text longer than this per token of context is first judged by its beginning."""
TEMPLATE_ERRORS = (jinja2.TemplateError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError)
"""What a template may raise over messages and variables that it was not made for."""
NAMED = 8
"""Wrong values that an error names; of more it says how many."""


class TextCodec:
    """One model's tokenizer. Thread-safe: encoding and decoding never change it.

    Args:
        tokenizer: a `transformers` tokenizer.
        vocab_size: how many ids the model knows; ids beyond are refused before they can reach an embedding.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._fast = getattr(tokenizer, "backend_tokenizer", None)
        if self._fast is not None:  # a `tokenizer.json` may ask for both; `transformers` turns them off at each call as well
            self._fast.no_truncation()
            self._fast.no_padding()
        self.vocab_size = vocab_size
        self.show_all: Decode = self._decoder(skip_special=False)
        self.skip_special: Decode = self._decoder(skip_special=True)
        self.token_text: Callable[[int], str] = lru_cache(maxsize=65536)(self._token_text)
        self.token_bytes: Callable[[int], list[int] | None] = lru_cache(maxsize=65536)(self._token_bytes)
        self._spelling = _spelling(self._fast)
        added = self._fast.get_added_tokens_decoder() if self._fast is not None else {}
        self._added = frozenset(added)
        self.special_ids = frozenset(
            tokenizer.all_special_ids if self._fast is None else (token for token, entry in added.items() if entry.special)
        )
        """What `skip_special` leaves out."""
        self._before = self._plain_token() if self._strips() else None

    @classmethod
    def load(cls, model_path: str | Path) -> TextCodec:
        """Read the tokenizer of a local model folder; no network, no code from the folder.

        Raises:
            ModelError: no tokenizer there.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(model_path), local_files_only=True, trust_remote_code=False)
            config = json.loads((Path(model_path) / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(f"cannot load the tokenizer of {model_path}: {error}") from error
        sizes = (config.get("vocab_size"), (config.get("text_config") or {}).get("vocab_size"), len(tokenizer))
        return cls(tokenizer, next(size for size in sizes if size))

    @property
    def has_chat_template(self) -> bool:
        return bool(getattr(self._tokenizer, "chat_template", None))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of `text`; `special` adds what the tokenizer puts around a prompt (a BOS, say)."""
        if self._fast is None:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special)
        else:  # the batch call is the one that releases the GIL
            ids = list(self._fast.encode_batch_fast([text], add_special_tokens=special)[0].ids)
        if ids and max(ids) >= self.vocab_size:
            raise InvalidRequest("the text contains a token that the model does not have")
        return ids

    def encode_bounded(self, text: str, max_tokens: int, special: bool = True) -> list[int]:
        """`encode`, at a cost bounded by `max_tokens` and not by the text.

        Raises:
            ContextLengthExceeded: more than `max_tokens` tokens.
        """
        probe = (max_tokens + 1) * PROBE_CHARS_PER_TOKEN
        if len(text) > probe:
            beginning = len(self.encode(text[:probe], special))
            if beginning > max_tokens + 8:  # the cut itself may change the last few
                raise ContextLengthExceeded(
                    f"This model's maximum context length is {max_tokens} tokens, but the prompt has more than {beginning - 8}"
                )
        ids = self.encode(text, special)
        if len(ids) > max_tokens:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {max_tokens} tokens, but the prompt has {len(ids)}"
            )
        return ids

    def render(
        self, messages: Messages, add_generation_prompt: bool, continue_final: bool, options: dict[str, Any] | None = None
    ) -> str:
        """The prompt that the model's chat template makes of `messages`.

        Raises:
            InvalidRequest: the model has no template, or the template refuses the messages.
        """
        if not self.has_chat_template:
            raise InvalidRequest("the model has no chat template: use /v1/completions", "messages")
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final,
                **(options or {}),
            )
        except TEMPLATE_ERRORS as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}", "messages") from error
        return text

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Raises InvalidRequest when an id is not one of the model's."""
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            wrong = (token for token in ids if not 0 <= token < self.vocab_size)
            known = f"the model has {self.vocab_size} token ids, 0 to {self.vocab_size - 1}"
            raise InvalidRequest(f"{param}: {known}; got {some_of(wrong)}", param)

    def _token_text(self, token: int) -> str:
        """How the token reads in the middle of a text: decoders of SentencePiece drop the space that a text begins with."""
        text = self.show_all([token])
        if self._before is None:
            return text
        before, both = self.show_all([self._before]), self.show_all([self._before, token])
        return both[len(before) :] if both.startswith(before) else text

    def _strips(self) -> bool:
        """Whether decoding takes a leading space away."""
        if self._fast is None:
            return True
        decoder = "" if self._fast.decoder is None else self._fast.decoder.__getstate__().decode()
        return '"Strip"' in decoder or '"Metaspace"' in decoder

    def _plain_token(self) -> int | None:
        """A token that is text and neither begins nor ends with a space; None when the vocabulary shows none."""
        for letter in "aeinot.":
            ids = self.encode(letter, special=False)
            if ids and self.show_all(ids[-1:]).strip() == letter:
                return ids[-1]
        return None

    def _token_bytes(self, token: int) -> list[int] | None:
        """The bytes that a token stands for, also when they are only a part of a character; None if that cannot be told."""
        if self._fast is not None and token not in self._added:
            found = self._spelling(self._fast.id_to_token(token) or "")
            if found is not None:
                return found
        text = self.token_text(token)
        return None if UNFINISHED in text else list(text.encode("utf-8", "replace"))

    def _decoder(self, skip_special: bool) -> Decode:
        if self._fast is not None:
            return partial(self._fast.decode, skip_special_tokens=skip_special)
        return partial(self._tokenizer.decode, skip_special_tokens=skip_special)


def some_of(values: Iterable[object]) -> str:
    """The first few of them, and how many more there are."""
    first, more = list(islice(it := iter(values), NAMED)), 0
    for _ in it:
        more += 1
    return ", ".join(map(str, first)) + (f" and {more} more" if more else "")


def _spelling(fast: Any) -> Callable[[str], list[int] | None]:
    """How a tokenizer writes bytes in its vocabulary: as stand-in letters (GPT-2), as `<0x0A>` (SentencePiece), or not."""
    decoder = "" if fast is None or fast.decoder is None else fast.decoder.__getstate__().decode()
    if '"ByteLevel"' in decoder:
        byte_of = _byte_letters()

        def letters(token: str) -> list[int] | None:
            known = [byte_of.get(letter) for letter in token]
            return None if not known or None in known else [byte for byte in known if byte is not None]

        return letters
    if '"ByteFallback"' in decoder:
        return lambda token: [int(token[3:5], 16)] if BYTE_TOKEN.fullmatch(token) else None
    return lambda token: None


def _byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the others, in order, are 256 and up."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(others)}
