"""What keel needs is declared, tested in a known version, and looked for by `keel doctor`."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from keel.cli.doctor import NEEDED

ROOT = Path(__file__).parents[1]
DISTRIBUTIONS = {  # where the module has another name
    "yaml": "pyyaml",
    "pydantic_core": "pydantic",
    "markdown_it": "markdown-it-py",
    "mdit_py_plugins": "mdit-py-plugins",
}
ROOMS = {"votes": "label", "feedback": "label", "dashboard": "dashboard"}  # rooms that need an extra


def _declared(name: str = "dependencies") -> set[str]:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(rf"^{name} = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)
    assert listed
    return set(re.findall(r'"([\w-]+)[<>=]', listed[1]))


def _needed(node: ast.AST) -> Iterator[ast.AST]:
    """The node and all below it, but for what does without a library that is not there."""
    if isinstance(node, ast.Try) and any(
        missing in ast.dump(handler)
        for handler in node.handlers
        for missing in ("ImportError", "ModuleNotFoundError")
    ):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _needed(child)


def _imported(paths: Iterable[Path]) -> set[str]:
    """The distributions that these files import, the standard library and keel aside."""
    nodes = [node for path in paths for node in _needed(ast.parse(path.read_text(encoding="utf-8")))]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    modules = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names - {"keel"}
    return {DISTRIBUTIONS.get(name, name) for name in modules}


def test_every_library_that_is_imported_is_declared():
    package = ROOT / "src" / "keel"
    files = [path for path in package.rglob("*.py") if path.relative_to(package).parts[0] not in ROOMS]
    imported = _imported(files)
    assert {"torch", "pyyaml"} <= imported
    assert imported - _declared() == set()


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_with_an_extra_imports_no_more_than_that(room):
    imported = _imported((ROOT / "src" / "keel" / room).rglob("*.py"))
    assert imported & _declared(ROOMS[room])
    assert imported - _declared() - _declared(ROOMS[room]) == set()


def test_doctor_looks_for_what_is_declared():
    assert set(NEEDED) == _declared()


def test_what_is_declared_is_tested_in_a_known_version():
    tested = set(
        re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert _declared() - {name.lower() for name in tested} == set()
