"""Errors at the door: from any error to OpenAI's JSON shape."""

from __future__ import annotations

from typing import Any

import msgspec

from core.errors import HetServeError, InvalidRequest, Overloaded

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


def status_type(status: int) -> str:
    return _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")


def body_of(error: HetServeError) -> dict[str, Any]:
    """`{"error": {message, type, param, code}}` as OpenAI's clients expect it."""
    param = error.param if isinstance(error, InvalidRequest) else None
    return error_body(error.status, str(error), error.code, param)


def error_body(status: int, message: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": status_type(status), "param": param, "code": code}}


def encode_error(error: HetServeError) -> bytes:
    return msgspec.json.encode(body_of(error))


def headers_of(error: HetServeError) -> dict[str, str]:
    if isinstance(error, Overloaded):
        return {"retry-after": str(max(1, round(error.retry_after_s)))}
    if error.status == 503:
        return {"retry-after": "1"}
    if error.status == 408:
        return {"connection": "close"}
    if error.status == 401:
        return {"www-authenticate": "Bearer"}
    return {}
