"""KV blocks between engines: granted, streamed layer by layer, checked, committed. Nothing here knows what a request is.

    engine A ── KVStore ── KVSender ══ frames over a Transport ══ KVReceiver ── KVStore ── engine B

Neighbours: `core` below; the prefill worker drives `KVSender`, the decode worker `KVReceiver`. Never imports `engine`: the
two meet in `KVLayout` and `KVStore`.
"""
