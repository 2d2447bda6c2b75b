"""The OpenAPI document: bodies are parsed by hand for their error messages, so FastAPI has to be told their schemas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

_REF = "#/components/schemas/{model}"


def describe(app: FastAPI, bodies: Mapping[str, type[BaseModel]]) -> None:
    """Give `app.openapi` the JSON body of each path's POST."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            shared = schema.setdefault("components", {}).setdefault("schemas", {})
            for path, kind in bodies.items():
                body = kind.model_json_schema(ref_template=_REF)
                shared.update(body.pop("$defs", {}))
                shared[kind.__name__] = body
                reference = {"schema": {"$ref": _REF.format(model=kind.__name__)}}
                schema["paths"][path]["post"]["requestBody"] = {"required": True, "content": {"application/json": reference}}
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
