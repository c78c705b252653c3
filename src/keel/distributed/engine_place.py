"""Where a vLLM server stands that a run starts: beside the first rank, or where its launcher has room."""

from __future__ import annotations

import os

GROUP = "KEEL_ENGINE_GROUP"  # in the environment of a rank


def reserved() -> str | None:
    """The name of the placement group that Ray holds for it; None: it stands beside the first rank."""
    return os.environ.get(GROUP) or None
