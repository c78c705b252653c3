"""Which modules of keel a piece of code uses, and a print of each: what its results depend on of keel's code.

The graph is read from the source, without importing it: module → the modules that its import statements
name, those inside functions included. A package's `__init__` that only passes names on is looked through: who
imports `PPOConfig` from `keel.config` uses `keel.config.ppo`, not all configs.

Left out: modules that are imported by a name computed at run time. keel has none; plug-ins have prints of
their own.

Reading all files takes a second of a process's start, so what they say is kept in the user's cache, by the
hash of a file's bytes.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import keel
from keel import user_cache

Name = tuple[str, str | None]  # a module, and what is taken from it; None: the module itself
KEPT, MOST_KEPT = "code.json", 5000  # the file in the user's cache, and files whose content it knows at most
_BODIES = ("body", "orelse", "finalbody", "handlers", "cases")  # fields that hold statements


@dataclass(frozen=True)
class Module:
    """One source file."""

    path: Path
    package: str  # that its relative imports start from

    @cached_property
    def _read(self) -> tuple[str, tuple[Name, ...], dict[str, Name]]:
        """All that is wanted of the file: from the cache, if its content is known there."""
        content = self.path.read_bytes()
        key = hashlib.sha256(self.package.encode() + b"\0" + content).hexdigest()
        kept = _kept()
        if (known := _as_read(kept.get(key))) is None:
            known = self._parsed(content)
            kept[key] = [known[0], known[1], known[2]]
            _new.add(key)
        return known

    def _parsed(self, content: bytes) -> tuple[str, tuple[Name, ...], dict[str, Name]]:
        """The file, read. Its syntax tree, which is large, is not kept."""
        tree = ast.parse(content)
        parts: list[str] = []
        _write(tree, parts)
        code = hashlib.sha256("\0".join(parts).encode()).hexdigest()
        passed_on: dict[str, Name] = {}
        for statement in tree.body:
            if isinstance(statement, ast.ImportFrom):
                source = _absolute(statement, self.package)
                passed_on |= {alias.asname or alias.name: (source, alias.name) for alias in statement.names}
        return code, tuple(_imports(tree.body, self.package)), passed_on

    @property
    def code(self) -> str:
        """A hash of what the file does: comments, docstrings and layout do not count."""
        return self._read[0]

    @property
    def imports(self) -> tuple[Name, ...]:
        """What its import statements name. Those for the type checker alone do not count."""
        return self._read[1]

    @property
    def passed_on(self) -> dict[str, Name]:
        """Name → where it comes from, for names that the file's own top level imports."""
        return self._read[2]


class CodeGraph:
    """The modules of the package in a folder."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._modules: dict[str, Module] = {}
        self._files: dict[str, str] = {}
        self._used: dict[tuple[frozenset[str], frozenset[str]], frozenset[str]] = {}
        for path in sorted(root.rglob("*.py")):
            parts = (root.name, *path.relative_to(root).with_suffix("").parts)
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            package = name if is_package else name.rpartition(".")[0]
            self._modules[name] = Module(path, package)
            self._files[name] = path.relative_to(root).as_posix()

    def modules(self) -> list[str]:
        """The names of all modules, sorted."""
        return sorted(self._modules)

    def file_of(self, module: str) -> str:
        """Where a module stands: keel.rl.loop → rl/loop.py."""
        return self._files[module]

    def used_by(self, roots: Collection[str], but: Collection[str] = ()) -> set[str]:
        """The modules called `roots` and all that they import, directly or not. but: modules that are passed
        over, with what only they import. Found once for the same, since files are read once."""
        asked = frozenset(roots), frozenset(but)
        if asked not in self._used:
            self._used[asked] = frozenset(self._found(roots, but))
        return set(self._used[asked])

    def _found(self, roots: Collection[str], but: Collection[str]) -> set[str]:
        used: set[str] = set()
        waiting = [module for module in roots if module in self._modules]
        while waiting:
            module = waiting.pop()
            if module not in used and module not in but:
                used.add(module)
                waiting += self._named(self._modules[module].imports)
        return used

    def used_by_file(self, path: Path, but: Collection[str] = ()) -> set[str]:
        """The modules that a file outside the package imports, directly or not."""
        return self.used_by(self._named(Module(path, "").imports), but)

    def prints(self, modules: Collection[str]) -> dict[str, str]:
        """File → hash of its code, for each of the modules."""
        found = {self.file_of(module): self._modules[module].code for module in sorted(modules)}
        _keep()
        return found

    def _named(self, imports: Collection[Name]) -> list[str]:
        found = [self._defining(*name) for name in imports]
        return [module for module in found if module is not None]

    def _defining(self, module: str, name: str | None) -> str | None:
        """The module that has what an import names; None for others' code and for the package's root."""
        if name is not None and f"{module}.{name}" in self._modules:
            return f"{module}.{name}"
        if module not in self._modules or module == self._root.name:
            return None  # the root holds the version and the front door, which nothing below it calls
        own = self._modules[module]
        if name is not None and own.path.name == "__init__.py" and name in own.passed_on:
            return self._defining(*own.passed_on[name])
        return module


@lru_cache(maxsize=1)
def of_keel() -> CodeGraph:
    """The graph of this installation, read once a process."""
    return CodeGraph(Path(keel.__file__).parent)


def _absolute(statement: ast.ImportFrom, package: str) -> str:
    """The module that a `from … import` names, its dots written out."""
    if not statement.level:
        return statement.module or ""
    parts = package.split(".")
    base = parts[: len(parts) - statement.level + 1]
    return ".".join([*base, *([statement.module] if statement.module else [])])


def _imports(statements: Sequence[ast.AST], package: str) -> Iterator[Name]:
    """What import statements among these and inside them name; expressions hold none."""
    for node in statements:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield _absolute(node, package), alias.name
        skipped = "body" if isinstance(node, ast.If) and _is_type_checking(node.test) else None
        for field in _BODIES:
            inside = getattr(node, field, None)
            if field != skipped and isinstance(inside, list):
                yield from _imports(inside, package)


def _is_type_checking(test: ast.expr) -> bool:
    return getattr(test, "id", getattr(test, "attr", None)) == "TYPE_CHECKING"


def _write(node: object, parts: list[str]) -> None:
    """A syntax tree as words, the same in every version of Python: fields that are empty are left out."""
    if isinstance(node, ast.AST):
        parts.append(type(node).__name__)
        for field in node._fields:
            value = getattr(node, field, None)
            if field == "body" and _has_docstring(node):
                value = value[1:]  # pyright: ignore[reportOptionalSubscript]
            if value is not None and value != [] and field not in ("ctx", "kind", "type_comment"):
                parts.append(field)
                _write(value, parts)
    elif isinstance(node, list):
        parts.append(f"[{len(node)}")
        for item in node:
            _write(item, parts)
    else:
        parts.append(repr(node))


def _has_docstring(node: ast.AST) -> bool:
    if (
        not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        or not node.body
    ):
        return False
    first = node.body[0]
    return (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    )


# ---------------------------------------------------------------- what is kept between processes

_new: set[str] = set()  # keys of what this process has read


@lru_cache(maxsize=1)
def _kept() -> dict[str, Any]:
    """By the hash of a file's content what `Module._read` makes of it, as lists."""
    kept = user_cache.read(KEPT)
    files = kept.get("files")
    return files if kept.get("reader") == _reader() and isinstance(files, dict) else {}


@lru_cache(maxsize=1)
def _reader() -> str:
    """What the entries depend on besides the files: this one, and Python's grammar."""
    own = Path(__file__).read_bytes()
    return f"{sys.version_info[0]}.{sys.version_info[1]} {hashlib.sha256(own).hexdigest()}"


def _keep() -> None:
    """Write what is new; where the cache has become large, that alone."""
    if not _new:
        return
    kept = _kept()
    files = kept if len(kept) <= MOST_KEPT else {key: kept[key] for key in _new}
    user_cache.write(KEPT, {"reader": _reader(), "files": files})
    _new.clear()


def _name(name: Any) -> str | None:
    """What is taken from a module; TypeError for what is no name."""
    if name is not None and not isinstance(name, str):
        raise TypeError("no name")
    return name


def _as_read(entry: Any) -> tuple[str, tuple[Name, ...], dict[str, Name]] | None:
    """An entry of the cache as `Module._read` gives it; None for what is none."""
    try:
        code, imports, passed_on = entry
        named = tuple((str(module), _name(name)) for module, name in imports)
        passed = {str(alias): (str(source), _name(name)) for alias, (source, name) in passed_on.items()}
    except (TypeError, ValueError, AttributeError):
        return None
    return str(code), named, passed
