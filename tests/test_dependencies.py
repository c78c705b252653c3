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
DISTRIBUTIONS = {"yaml": "pyyaml", "pydantic_core": "pydantic"}  # where the module has another name


def _declared() -> set[str]:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^dependencies = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)
    assert listed
    return set(re.findall(r'"([\w-]+)[<>=]', listed[1]))


def _needed(node: ast.AST) -> Iterator[ast.AST]:
    """The node and all below it, but for what does without a library that is not there."""
    if isinstance(node, ast.Try) and any("ImportError" in ast.dump(handler) for handler in node.handlers):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _needed(child)


# an extra → the files that are not read without it; their commands say what is missing
BEHIND_EXTRAS = {"dashboard": ("keel/dashboard/*.py", "keel/cli/dashboard.py")}


def _extra(name: str) -> set[str]:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(rf"^{name} = \[(.*?)\]$", project, re.DOTALL | re.MULTILINE)
    assert listed
    return set(re.findall(r'"([\w-]+)[<>=]', listed[1]))


@pytest.mark.parametrize("extra", BEHIND_EXTRAS)
def test_a_room_behind_an_extra_imports_what_the_extra_declares(extra):
    paths = [path for pattern in BEHIND_EXTRAS[extra] for path in (ROOT / "src").glob(pattern)]
    modules = _imported(paths)
    assert modules & _extra(extra)
    assert {DISTRIBUTIONS.get(name, name) for name in modules} - _declared() - _extra(extra) == set()


def test_every_library_that_is_imported_is_declared():
    behind = {
        path for patterns in BEHIND_EXTRAS.values() for p in patterns for path in (ROOT / "src").glob(p)
    }
    modules = _imported(path for path in (ROOT / "src").rglob("*.py") if path not in behind)
    assert {"torch", "yaml"} <= modules
    assert {DISTRIBUTIONS.get(name, name) for name in modules} - _declared() == set()


def _imported(paths: Iterable[Path]) -> set[str]:
    """Libraries that files import, the standard one and keel aside."""
    parsed = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    nodes = [node for tree in parsed for node in _needed(tree)]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in imported} - sys.stdlib_module_names - {"keel"}


def test_doctor_looks_for_what_is_declared():
    assert set(NEEDED) == _declared()


def test_what_is_declared_is_tested_in_a_known_version():
    tested = set(
        re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert _declared() - {name.lower() for name in tested} == set()
