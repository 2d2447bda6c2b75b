"""The OpenAPI document. Bodies are parsed, and answers written, by hand, so FastAPI is told what they are instead of asked."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response

from gateway.protocol.shapes import ErrorBody

_REF = "#/components/schemas/{model}"
_PARAMETER = re.compile(r"{(\w+)(?::\w+)?}")
_BY_READING = {
    400: "The request is wrong; `param` names the field.",
    408: "The body came too slowly.",
    413: "The body is too large.",
}
_BY_SERVING = {
    404: "There is no such model.",
    429: "Too much waits already: come back after `Retry-After` seconds.",
    500: "A fault of the server.",
    503: "Nobody can serve it now.",
    504: "Its time was over.",
}
HEADERS = {
    "x-request-id": "The id of the answer.",
    "x-hetserve-ignored": "Fields of the request that were taken and not read, if there are such; cut after 512 characters.",
}


@dataclass(frozen=True)
class Route:
    """What leads where, and what comes back. `answer` is a shape, or the media type of plain text; `chunk` the shape of an event
    where a stream may be asked for; `sick` says that the same shape comes with a 503 too; `open` that it needs no key."""

    method: str
    path: str
    handler: Callable[[Request], Awaitable[Response]]
    answer: type[BaseModel] | str
    summary: str
    body: type[BaseModel] | None = None
    chunk: type[BaseModel] | None = None
    sick: bool = False
    open: bool = False

    @property
    def shapes(self) -> Iterable[type[BaseModel]]:
        return (shape for shape in (self.body, self.answer, self.chunk) if isinstance(shape, type))


def describe(app: FastAPI, routes: Iterable[Route], with_key: bool) -> None:
    """Let `app.openapi` say what `routes` take and give, and whether a key is needed."""
    routes = tuple(routes)

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app.title, app.version, routes, with_key)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _document(title: str, version: str, routes: Iterable[Route], with_key: bool) -> dict[str, Any]:
    kinds: list[type[BaseModel]] = [ErrorBody, *(shape for route in routes for shape in route.shapes)]
    _, definitions = models_json_schema([(kind, "validation") for kind in dict.fromkeys(kinds)], ref_template=_REF)
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(_PARAMETER.sub(r"{\1}", route.path), {})[route.method.lower()] = _operation(route, with_key)
    components: dict[str, Any] = {"schemas": definitions["$defs"]}
    if with_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {"openapi": "3.1.0", "info": {"title": title, "version": version}, "paths": paths, "components": components}


def _operation(route: Route, with_key: bool) -> dict[str, Any]:
    name = "_".join([route.method.lower(), *re.findall(r"\w+", route.path.replace(":path", ""))])
    said: dict[str, Any] = {"summary": route.summary, "operationId": name, "responses": _responses(route)}
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in _PARAMETER.findall(route.path)
    ]
    if parameters:
        said["parameters"] = parameters
    if route.body is not None:
        said["requestBody"] = {"required": True, "content": _content("application/json", route.body)}
    if with_key and not route.open:
        said["security"] = [{"key": []}]
    return said


def _responses(route: Route) -> dict[str, Any]:
    if isinstance(route.answer, str):
        content: dict[str, Any] = {route.answer: {"schema": {"type": "string"}}}
    else:
        content = _content("application/json", route.answer)
    if route.chunk is not None:
        content |= {"text/event-stream": {"schema": {"type": "string", "description": f"Events of `{route.chunk.__name__}`."}}}
    headers = {name: {"description": text, "schema": {"type": "string"}} for name, text in HEADERS.items()}
    if route.body is None:
        del headers["x-hetserve-ignored"]
    responses: dict[str, Any] = {"200": {"description": "The answer.", "headers": headers, "content": content}}
    if route.sick:
        responses["503"] = {"description": "Not now; the reasons are in it.", "content": content}
    errors = {} if route.body is None else _BY_READING | _BY_SERVING
    if _PARAMETER.search(route.path):
        errors = {404: _BY_SERVING[404]}
    if not route.open:
        errors = errors | {401: "The key is missing or wrong."}
    for status, text in sorted(errors.items()):
        responses[str(status)] = {"description": text, "content": _content("application/json", ErrorBody)}
    return responses


def _content(media: str, shape: type[BaseModel]) -> dict[str, Any]:
    return {media: {"schema": {"$ref": _REF.format(model=shape.__name__)}}}
