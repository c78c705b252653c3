"""A function that a config names: found, imported, its signature read. Light: a process of its own imports
this module and nothing else of keel but errors and plug-ins."""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from keel import plugins
from keel.errors import UsageError
from keel.rewards.trainer import EXTRAS

# What code may raise that ends no interpreter: an exit, an interrupt of its own, a cancelled task.
ANYTHING = (Exception, SystemExit, KeyboardInterrupt, GeneratorExit)


@dataclass(frozen=True, slots=True)
class Signature:
    """Which arguments a function takes by name."""

    names: tuple[str, ...]
    required: tuple[str, ...]
    everything: bool  # it has **kwargs, or is written in C without a signature
    by_place: bool  # it insists on an argument that cannot be given by name

    @staticmethod
    def of(function: Callable[..., Any]) -> Signature:
        """The signature of a function."""
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):  # written in C
            return Signature((), (), True, False)
        by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        return Signature(
            tuple(p.name for p in by_name),
            tuple(p.name for p in by_name if p.default is p.empty),
            any(p.kind is p.VAR_KEYWORD for p in parameters),
            any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in parameters),
        )

    def extras(self) -> tuple[str, ...]:
        """What it takes of `trainer.EXTRAS`: what it names. **kwargs hold columns alone."""
        return tuple(name for name in EXTRAS if name in self.names)

    def accepted(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that it takes. UsageError, with the reward's name, where it insists on another."""
        if missing := [key for key in self.required if key not in arguments and key not in EXTRAS]:
            raise UsageError(
                f"reward {name!r} asks for {missing[0]!r}, and the data have no such column (a function is "
                f"given {', '.join(sorted(arguments))})"
            )
        if self.by_place:
            raise UsageError(f"reward {name!r} takes arguments by place only; they are given by name")
        kept = arguments if self.everything else [key for key in arguments if key in self.names]
        return {key: arguments[key] for key in kept}


def load(name: str, where: str, *, classes: bool = False) -> Callable[..., Any]:
    """The function (classes: or class) that `name` stands for: "module.function", "module:function" or
    "path/to/file.py:function".

    where: the setting that names it, for messages. While it is imported the current directory (and a file's
    own folder) is on sys.path. UsageError if the module cannot be imported, or has no such name, or that is
    no function.
    """
    module_name, attribute = _parts(name, where)
    try:
        module = _from_file(Path(module_name)) if module_name.endswith(".py") else _from_path(module_name)
    except ANYTHING as error:  # a user's module may raise anything
        raise UsageError(
            f"{where}: {module_name} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, attribute, None)
    if function is None:
        raise _no_function(where, module_name, attribute, list(vars(module)))
    if not callable(function) or (isinstance(function, type) and not classes):
        wanted = "class" if classes else "function"
        raise UsageError(f"{where}: {name} is a {kind(function)}, not a {wanted}")
    return function


def of_package(name: str, where: str) -> Callable[..., Any]:
    """The function that an installed package adds as a reward of this name, by an entry point of
    `keel.rewards`.

    where: the setting that names it, for messages. UsageError for a name that nobody adds or several packages
    add, a package that cannot be imported, and for what is no function.
    """
    try:
        added = plugins.load("keel.rewards", name)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    except ANYTHING as error:
        raise UsageError(f"{where}: {name!r} cannot be imported: {type(error).__name__}: {error}") from None
    if not callable(added) or isinstance(added, type):
        raise UsageError(f"{where}: {name!r} of another package is a {kind(added)}, not a function")
    return added


def look(name: str, where: str) -> Path | None:
    """The file of a function, found and read, but not run; None for one that is not written in Python.

    UsageError where there is no such module, it is no Python, or nothing in it binds that name.
    """
    module_name, attribute = _parts(name, where)
    path = source_file(name)
    if path is None:
        if module_name.endswith(".py"):
            problem = "FileNotFoundError: there is no such file"
        elif _spec(module_name) is None:
            problem = f"ModuleNotFoundError: No module named {module_name!r}"
        else:
            return None
        raise UsageError(f"{where}: {module_name} cannot be imported: {problem}")
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise UsageError(f"{where}: {module_name} cannot be imported: {problem}") from None
    bound = list(_bound(tree.body))
    if attribute not in bound and "*" not in bound and "__getattr__" not in bound:
        raise _no_function(where, module_name, attribute, bound)
    return path


def source_print(name: str) -> str:
    """A hash of the file that `name`'s function is written in ("" where there is none), and of the files of
    the project that it imports: another text, another reward. Nothing is imported."""
    path = source_file(name)
    if path is None:
        return ""
    digest = hashlib.sha256(path.read_bytes())
    for label, file in sorted(project_files(path).items()):
        digest.update(f"\0{label}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def project_files(path: Path) -> dict[str, Path]:
    """Module → file, of what a file imports, directly or not, from its own folder or the current one (as they
    are on sys.path while it is loaded), and from the package that it stands in. Read from the source; what is
    imported by a name that is computed is not found."""
    package, top = _package_of(path)
    roots = [path.parent, Path.cwd(), top]
    found: dict[str, Path] = {}
    waiting = [(path, package)]
    while waiting:
        file, inside = waiting.pop()
        for module in _imported(file, inside):
            for name, place in _files_of(module, roots):
                if name not in found and place.resolve() != path.resolve():
                    found[name] = place
                    waiting.append((place, name if place.name == "__init__.py" else name.rpartition(".")[0]))
    return found


def _package_of(path: Path) -> tuple[str, Path]:
    """The package that a file stands in ("" for none), and the folder that its top package lies in."""
    names: list[str] = []
    folder = path.parent
    while (folder / "__init__.py").is_file():
        names.insert(0, folder.name)
        folder = folder.parent
    return ".".join(names), folder


def _imported(file: Path, package: str) -> Iterator[str]:
    """The modules that a file's import statements may name: of `from a import b` both a and a.b."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _is_installed(file: Path) -> bool:
    place = file.resolve()
    library = Path(sysconfig.get_path("stdlib")).resolve()
    return bool({"site-packages", "dist-packages"} & set(place.parts)) or library in place.parents


def _files_of(module: str, roots: Iterable[Path]) -> Iterator[tuple[str, Path]]:
    """The file of a module and those of the packages around it, under the first root that has it; none of
    what is installed."""
    parts = module.split(".")
    if not all(part.isidentifier() for part in parts):
        return
    for root in roots:
        place = root.joinpath(*parts)
        file = next((f for f in (place / "__init__.py", place.with_suffix(".py")) if f.is_file()), None)
        if file is not None and not _is_installed(file):
            for depth in range(1, len(parts)):
                around = root.joinpath(*parts[:depth], "__init__.py")
                if around.is_file():
                    yield ".".join(parts[:depth]), around
            yield module, file
            return


def source_file(name: str) -> Path | None:
    """The file that a function is written in; None where there is none. Nothing is imported."""
    module = _parts(name, "")[0]
    if module.endswith(".py"):
        path = Path(module).expanduser()
    else:
        spec = _spec(module)
        path = Path(spec.origin) if spec and spec.origin else None
    return path if path and path.is_file() and path.suffix == ".py" else None


def _spec(module: str) -> Any:
    """Where a module lies, found without importing the packages around it."""
    if module in sys.builtin_module_names:
        return importlib.util.find_spec(module)
    place: Any = None
    spec: Any = None
    with on_path(Path.cwd()):
        for depth in range(len(parts := module.split("."))):
            spec = PathFinder.find_spec(".".join(parts[: depth + 1]), place)
            if spec is None:
                return None
            place = spec.submodule_search_locations
            if place is None and depth + 1 < len(parts):
                return None
    return spec


def _parts(name: str, where: str) -> tuple[str, str]:
    """(module or file, name in it)."""
    module_name, separator, attribute = name.rpartition(":")
    if not separator:
        module_name, _, attribute = name.rpartition(".")
    if where and not separator and attribute == "py":
        raise UsageError(f"{where}: {name!r} is a file: write which function of it, {name}:FUNCTION")
    if where and (not module_name or not attribute):
        raise UsageError(f"{where}: {name!r} must be module.function or path/to/file.py:function")
    return module_name, attribute


def _no_function(where: str, module: str, attribute: str, names: list[str]) -> UsageError:
    nearest = difflib.get_close_matches(attribute, [n for n in names if not n.startswith("_")], n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return UsageError(f"{where}: {module} has no function {attribute!r}{hint}")


def _bound(body: list[Any]) -> Iterator[str]:
    """Names that statements of a module bind; "*" for those of `from … import *`."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
        for child in ast.walk(node):
            if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                yield child.id
        for field in ("body", "orelse", "finalbody", "handlers"):
            inner = getattr(node, field, [])
            yield from _bound(inner if isinstance(inner, list) else [])


def _from_path(module: str) -> ModuleType:
    with on_path(Path.cwd()):
        return importlib.import_module(module)


def _from_file(path: Path) -> ModuleType:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    # a name of its own, so that two files called rewards.py do not take each other's place
    module_name = f"keel_reward_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None  # a path that ends in .py always has one
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look a class's module up here
    try:
        with on_path(path.parent), on_path(Path.cwd()):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


@contextmanager
def on_path(folder: Path) -> Iterator[None]:
    """A folder first on sys.path for as long as it lasts."""
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def kind(value: object) -> str:
    """What a value is, in a word."""
    if isinstance(value, type):
        return "class"
    return "module" if isinstance(value, ModuleType) else type(value).__name__
