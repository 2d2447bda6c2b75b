"""What a receiver answers on a line: commits, aborts, and notes of its carrier."""

from __future__ import annotations

import logging
from typing import Protocol

from core.errors import CorruptTransfer, TransferError
from kv_transfer.frames import (
    HEADER_BYTES,
    MAX_CONTROL_BYTES,
    Abort,
    Commit,
    Kind,
    check_payload,
    error_of,
    parse_header,
    unpack_body,
)
from kv_transfer.line import Line

_log = logging.getLogger(__name__)


class Hearer(Protocol):
    """Who the answers of a line are for. Called by the thread that reads them."""

    def committed(self, line: Line, grant: int, commit: Commit) -> None: ...

    def refused(self, line: Line, grant: int, error: TransferError) -> None: ...

    def hang_up(self, error: TransferError, only: Line | None = None) -> None: ...


def hear(line: Line, hearer: Hearer) -> None:
    """Read answers until the line ends, which ends the sessions on it. Raises nothing."""
    try:
        _hear(line, hearer)
    except TransferError as error:
        hearer.hang_up(error, line)
    except Exception as error:  # ends this line's sessions, never the worker
        _log.exception("cannot hear a receiver")
        hearer.hang_up(TransferError(f"cannot hear the receiver: {error!r}"), line)


def _hear(line: Line, hearer: Hearer) -> None:
    header_bytes, body = memoryview(bytearray(HEADER_BYTES)), memoryview(bytearray(MAX_CONTROL_BYTES))
    seed, heard = line.peer.recv_seed, 0
    while True:
        line.connection.recv_into(header_bytes)
        header = parse_header(header_bytes, seed)
        if header.sequence != heard or header.length > MAX_CONTROL_BYTES:
            raise CorruptTransfer(f"Got answer {header.sequence} of {header.length} bytes but expected answer {heard}")
        heard += 1
        payload = body[: header.length]
        line.connection.recv_into(payload)
        check_payload(header, payload, seed)
        match header.kind:
            case Kind.COMMIT:
                hearer.committed(line, header.grant, unpack_body(payload, Commit))
            case Kind.ABORT:
                hearer.refused(line, header.grant, error_of(unpack_body(payload, Abort)))
            case Kind.NOTE:
                line.outgoing.heard(bytes(payload))
            case _:
                raise CorruptTransfer(f"Got a {header.kind.name} from a receiver")
