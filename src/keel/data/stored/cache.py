"""Folders of files made from rows, named by what they are made from.

A folder is written under another name and renamed when it is whole, so that a name says: complete. Two
processes that make the same folder each make their own; the second one's is thrown away. A folder that no run
asks for any more, and one that a killed process has left half made, are removed by `Cache.sweep`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from keel.errors import UsageError

FACTS = "facts.json"  # in each folder: what is known of it, and the folders that it was `made_from`
_PARTIAL = ".partial-"
_SETTLED = 2_000_000_000  # nanoseconds after which a file's time stamp tells every later change
_LIBRARIES = ("transformers", "tokenizers", "jinja2", "pyarrow")
_numbers = itertools.count()


@dataclass
class Cache:
    """The folders of one run, or of this process alone where nothing is to be kept."""

    directory: Path | None = None  # None: a temporary one, made when it is needed
    used: set[str] = field(default_factory=set)  # names that this process has asked for
    # what sources that change by themselves held when they were first read
    snapshots: dict[str, Any] = field(default_factory=dict)
    _temporary: tempfile.TemporaryDirectory[str] | None = None

    @property
    def keeps(self) -> bool:
        """Whether what is made now is found by a later process."""
        return self.directory is not None

    @property
    def place(self) -> Path:
        """The folder of the folders."""
        if self.directory is not None:
            return self.directory
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="keel-rows-")
        return Path(self._temporary.name)

    def find(self, name: str) -> Path | None:
        """The folder of this name, if it has been made."""
        self.used.add(name)
        path = self.place / name
        return path if path.is_dir() else None

    @contextmanager
    def making(self, name: str) -> Iterator[Path]:
        """A folder to fill, which has its name once the block ends without an error."""
        self.used.add(name)
        partial = self.place / f"{_PARTIAL}{os.getpid()}-{next(_numbers)}-{name}"
        try:
            partial.mkdir(parents=True)
            yield partial
            _sync(partial)
            try:
                partial.rename(self.place / name)
            except OSError:  # another process was faster, and its folder holds the same
                if not (self.place / name).is_dir():
                    raise
        except OSError as error:
            raise UsageError(f"rows cannot be written to {self.place}: {error}") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what this process has not asked for, and what no living process is making.

        A folder made from others is kept along with them, unless another one was asked for in its place: a
        stage that is done does not ask for its tokens, and will when it is run again.
        """
        if self.directory is None or not self.directory.is_dir():
            return
        made_from = {path.name: _made_from(path) for path in self.directory.iterdir() if path.is_dir()}
        asked_again = {made_from[name] for name in self.used if name in made_from}
        for name, origins in made_from.items():
            if name.startswith(_PARTIAL):
                stale = not _lives(name.removeprefix(_PARTIAL).partition("-")[0])
            else:  # what was made of rows still in use serves a stage that is not run this time
                serves = bool(origins) and origins <= self.used and origins not in asked_again
                stale = name not in self.used and not serves
            if stale:
                shutil.rmtree(self.directory / name, ignore_errors=True)


def name_of(kind: str, *parts: object) -> str:
    """A name for what is made from these parts by this version of keel's code."""
    digest = hashlib.sha256()
    for part in (code_print(), *(f"{library} {version(library)}" for library in _LIBRARIES), *parts):
        content = part if isinstance(part, bytes) else repr(part).encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "big") + content)
    return f"{kind}-{digest.hexdigest()[:32]}"


@lru_cache
def code_print() -> str:
    """A hash of the code that reads, validates and tokenises rows."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for path in sorted([*(root / "data").rglob("*.py"), root / "types.py"]):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- the content of files


_digests: dict[str, tuple[list[int], str]] = {}  # path → its state, and its content's sha256
_DIGESTS = "digests.json"


def digest_of(path: Path, cache: Cache | None = None) -> bytes:
    """sha256 of a file's content. It is read again only if the file has changed since: size, times or place
    on the disk. UsageError if it cannot be read."""
    key, kept = str(path.absolute()), cache.directory if cache else None
    try:
        state = _state(path)
        known = _digests.get(key) or _kept(kept).get(key)
        if known is None or known[0] != state:
            known = state, _sha256(path)
            if _state(path) != state or time.time_ns() - max(state[1], state[2]) < _SETTLED:
                return bytes.fromhex(known[1])  # it may change again within the same time stamp
        _digests[key] = (known[0], known[1])
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    return bytes.fromhex(known[1])


def keep_digests(cache: Cache) -> None:
    """Leave the digests of large files for a later process."""
    if cache.directory is None or not cache.directory.is_dir():
        return
    partial = cache.directory / f"{_PARTIAL}{os.getpid()}-{next(_numbers)}-{_DIGESTS}"
    large = {key: value for key, value in _digests.items() if value[0][0] > 1 << 24}
    partial.write_text(json.dumps(large), encoding="utf-8")
    partial.replace(cache.directory / _DIGESTS)


def _kept(directory: Path | None) -> dict[str, tuple[list[int], str]]:
    try:
        text = (directory / _DIGESTS).read_text(encoding="utf-8") if directory else "{}"
        return {key: (state, digest) for key, (state, digest) in json.loads(text).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _state(path: Path) -> list[int]:
    seen = path.stat()
    return [seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino, seen.st_dev]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _made_from(folder: Path) -> frozenset[str]:
    """The folders that one was made from."""
    try:
        return frozenset(json.loads((folder / FACTS).read_text(encoding="utf-8")).get("made_from", ()))
    except (OSError, ValueError):
        return frozenset()


def _sync(directory: Path) -> None:
    """Make sure that the files are on the disk before the folder gets its name."""
    for path in directory.iterdir():
        with path.open("rb") as handle:
            os.fsync(handle.fileno())


def _lives(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return True
