"""A cache of one layer whose sequence is many full pieces: more than any ring holds."""

from __future__ import annotations

from core.layout import KVLayout, LayerShape
from tests.kv_transfer.rig import layout

BLOCKS = range(24)
TOKENS = 24 * 256  # 24 MiB
LEASE_S = 3600.0


def large_layout() -> KVLayout:
    return layout(256, shapes=[LayerShape(8, 128, 128)])
