"""Bodies that are large for a request: refused by counting where that is possible, and read in slices where it is not.

JSON parsers hold the interpreter's lock until they are done, also in another thread, so a body of millions of token ids, or of
hundreds of thousands of empty messages, would stop every stream for seconds. Here strings and brackets are counted first, bytes
at a time; ids are cut out unparsed, counted by their commas, and parsed one prompt at a time; what is left has few elements, or
is text, which costs next to nothing. Call from a worker thread.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TypeVar

import msgspec
from pydantic import BaseModel

from core.errors import ContextLengthExceeded, InvalidRequest
from gateway.protocol.bodies import MAX_PROMPTS, parse

B = TypeVar("B", bound=BaseModel)

LARGE_BODY_BYTES = 64 * 1024
"""Smaller ones take about as long to parse as to hand to a thread."""
LONG_FIELDS = frozenset({"prompt", "messages", "tokens"})
MAX_FIELD_BYTES = 256 * 1024
"""Of any other field: far above what 16 stop strings or 1024 biases need."""
MAX_ELEMENTS = 64 * 1024
"""Strings, lists and objects of a body, and what its lists hold besides token ids: four thousand messages have fewer."""
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_LIST_OF_IDS = re.compile(rb"\[\s*-?\d")
_LIST_OF_LISTS = re.compile(rb"\[\s*\[")


def parse_large(kind: type[B], body: bytes, max_tokens: int) -> B:
    """What `gateway.protocol.bodies.parse` gives, for any size.

    Raises:
        InvalidRequest: naming the first field at fault.
        ContextLengthExceeded: a list of more than `max_tokens` ids.
    """
    _count(body, b"[{")
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not a valid JSON object: {error}") from error
    for name, raw in fields.items():
        if not (name in LONG_FIELDS and name in kind.model_fields) and len(bytes(raw)) > MAX_FIELD_BYTES:
            raise InvalidRequest(f"{name[:64]}: at most {MAX_FIELD_BYTES} bytes are allowed", name[:64])
    cut: dict[str, list[int] | list[list[int]]] = {}
    for name in sorted(LONG_FIELDS & fields.keys()):
        value = bytes(fields[name]).strip()
        if name not in kind.model_fields:
            fields[name] = msgspec.Raw(b"0")  # to be named, not read, whatever it holds
        elif _LIST_OF_IDS.match(value):
            cut[name] = _ids(value, max_tokens, name)
            fields[name] = msgspec.Raw(b"[0]")
        elif _LIST_OF_LISTS.match(value):
            cut[name] = [_ids(part, max_tokens, name) for part in _parts(value, name)]
            fields[name] = msgspec.Raw(b"[[0]]")
    rest = msgspec.json.encode(fields)
    _count(rest, b"[{,")
    return parse(kind, rest).model_copy(update=cut)


def _count(body: bytes, marks: bytes) -> None:
    """Raises InvalidRequest if there are too many strings, and `marks` outside strings. Costs a scan of the bytes, and no more
    steps than there may be elements."""
    elements, at = 0, 0
    for string in _STRING.finditer(body):
        between = body[at : string.start()]
        elements += 1 + sum(between.count(mark) for mark in marks)
        at = string.end()
        if elements > MAX_ELEMENTS:
            break
    else:
        elements += sum(body.count(mark, at) for mark in marks)
    if elements > MAX_ELEMENTS:
        raise InvalidRequest(f"the body has more than {MAX_ELEMENTS} strings, lists, objects and elements")


def _ids(value: bytes, max_tokens: int, param: str) -> list[int]:
    if value.count(b",") >= max_tokens:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {max_tokens} tokens, but {value.count(b',') + 1} ids were given", param
        )
    try:
        ids: list[int] = msgspec.json.decode(value)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _not_ids(param) from error
    if set(map(type, ids)) - {int}:
        raise _not_ids(param)
    return ids


def _parts(value: bytes, param: str) -> Iterator[bytes]:
    """The inner lists of a list of lists of numbers, unparsed."""
    if value.count(b"[") > MAX_PROMPTS + 1 or value.count(b"]") > MAX_PROMPTS + 1:
        raise InvalidRequest(f"{param}: at most {MAX_PROMPTS} prompts", param)
    *inner, outer, rest = value[1:].split(b"]")
    if outer.strip() or rest:
        raise _not_ids(param)
    for index, part in enumerate(inner):
        before, bracket, numbers = part.partition(b"[")
        if not bracket or before.strip() != (b"," if index else b""):
            raise _not_ids(param)
        yield b"[" + numbers + b"]"


def _not_ids(param: str) -> InvalidRequest:
    return InvalidRequest(f"{param}: expected a string, a list of token ids, or a list of either, not empty", param)
