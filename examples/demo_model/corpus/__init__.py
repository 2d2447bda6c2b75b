"""What the demo model reads: English that a grammar makes, so that it is ours to give away.

`documents(seed, split)` yields chats and texts without end: stories, sums, lists, JSON, small talk, and questions about HetServe.
Nothing is downloaded, and no text of anybody else is in it. `python -m examples.demo_model.corpus` prints some.
"""

from __future__ import annotations

from examples.demo_model.corpus.document import Document, Message, Split
from examples.demo_model.corpus.mix import KINDS, documents, of_kind

__all__ = ["KINDS", "Document", "Message", "Split", "documents", "of_kind"]
