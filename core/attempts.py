"""Where an attempt stands on one of the two instances that share it. The halves mirror each other, so that comparing them
tells which message between them was lost.

              prefill side                              decode side
    WAITING   the prompt waits for blocks               the prefill side has not admitted the prompt
    ADMITTED  it has blocks and is being read           the reservation waits for blocks
    GRANTED   the decode side has room: KV goes out     KV comes in
    RUNNING   (never)                                   the KV is committed: tokens are being written
    ENDED     delivered, finished, failed, withdrawn    finished, failed, withdrawn

An attempt that one instance serves alone is WAITING until it has blocks, then RUNNING.
"""

from __future__ import annotations

from enum import Enum


class Phase(Enum):
    WAITING = "waiting"
    ADMITTED = "admitted"
    GRANTED = "granted"
    RUNNING = "running"
    ENDED = "ended"
