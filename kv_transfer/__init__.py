"""KV between engines: granted, streamed layer by layer, checked, committed. Nothing here knows what a request is.

    engine A ── KVStore ── Sender ══ headers on a stream, payloads by a carrier ══ Receiver ── KVStore ── engine B

    sessions          what the roles are promised, whatever moves the bytes; `events` say how each session ended
    sender            sessions out:  send_link (whose turn), sending (the threads), outbound (one session's frames),
                      line (a connection and its dial), answers (what comes back)
    receiver          sessions in:   doorway (who is connected), receive_link (one connection's frames), grants, inbound
    frames, protocol  the wire: headers and digests; the handshake, which also settles the carrier
    carrier           the seam of `carriers/`; `transport` that of `transports/`, the streams
    store             the seam of memory: tensors on a device, or plain bytes

Neighbours: `core` below; the prefill role drives a `Sender`, the decode role a `Receiver`. Never imports `engine`: the two
meet in `core.layout` and `KVStore`.
"""
