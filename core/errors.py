"""Every error HetServe raises on purpose.

    HetServeError
    ├── InvalidRequest            400  a field is wrong; `param` names it
    │   └── ContextLengthExceeded 400  prompt + max_tokens does not fit the model
    ├── Unauthorized              401
    ├── ModelNotFound             404
    ├── ReadTimeout               408  the client was too slow to send its request
    ├── PayloadTooLarge           413
    ├── Overloaded                429  bounded queues are full; `retry_after_s` says when to come back
    ├── DeadlineExceeded          504
    ├── Unavailable               503  no instance can serve this now (starting, draining, or lost)
    │   ├── WorkerLost            503  the worker holding the attempt died or was fenced
    │   └── AttemptLost           503  the worker knows nothing of the attempt: its `Submit` was lost, or its end long told
    ├── EngineFault               500  one sequence failed inside an engine; the engine lives on
    ├── TransferError             503  KV did not arrive; the attempt may be retried elsewhere
    │   ├── HandshakeRefused           peers disagree on version, model, layout or dtype; `field` names which
    │   ├── CorruptTransfer            digest, coverage or framing is wrong
    │   ├── LeaseExpired
    │   └── TransferAborted            the other side gave up, and said why
    ├── ProtocolError                  a message that no honest peer sends
    ├── ConfigError                    `path` names the wrong key
    ├── ModelError                     a folder that is not a model, or a model we cannot serve; says why
    └── LaunchError                    port in use, no such accelerator, Ray not reachable
        ├── PortInUse
        └── NoSuchAccelerator

`code` is the stable machine-readable name that crosses the wire and ends up in OpenAI-shaped error bodies.
"""

from __future__ import annotations

from typing import ClassVar


class HetServeError(Exception):
    """Root of the tree. `status` is the HTTP status the gateway answers with; `retryable` says whether another attempt,
    on another worker, can succeed. `exhausted`: the gateway has made all the attempts that it may."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    exhausted: bool = False


class InvalidRequest(HetServeError, ValueError):
    """The request can never succeed as it is. `param` is the JSON path of the field at fault."""

    code = "invalid_request"
    status = 400

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class Unauthorized(HetServeError):
    code = "invalid_api_key"
    status = 401


class ModelNotFound(HetServeError):
    code = "model_not_found"
    status = 404


class ReadTimeout(HetServeError):
    code = "read_timeout"
    status = 408


class PayloadTooLarge(HetServeError):
    code = "payload_too_large"
    status = 413


class Overloaded(HetServeError):
    """Queues are full. `retry_after_s` is the router's estimate of when there will be room."""

    code = "overloaded"
    status = 429

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(HetServeError):
    code = "deadline_exceeded"
    status = 504


class Unavailable(HetServeError):
    code = "unavailable"
    status = 503
    retryable = True


class WorkerLost(Unavailable):
    code = "worker_lost"


class AttemptLost(Unavailable):
    code = "attempt_lost"


class EngineFault(HetServeError):
    code = "engine_fault"
    retryable = True


class TransferError(HetServeError):
    code = "transfer_failed"
    status = 503
    retryable = True


class HandshakeRefused(TransferError):
    """`field` is the first property on which the two sides differ."""

    code = "handshake_refused"

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class CorruptTransfer(TransferError):
    code = "corrupt_transfer"


class LeaseExpired(TransferError):
    code = "lease_expired"


class TransferAborted(TransferError):
    code = "transfer_aborted"


class ProtocolError(HetServeError, ValueError):
    code = "protocol_error"


class ConfigError(HetServeError, ValueError):
    """`path` is the dotted key that is wrong, as written in the YAML file: `pools[0].replicas`."""

    code = "invalid_config"

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(f"{path}: {message}" if path else message)
        self.path = path


class ModelError(HetServeError):
    code = "unusable_model"


class LaunchError(HetServeError):
    code = "launch_failed"


class PortInUse(LaunchError):
    code = "port_in_use"


class NoSuchAccelerator(LaunchError):
    code = "no_such_accelerator"


def _tree(root: type[HetServeError]) -> dict[str, type[HetServeError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


_BY_CODE = _tree(HetServeError)


def from_wire(code: str, message: str) -> HetServeError:
    """The error that a worker named by `code`; an unknown code becomes the root, which is not retried."""
    return _BY_CODE.get(code, HetServeError)(message)
