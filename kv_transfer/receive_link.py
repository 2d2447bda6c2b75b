"""The receiving end of one connection: frames in, checks, writes, replies out. Runs in the thread that calls `run`.

What a bad frame costs: a payload or a sequence that is wrong, its session; a header that is wrong, the connection and all its
sessions, because nothing after it can be trusted to be a header. Frames for a grant that is not open (late, stale, foreign)
are read, dropped and answered with ABORT.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict

from core.errors import CorruptTransfer, TransferAborted, TransferError
from kv_transfer.carrier import Acceptance
from kv_transfer.frames import (
    HEADER_BYTES,
    MAX_CONTROL_BYTES,
    Begin,
    Finish,
    Header,
    Kind,
    abort_of,
    check_payload,
    error_of,
    largest_piece_bytes,
    pack_body,
    pack_frame,
    parse_header,
    unpack_body,
)
from kv_transfer.frames import Abort as AbortBody
from kv_transfer.grants import GrantTable
from kv_transfer.inbound import GrantEnded, InboundGrant
from kv_transfer.protocol import Peer
from kv_transfer.transport import Connection

_log = logging.getLogger(__name__)
_REMEMBERED_REFUSALS = 1024


class ReceiveLink:
    """Memory: what the carrier takes, and a buffer for the largest control frame.

    Raises:
        TransferError: the carrier cannot be opened.
    """

    def __init__(self, connection: Connection, peer: Peer, acceptance: Acceptance, grants: GrantTable) -> None:
        self._connection = connection
        self._peer = peer
        self._grants = grants
        self._header = memoryview(bytearray(HEADER_BYTES))
        self._control = memoryview(bytearray(MAX_CONTROL_BYTES))
        self._most = largest_piece_bytes(peer.identity.layout)
        self._reply_lock = threading.Lock()
        self._replies = 0
        self._refused: OrderedDict[int, None] = OrderedDict()
        self._incoming = acceptance.open(connection, self._tell)

    def run(self) -> None:
        """Serve until the connection ends; its sessions end with it. Raises nothing that a peer can cause."""
        error = TransferError("the connection ended")
        try:
            while True:
                self._serve_frame()
        except TransferError as caught:
            error = caught
        finally:
            self._connection.close()
            self._incoming.close()
            self._grants.lost(self, error)

    def close(self) -> None:
        """Ends `run`, also while it waits in the carrier. From any thread; idempotent."""
        self._connection.close()
        self._incoming.close()

    def abort(self, grant: int, error: TransferError) -> None:
        self._reply(Kind.ABORT, grant, pack_body(abort_of(error)))

    def _serve_frame(self) -> None:
        self._connection.recv_into(self._header)
        header = parse_header(self._header, self._peer.recv_seed)
        most = self._most if header.kind is Kind.DATA else MAX_CONTROL_BYTES
        if header.length > most:
            raise CorruptTransfer(f"Got a {header.kind.name} of {header.length} bytes but expected at most {most}")
        if header.kind is Kind.DATA:
            payload = self._incoming.take(header)
            try:
                self._handle(header, payload)
            finally:
                self._incoming.release(payload)
        else:
            payload = self._control[: header.length]
            self._connection.recv_into(payload)
            self._handle(header, payload)

    def _handle(self, header: Header, payload: memoryview) -> None:
        found = self._grants.get(header.grant)
        if header.grant in self._refused or found is None or not (found.belongs_to(self) or header.kind is Kind.BEGIN):
            if header.kind is not Kind.ABORT:
                self._refuse(header.grant, TransferAborted(f"grant {header.grant} is not open to this sender"))
        elif header.kind is Kind.BEGIN:
            self._begin(header, payload, found)
        else:
            self._continue(header, payload, found)

    def _begin(self, header: Header, payload: memoryview, found: InboundGrant) -> None:
        try:
            check_payload(header, payload, self._peer.recv_seed)
            found.begin(header, self._header, unpack_body(payload, Begin), self)
        except TransferError as error:
            if found.belongs_to(self) and not isinstance(error, GrantEnded):
                self._grants.fail(found, error)
            else:
                self._refuse(header.grant, error)

    def _continue(self, header: Header, payload: memoryview, found: InboundGrant) -> None:
        try:
            check_payload(header, payload, self._peer.recv_seed)
            if header.kind is Kind.DATA:
                found.write(header, self._header, payload)
            elif header.kind is Kind.FINISH:
                received, commit = found.finish(header, self._header, unpack_body(payload, Finish))
                # What has arrived has arrived: a sender that cannot be told is the sender's loss, not the sequence's.
                self._reply(Kind.COMMIT, header.grant, pack_body(commit))
                self._grants.commit(received)
            elif header.kind is Kind.ABORT:
                self._grants.fail(found, error_of(unpack_body(payload, AbortBody)), given_up=True)
            else:
                raise CorruptTransfer(f"Got a {header.kind.name} from a sender")
        except GrantEnded:
            return
        except TransferError as error:
            self._grants.fail(found, error)
        except Exception as error:  # the store's fault ends this session, not the connection's others
            _log.exception("cannot store KV of attempt %s", found.attempt)
            self._grants.fail(found, TransferError(f"the receiver cannot store: {error!r}"))

    def _refuse(self, grant: int, error: TransferError) -> None:
        """Answer the first frame of a grant that is not this sender's. What has been refused stays refused on this connection:
        its sender has been told that the session is over."""
        if grant in self._refused:
            return
        self._refused[grant] = None
        if len(self._refused) > _REMEMBERED_REFUSALS:
            self._refused.popitem(last=False)
        self.abort(grant, error)

    def _tell(self, note: bytes) -> None:
        self._reply(Kind.NOTE, 0, note)

    def _reply(self, kind: Kind, grant: int, payload: bytes) -> None:
        with self._reply_lock:
            header = pack_frame(kind, grant, self._replies, payload, self._peer.send_seed)
            self._replies += 1
            try:
                self._connection.send([header, payload], wait=False)
            except TransferError as error:
                _log.info("cannot answer a sender: %s", error)
