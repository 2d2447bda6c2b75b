"""An answer in JSON."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from gateway.protocol.answers import encode_json


class JSON(Response):
    """A body that is JSON already, or becomes it."""

    media_type = "application/json"

    def __init__(self, content: Any, status_code: int = 200, headers: dict[str, str] | None = None) -> None:
        super().__init__(content if isinstance(content, bytes) else encode_json(content), status_code, headers)
