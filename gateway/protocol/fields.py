"""Kinds of fields of a request body: what each takes, and what its schema says of that.

A field that this server knows and does not serve is refused by name, unless its value asks for nothing. One that it does not
know is taken and named in the answer (`ignored_fields`), where vLLM writes a warning: clients send fields of other servers as a
matter of course. What could change an answer must therefore be known here: the `Unserved` fields are the list of that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, PlainValidator

MAX_HEADER_CHARS = 512
MAX_NAME_CHARS = 64
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")

PromptValue = str | list[int] | list[str] | list[list[int]]


def _prompt(value: object) -> object:
    """One shape is chosen by the first element, so that a wrong list costs one error and not one per element."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        kind = type(value[0])
        if kind in (int, str) and all(type(item) is kind for item in value):
            return value
        if kind is list and all(type(item) is list and all(type(token) is int for token in item) for item in value):
            return value
    raise ValueError("expected a string, a list of token ids, or a list of either, not empty")


def _whole(value: object) -> object:
    """JSON has one kind of number, and many a client writes 10 as 10.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _asks_for_nothing(value: object) -> None:
    if value is not None and value is not False and value != []:
        raise ValueError("this server does not serve it")


def _asks_for_no_settings(value: object) -> None:
    if value != {}:
        _asks_for_nothing(value)


Whole = BeforeValidator(_whole)
Int = Annotated[int, Whole]
Count = Annotated[int, Field(ge=1), Whole]
Ids = Annotated[list[int], FailFast()]
Prompt = Annotated[PromptValue, PlainValidator(_prompt, json_schema_input_type=PromptValue)]

Unserved = Annotated[None, PlainValidator(_asks_for_nothing, json_schema_input_type=Literal[None, False])]
"""Known and not served. Null, false and an empty list ask for nothing."""
UnservedSettings = Annotated[None, PlainValidator(_asks_for_no_settings, json_schema_input_type=Literal[None, False])]
"""The same; an empty object asks for nothing either."""


class Body(BaseModel):
    """What a client sends, or a part of it. Fields that are not declared are kept for `ignored_fields`, and read by nobody."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)

    def parts(self) -> Iterable[tuple[str, Body]]:
        """Bodies within this one, with the names of their fields."""
        return ()


def ignored_fields(body: Body) -> Iterator[str]:
    """Dotted names of what the client sent and nobody reads, some of them repeatedly."""
    yield from body.model_extra or ()
    for name, part in body.parts():
        for field in ignored_fields(part):
            yield f"{name}.{field}"


def header_value(names: Iterable[str]) -> str:
    """The names once each, in order, as a header may carry them: plain characters, `...` in place of what is too long."""
    said: dict[str, None] = {}
    room = MAX_HEADER_CHARS
    for name in names:
        plain = "".join(char if char in _PLAIN else "?" for char in name[:MAX_NAME_CHARS])
        if not plain or plain in said:
            continue
        room -= len(plain) + 1
        if room < len("..."):
            return ",".join([*said, "..."])
        said[plain] = None
    return ",".join(said)
