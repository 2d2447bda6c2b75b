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
    headers = should_retry(worth_a_retry(error))
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(max(1, round(error.retry_after_s)))
    elif error.status == 503:
        headers["retry-after"] = "1"
    elif error.status == 408:
        headers["connection"] = "close"
    elif error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers


def worth_a_retry(error: HetServeError) -> bool:
    """Whether the client's library shall send the request again by itself.

    Full queues empty, whoever says so. Of what attempts end with, the gateway has made its own retries: those of the client
    would multiply them. What has no retry in the gateway, a deadline for one, is not worth one of the client either.
    """
    if error.status in (408, 429):
        return True
    return error.retryable and not error.exhausted


def should_retry(worth_it: bool) -> dict[str, str]:
    """The header that OpenAI's clients heed before any rule of their own."""
    return {"x-should-retry": "true" if worth_it else "false"}
