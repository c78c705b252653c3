"""What the small files of a run say, in whatever state they are: a hand, a disk or another program may have
changed them. A mark that cannot be read is no mark, so that the stage is run again."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from keel.errors import UsageError

PROGRESS = "progress.json"  # how many steps a stage will have, for whoever watches it
LARGEST = 64 * 2**20  # bytes of a file that is read whole

_NUMBER = (int, float)
_TYPES: Mapping[str, tuple[type, ...]] = {
    "kind": (str,),
    "fingerprint": (str,),
    "seconds": _NUMBER,
    "weights": (dict,),
    "facts": (dict,),
}
_OF_WEIGHTS: Mapping[str, type] = {"size": int, "changed": int, "sha256": str}


def open_file(path: Path) -> IO[bytes]:
    """A file of a run, open to be read. OSError where it cannot be opened; ValueError for what is no file: a
    pipe or a device under its name would be waited for without end."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("it is no file")
    return os.fdopen(descriptor, "rb")


def read_text(path: Path, most: int = LARGEST) -> str:
    """A whole text file. OSError where it cannot be read, ValueError for one that is no UTF-8 or has more
    than `most` bytes."""
    with open_file(path) as handle:
        return whole_text(handle, most)


def whole_text(handle: IO[bytes], most: int = LARGEST) -> str:
    """All of an open text file; errors as of `read_text`."""
    content = handle.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return content.decode("utf-8")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is no file, no JSON or no object."""
    try:
        value = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_record(directory: Path) -> dict[str, Any]:
    """A stage's `stage.json`, its mark of being done; {} where it is not done or the file is not as keel
    writes it."""
    found = read_object(directory / "stage.json")
    for name, types in _TYPES.items():
        value = found.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, types)):
            return {}
    recorded: Mapping[str, Any] = found.get("weights") or {}
    sound = all(
        isinstance(facts, dict) and all(isinstance(facts.get(key), of) for key, of in _OF_WEIGHTS.items())
        for facts in recorded.values()
    )
    return found if sound else {}


def read_mark(directory: Path) -> str | None:
    """The fingerprint that a stage was begun with; None where there is none, "" where it cannot be read."""
    path = directory / "fingerprint"
    if not path.exists():
        return None
    try:
        return read_text(path)
    except (OSError, ValueError):
        return ""


def read_own(path: Path, *, lines: bool = False) -> Any:
    """JSON that a stage has written for itself, or with `lines` a list of it, line by line. UsageError, with
    the way out, where something else is there now."""
    try:
        content = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in content.split("\n") if line] if lines else json.loads(content)
    except (ValueError, RecursionError):
        raise UsageError(
            f"{path} is not what keel wrote there: put it back, or remove it and the stage makes it again"
        ) from None
