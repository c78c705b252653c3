"""Types: how much of the package is typed, and that the public modules are held to pyright's strictest."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import keel

PACKAGE = Path(keel.__file__).parent
MOST = 0.05  # of all parameters may be bare


def _parameters(tree: ast.AST) -> Iterator[ast.arg]:
    """Every parameter of every function, self and cls left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            own = node.args
            named = [*own.posonlyargs, *own.args, *own.kwonlyargs]
            yield from (arg for arg in named if arg.arg not in ("self", "cls"))
            yield from (arg for arg in (own.vararg, own.kwarg) if arg is not None)


def _is_bare(parameter: ast.arg) -> bool:
    """Whether it says nothing: no annotation, or Any alone."""
    note = parameter.annotation
    return note is None or (isinstance(note, ast.Name) and note.id == "Any")


def test_a_bare_parameter_is_told_from_a_typed_one() -> None:
    tree = ast.parse("class A:\n def f(self, a, b: Any, c: int, *d: Any, e: 'dict[str, Any]', **g): ...")
    assert [arg.arg for arg in _parameters(tree) if _is_bare(arg)] == ["a", "b", "d", "g"]


def test_few_parameters_are_bare() -> None:
    bare: list[str] = []
    count = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        for parameter in _parameters(ast.parse(path.read_text(encoding="utf-8"))):
            count += 1
            if _is_bare(parameter):
                bare.append(f"{path.relative_to(PACKAGE)}:{parameter.lineno} {parameter.arg}")
    listed = "\n".join(bare)
    assert len(bare) < MOST * count, f"{len(bare)} of {count} parameters are bare:\n{listed}"


def test_the_public_modules_are_checked_strictly() -> None:
    modules = [
        PACKAGE / "__init__.py",
        *(path for path in (PACKAGE / "api").glob("*.py") if path.stem != "__init__"),
    ]
    assert len(modules) > 5
    for path in modules:
        assert path.read_text(encoding="utf-8").startswith("# pyright: strict\n"), path


def test_every_name_of_the_door_is_known_to_a_type_checker() -> None:
    """What is loaded lazily stands in the TYPE_CHECKING block, too, from the same module."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    shown = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert shown.keys() == {*keel.__all__} - {"__version__"}
    assert {name: module for name, module in shown.items() if name != "losses"} == keel._HOMES
