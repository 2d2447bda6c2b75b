"""Every error the client raises on purpose.

    APIError
    ├── InvalidArgument          what the caller passed cannot be sent; a ValueError as well
    ├── StatusError              the server answered with an error: `status`, `code`, `param`, `kind`, `request_id`
    │   ├── BadRequest      400  and every other 4xx without a name of its own
    │   ├── Unauthorized    401, 403
    │   ├── NotFound        404
    │   ├── RateLimited     429  `retry_after_s` says when to come back, where the server said so
    │   └── ServerError     5xx
    ├── ConnectionFailed         no whole answer: refused, reset, cut off; or the client is closed
    ├── TimedOut                 no answer in time; `phase` says which limit ran out: connect, read, total
    ├── StreamError              a stream that had begun broke off, or carried an error; `code` as in StatusError
    └── InvalidResponse          an answer that is not what the API promises

Catch `APIError` for all of them. Retries happen before any of these is raised; once a stream has begun nothing is retried.
"""

from __future__ import annotations


class APIError(Exception):
    """Root of the tree."""


class InvalidArgument(APIError, ValueError):
    """What the caller passed cannot be sent: a URL that is none, text or numbers that JSON cannot hold."""


class StatusError(APIError):
    """The server's error answer, in OpenAI's shape.

    Attributes:
        status: HTTP status.
        code: stable name, for instance `context_length_exceeded`.
        param: the field at fault.
        kind: OpenAI's `type`.
        request_id: the server's name for the request, for its operator.
        retry_after_s: when the server asked to be tried again.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str | None = None,
        param: str | None = None,
        kind: str | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(f"{status}: {message}")
        self.message = message
        self.status = status
        self.code = code
        self.param = param
        self.kind = kind
        self.request_id = request_id
        self.retry_after_s = retry_after_s


class BadRequest(StatusError):
    """The request can never succeed as it is."""


class Unauthorized(StatusError):
    """No API key, or not one that the server knows."""


class NotFound(StatusError):
    """No such route, or no such model."""


class RateLimited(StatusError):
    """The server's queues are full."""


class ServerError(StatusError):
    """The server failed, or can serve nothing now."""


class ConnectionFailed(APIError):
    """The server could not be reached, or hung up; or the client was closed."""


class TimedOut(APIError):
    def __init__(self, message: str, phase: str) -> None:
        super().__init__(message)
        self.phase = phase


class StreamError(APIError):
    """What was received before this is good; nothing more will come."""

    def __init__(self, message: str, *, code: str | None = None, request_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.request_id = request_id


class InvalidResponse(APIError):
    """A redirect, not JSON, or without a field that the API promises. Usually the URL is of something else."""


def status_error_type(status: int) -> type[StatusError]:
    """The class that stands for an HTTP status of 400 or more."""
    if status >= 500:
        return ServerError
    return {401: Unauthorized, 403: Unauthorized, 404: NotFound, 429: RateLimited}.get(status, BadRequest)
