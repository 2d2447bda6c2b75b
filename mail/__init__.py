"""One-way messages between processes: everybody owns a mailbox, and whoever knows its address may put messages in.

    Outbox, Renewals ─▶ Peers ══ CurveZMQ ══▶ Mailbox          Door: the context that both are made in, members only

Words (`core.messages`) and their encoding (`core.wire`) are below; nothing here knows what a message means.
"""
