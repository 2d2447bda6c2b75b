"""KV transfer in virtual time: the real sessions, frames, digests, coverage and grants; only the wire between them is a delay.

A sender has one link, shared by its sessions. A receiver that was stopped takes nothing more and answers nothing.
"""

from __future__ import annotations

import xxhash

from core.errors import CorruptTransfer, LeaseExpired, TransferAborted, TransferError
from core.groups import Tables
from kv_transfer.events import Delivered, OnReceiverEvent, OnSenderEvent, SendFailed
from kv_transfer.frames import HEADER_BYTES, Begin, Finish, Header, Kind, check_payload, parse_header, unpack_body
from kv_transfer.grants import GrantTable
from kv_transfer.inbound import GrantEnded
from kv_transfer.outbound import Outbound
from kv_transfer.store import KVStore, read_region
from kv_transfer.terms import Terms, check_endpoints, check_kept
from tests.support.virtual.timeline import Timeline

SEED = 7


class Fabric:
    """Where receivers are found; `bytes_per_s` and `latency_s` of every link."""

    def __init__(self, timeline: Timeline, bytes_per_s: float = 1e9, latency_s: float = 2e-4) -> None:
        self.timeline = timeline
        self.bytes_per_s = bytes_per_s
        self.latency_s = latency_s
        self.receivers: dict[str, VirtualReceiver] = {}
        self.kv_bytes = 0


class VirtualReceiver:
    """A `kv_transfer.sessions.Receiver`."""

    def __init__(self, fabric: Fabric, endpoint: str, store: KVStore, on_event: OnReceiverEvent) -> None:
        self.endpoint = endpoint
        self._fabric = fabric
        self._layout = store.layout
        self._terms: dict[int, Terms] = {}
        self.table = GrantTable(store, fabric.timeline, on_event)
        fabric.receivers[endpoint] = self

    @property
    def open_grants(self) -> int:
        return len(self.table)

    def open(self, terms: Terms, tables: Tables) -> None:
        self.table.open(terms, tables)
        self._terms[terms.grant] = terms
        self._watch(terms.lease_s)

    def renew(self, grant: int) -> bool:
        return self.table.renew(grant)

    def close(self, grant: int, reason: str) -> bool:
        return self.table.close(grant, TransferAborted(reason))

    def stop(self) -> None:
        if self._fabric.receivers.get(self.endpoint) is self:
            del self._fabric.receivers[self.endpoint]
        self.table.shut("the receiver has stopped")

    def take(self, session: VirtualSession, packed: bytes, payload: bytes) -> None:
        """One frame has arrived."""
        if self._fabric.receivers.get(self.endpoint) is not self:
            return
        header = parse_header(memoryview(packed), SEED)
        found = self.table.get(header.grant)
        if found is None or not (found.belongs_to(session.way) or header.kind is Kind.BEGIN):
            if header.kind is not Kind.ABORT:
                session.abort_later(TransferAborted(f"grant {header.grant} is not open to this sender"))
            return
        try:
            check_payload(header, payload, SEED)
            self._apply(session, header, memoryview(packed), memoryview(payload))
        except GrantEnded:
            return
        except TransferError as error:
            if found.belongs_to(session.way):
                self.table.fail(found, error)
            else:
                session.way.abort(header.grant, error)

    def _apply(self, session: VirtualSession, header: Header, packed: memoryview, payload: memoryview) -> None:
        found = self.table.get(header.grant)
        assert found is not None
        if header.kind is Kind.BEGIN:
            found.begin(header, packed, unpack_body(payload, Begin), session.way)
        elif header.kind is Kind.DATA:
            found.write(header, packed, payload)
        elif header.kind is Kind.FINISH:
            received, commit = found.finish(header, packed, unpack_body(payload, Finish))
            assert received.kv_bytes == self._needed_bytes(header.grant)
            session.committed_later(commit.digest)
            self.table.commit(received)
        else:
            raise CorruptTransfer(f"Got a {header.kind.name} from a sender")

    def _needed_bytes(self, grant: int) -> int:
        regions = self._terms[grant].needed(self._layout)
        return sum(each.tokens.size * self._layout.layer_bytes_per_token(each.layers.start) for each in regions)

    def _watch(self, delay_s: float) -> None:
        def look() -> None:
            due_s = self.table.expire()
            if due_s is not None:
                self._watch(max(due_s, 1e-3))

        self._fabric.timeline.after(delay_s, look)


class VirtualSender:
    """A `kv_transfer.sessions.Sender`."""

    def __init__(self, fabric: Fabric, store: KVStore, on_event: OnSenderEvent) -> None:
        self.fabric = fabric
        self.store = store
        self.on_event = on_event
        self.closed = False
        self._free_s = 0.0
        self._sessions: list[VirtualSession] = []

    def begin(self, terms: Terms, endpoints: tuple[str, ...], tables: Tables, incarnation: int | None = None) -> VirtualSession:
        if self.closed:
            raise TransferAborted("the sender is closed")
        session = VirtualSession(self, terms)
        self._sessions = [other for other in self._sessions if not other.ended]
        self._sessions.append(session)
        try:
            terms.check()
            session.endpoint = check_endpoints(endpoints)
            check_kept(self.store.groups, terms)
            session.outbound = Outbound(self.store.layout, self.store.groups, terms, tables)
        except ValueError as error:
            message = str(error)
            self.fabric.timeline.after(0.0, lambda: session.fail(TransferError(message)))
        session.advance()
        return session

    def close(self) -> None:
        self.closed = True
        for session in list(self._sessions):
            session.fail(TransferAborted("the sender is closed"))

    def occupy(self, size_bytes: int) -> float:
        """When a frame that leaves now will have arrived."""
        now_s = self.fabric.timeline.now()
        self._free_s = max(self._free_s, now_s) + size_bytes / self.fabric.bytes_per_s
        return self._free_s + self.fabric.latency_s


class WayBack:
    """What a receiver knows of a session: how to refuse it."""

    def __init__(self, session: VirtualSession) -> None:
        self._session = session

    def abort(self, grant: int, error: TransferError) -> None:
        self._session.abort_later(error)


class VirtualSession:
    """A `kv_transfer.sessions.SendSession`."""

    def __init__(self, sender: VirtualSender, terms: Terms) -> None:
        self.attempt = terms.attempt
        self.grant = terms.grant
        self.ended = False
        self.endpoint = ""
        self.outbound: Outbound | None = None
        self._sender = sender
        self._lease_s = terms.lease_s
        self._began_s = sender.fabric.timeline.now()
        self.way = WayBack(self)

    def push(self, layer: int, start: int, count: int, fence: object = None) -> None:
        self._change(lambda outbound: outbound.push(layer, start, count, None))

    def finish(self, tail: bytes) -> None:
        self._change(lambda outbound: outbound.finish(tail))
        self._sender.fabric.timeline.after(self._lease_s, lambda: self.fail(LeaseExpired("nothing was committed")))

    def abort(self, reason: str) -> bool:
        if self.ended:
            return False
        self.ended = True
        self._send_abort()
        return True

    def advance(self) -> None:
        """Put what can leave on the wire."""
        outbound, sender = self.outbound, self._sender
        if outbound is None or self.ended:
            return
        begin = outbound.take_begin(SEED)
        if begin is not None:
            self._carry(begin[:HEADER_BYTES], begin[HEADER_BYTES:])
        while not self.ended and (region := outbound.take_region()) is not None:
            payload = bytearray(sender.store.layout.region_bytes(region))
            read_region(sender.store, outbound.tables, region, memoryview(payload))
            digest = xxhash.xxh3_64_intdigest(payload, SEED)
            self._carry(outbound.stamp_region(region, len(payload), digest, SEED), bytes(payload))
            sender.fabric.kv_bytes += len(payload)
        finish = outbound.take_finish(SEED)
        if finish is not None:
            self._carry(finish[:HEADER_BYTES], finish[HEADER_BYTES:])

    def fail(self, error: TransferError) -> None:
        if not self.ended:
            self.ended = True
            self._send_abort()
            self._sender.on_event(SendFailed(self.attempt, error))

    def abort_later(self, error: TransferError) -> None:
        """The receiver refuses: known here after the way back."""
        self._sender.fabric.timeline.after(self._sender.fabric.latency_s, lambda: self.fail(error))

    def committed_later(self, digest: int) -> None:
        def commit() -> None:
            outbound = self.outbound
            if self.ended or outbound is None:
                return
            if outbound.digest != digest:
                self.fail(CorruptTransfer("something else was committed"))
                return
            self.ended = True
            took_s = self._sender.fabric.timeline.now() - self._began_s
            self._sender.on_event(Delivered(self.attempt, outbound.kv_bytes, took_s))

        self._sender.fabric.timeline.after(self._sender.fabric.latency_s, commit)

    def _change(self, change: object) -> None:
        if self.ended or self.outbound is None:
            return
        try:
            change(self.outbound)
        except ValueError as error:
            self.fail(TransferError(str(error)))
            return
        self.advance()

    def _carry(self, packed: bytes, payload: bytes) -> None:
        def arrive() -> None:
            receiver = self._sender.fabric.receivers.get(self.endpoint)
            if receiver is None:
                self.fail(TransferError(f"nobody listens on {self.endpoint}"))
            else:
                receiver.take(self, packed, payload)

        self._sender.fabric.timeline.at(self._sender.occupy(len(payload)), arrive)

    def _send_abort(self) -> None:
        def arrive() -> None:
            receiver = self._sender.fabric.receivers.get(self.endpoint)
            found = None if receiver is None else receiver.table.get(self.grant)
            if receiver is not None and found is not None and found.belongs_to(self.way):
                receiver.table.fail(found, TransferAborted("the peer gave up"), given_up=True)

        self._sender.fabric.timeline.after(self._sender.fabric.latency_s, arrive)
