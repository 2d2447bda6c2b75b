"""The models that come with HetServe: small, trained by `examples/demo_model/`, and loaded like any other model's folder.

    hetserve serve demo        # or `model: demo` in a cluster's file

Each folder holds a card (README.md) that says what it can do and how it was trained. Nothing of torch is imported here. The
server finds the same folders by their names (`instance/embedded.py`), on whichever machine it runs.
"""

from __future__ import annotations

from pathlib import Path

DEMO = Path(__file__).resolve().parent / "demo"
"""A Llama of about six million parameters that tells stories, chats, counts, and answers questions about HetServe."""

DEMO_DRAFT = DEMO.with_name("demo-draft")
"""A still smaller one with the same vocabulary, to draft for it."""
