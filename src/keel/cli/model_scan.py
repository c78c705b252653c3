"""What transformers finds when it reads the files of all its models, kept for the next process.

To know which name is in which file transformers reads 2,500 of them whenever it is imported, twice: for
`transformers` and for `transformers.models`. That is a tenth of the time until the first step of a run. Here
it reads them once, and not at all where none of them has changed since (by its size and time, as `make`
would say). Where a release does this otherwise, or what was kept cannot be used, it reads them as it would.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from keel import user_cache

READS = "transformers.utils.import_utils"
FUNCTION = "create_import_structure_from_path"
FILE = "transformers-models.json"  # in the cache folder

# folder of a model → what its names require → file → names; a folder may lie in a folder
Structure = dict[str, Any]
Reader = Callable[[Any], Structure]


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Import transformers inside."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for module, read in finder.changed:
            setattr(module, FUNCTION, read)


class _Finder(MetaPathFinder):
    """Finds the one module whose function is to be another while transformers is imported."""

    def __init__(self) -> None:
        self.changed: list[tuple[ModuleType, Reader]] = []

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != READS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or type(spec.loader) is not SourceFileLoader:
            return None
        spec.loader = _Loader(spec.loader.name, spec.loader.path, self)
        return spec


class _Loader(SourceFileLoader):
    def __init__(self, name: str, path: str, finder: _Finder) -> None:
        super().__init__(name, path)
        self._finder = finder

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        read: Reader | None = getattr(module, FUNCTION, None)
        if callable(read):
            self._finder.changed.append((module, read))
            models = Path(self.path).parents[1] / "models"
            setattr(module, FUNCTION, reader(read, models, [Path(self.path)]))


def reader(read: Reader, models: Path, also: list[Path]) -> Reader:
    """`read`, which for the folder of all models gives what it gave before. also: files of its own code."""
    found: list[Structure] = []

    def of(module_path: Any) -> Structure:
        place = Path(module_path)
        if (place.parent if place.name == "__init__.py" else place) != models:
            return read(module_path)
        if not found:
            found.append(_found(read, models, also))
        return found[0]

    return of


def _found(read: Reader, models: Path, also: list[Path]) -> Structure:
    stamp = _stamp(models, also)
    before = user_cache.read(FILE)
    if before.get("stamp") == stamp:
        with contextlib.suppress(
            LookupError, TypeError, ValueError, AttributeError
        ):  # of another form: read again
            return _decoded(before["structure"])
    structure = read(models)
    with contextlib.suppress(TypeError, ValueError, AttributeError):
        encoded = _encoded(structure)
        if _decoded(encoded) == structure:
            user_cache.write(FILE, {"stamp": stamp, "structure": encoded})
    return structure


def _stamp(models: Path, also: list[Path]) -> str:
    """A hash of the name, size and time of each file that is read."""
    rows = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in also]
    waiting = [str(models)]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.name == "__pycache__":
                    continue
                if entry.is_dir():
                    waiting.append(entry.path)
                elif entry.name.endswith(".py"):
                    facts = entry.stat()
                    rows.append((entry.path, facts.st_mtime_ns, facts.st_size))
    return hashlib.sha256(repr(sorted(rows)).encode()).hexdigest()


def _encoded(structure: Structure) -> Any:
    """As JSON: a folder is an object, what the names of its files require a list of pairs."""
    folders = {name: _encoded(inner) for name, inner in structure.items() if isinstance(name, str)}
    own = [
        [sorted(requires), {file: sorted(names) for file, names in files.items()}]
        for requires, files in structure.items()
        if isinstance(requires, frozenset)
    ]
    if len(folders) + len(own) != len(structure):
        raise TypeError("a key that is neither a folder nor a set of requirements")
    return {"folders": folders, "own": own}


def _decoded(value: Any) -> Structure:
    own: dict[Any, Any] = {
        frozenset(requires): {file: set(names) for file, names in files.items()}
        for requires, files in value["own"]
    }
    return own | {name: _decoded(inner) for name, inner in value["folders"].items()}  # in transformers' order
