"""Content addresses of KV blocks: equal hashes mean equal tokens, in equal order, from the start, for the same tenant.

Each block's hash covers its parent's, so one lookup proves the whole prefix (the idea of vLLM's and SGLang's prefix
caches). BLAKE2b keeps a crafted prompt from colliding with somebody else's; the salt, derived on the server, keeps one
tenant from timing another's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from core.tokens import pack_tokens

HASH_BYTES = 16


def root_hash(salt: bytes) -> bytes:
    """The parent of a sequence's first block."""
    return blake2b(salt, digest_size=HASH_BYTES, person=b"hetserve-kv").digest()


def block_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Hash of one full block of `tokens` that follows the block hashed as `parent`."""
    return blake2b(pack_tokens(tokens), digest_size=HASH_BYTES, key=parent).digest()


def block_hashes(tokens: Sequence[int], block_size: int, salt: bytes) -> list[bytes]:
    """Hashes of every full block of `tokens`, first to last."""
    hashes: list[bytes] = []
    parent = root_hash(salt)
    for start in range(0, len(tokens) - block_size + 1, block_size):
        parent = block_hash(parent, tokens[start : start + block_size])
        hashes.append(parent)
    return hashes
