"""The secret that makes a process a member of its cluster."""

from __future__ import annotations

from hashlib import blake2b

import msgspec
import zmq


class ClusterKeys(msgspec.Struct, frozen=True):
    """The secret that makes a process a member: a CURVE key pair as Z85 text, made by `generate` once per cluster."""

    public: str
    secret: str

    @classmethod
    def generate(cls) -> ClusterKeys:
        public, secret = zmq.curve_keypair()
        return cls(public.decode(), secret.decode())

    @property
    def transfer_secret(self) -> bytes:
        """32 bytes that key the handshake of the KV transport; they tell nothing of `secret`."""
        return blake2b(self.secret.encode(), digest_size=32, person=b"hetserve-kv-hmac").digest()
