"""What every world needs to make rows: one random stream per row, and checks of what was asked for."""

from __future__ import annotations

import difflib
import hashlib
import random
from collections.abc import Iterable, Mapping
from typing import Any

from keel.errors import UsageError


def row_random(world: str, split: str, seed: int, index: int) -> random.Random:
    """The random stream of one row.

    Each row has its own, so row `index` is the same however many rows are asked for. The seed is a SHA-256
    of the names: `hash()` of a string changes from process to process.
    """
    digest = hashlib.sha256(f"{world}/{split}/{seed}/{index}".encode()).digest()
    return random.Random(int.from_bytes(digest[:16], "big"))


def fraction(key: str) -> float:
    """A number in [0, 1) that depends on `key` alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def unknown(what: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name nobody knows; it gives the nearest one and all there are."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return UsageError(f"{what} {name!r} is unknown{hint} (known: {', '.join(names) or 'none'})")


def check_request(
    world: str,
    split: str,
    splits: Mapping[str, str],
    rows: int | None,
    options: Mapping[str, Any],
    known_options: Iterable[str] = (),
) -> None:
    """Raise UsageError unless the split and the options exist and `rows` is a count or None."""
    if split not in splits:
        raise unknown(f"world:{world}: split", split, splits)
    known = list(known_options)
    for option in options:
        if option not in known:
            raise unknown(f"world:{world}: option", option, known)
    if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 0):
        raise UsageError(f"world:{world}/{split}: rows must be a count or null, not {rows!r}")
