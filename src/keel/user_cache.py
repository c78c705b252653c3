# pyright: strict
"""What keel works out of this machine and of its own code, kept for the next process: `$KEEL_CACHE`, else
`$XDG_CACHE_HOME/keel`, else ~/.cache/keel. Everything in it can be worked out again, so that a folder that
cannot be read or written is no error, and removing it costs seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, cast


def folder() -> Path:
    """Where the files lie; it need not be there."""
    named = os.environ.get("KEEL_CACHE")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "keel"


def read(name: str) -> dict[str, Any]:
    """The object in the file NAME; {} where there is none, or what is there is no object."""
    try:
        value: Any = json.loads((folder() / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: nobody knows the home folder
        return {}
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def write(name: str, value: dict[str, Any]) -> Path | None:
    """Put an object into the file NAME, whole or not at all; its path, None where that cannot be."""
    try:
        place = folder()
        place.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=place, prefix=f".{name}.")
    except (OSError, RuntimeError):
        return None
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
            json.dump(value, handle)
        os.replace(partial, place / name)
    except BaseException as error:  # an interrupt, too: a command writes while it starts
        with contextlib.suppress(OSError):
            os.unlink(partial)
        if isinstance(error, OSError):
            return None
        raise
    return place / name
