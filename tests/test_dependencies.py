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
    "mlflow": "mlflow-skinny",
    "reasoning_gym": "reasoning-gym",
}
ROOMS = {  # rooms, and files of commands, that need extras
    "votes": ("label",),
    "feedback": ("label",),
    "dashboard": ("dashboard",),
    "cli/dashboard.py": ("dashboard",),
    "distributed/on_ray.py": ("ray",),
    "distributed/ray_cluster.py": ("ray",),
    "rollout/vllm/on_ray.py": ("ray",),
    "worlds/gym_process.py": ("gym",),
    "trackers": ("trackio", "wandb", "tensorboard", "mlflow"),
}


def _declared(name: str = "dependencies") -> set[str]:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(rf"^{name} = \[(.*?)\]$", project, re.DOTALL | re.MULTILINE)
    assert listed
    return set(re.findall(r'"([\w-]+)(?:\[[\w,-]+\])?[<>=]', listed[1]))


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


def _files(room: str) -> list[Path]:
    place = ROOT / "src" / "keel" / room
    return [place] if place.suffix else [*place.rglob("*.py")]


def test_every_library_that_is_imported_is_declared():
    behind = {path for room in ROOMS for path in _files(room)}
    imported = _imported(path for path in _files("") if path not in behind)
    assert {"torch", "pyyaml"} <= imported
    assert imported - _declared() == set()


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_with_an_extra_imports_no_more_than_that(room):
    imported = _imported(_files(room))
    extras = set[str]().union(*map(_declared, ROOMS[room]))
    assert imported & extras
    assert imported - _declared() - extras == set()


def test_doctor_looks_for_what_is_declared():
    assert set(NEEDED) == _declared()


def test_what_is_declared_is_tested_in_a_known_version():
    tested = set(
        re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert _declared() - {name.lower() for name in tested} == set()


def test_the_lock_has_hashes_and_the_tested_versions():
    """`make lock` makes it. torch, whose builds differ, is left to its own index."""
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    entries = re.findall(r"^([\w.-]+)==([\w.]+)(.*(?:\n    .*)*)", lock, re.MULTILINE)
    tested = re.findall(
        r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
    versions = {name.lower().replace("_", "-"): version for name, version in tested}
    assert (
        _declared()
        - {"torch"}
        - {name.replace("-", "_") for name, _, _ in entries}
        - {name for name, _, _ in entries}
        == set()
    )
    assert [name for name, version, _ in entries if versions.get(name, version) != version] == []
    assert [name for name, _, rest in entries if "--hash=sha256:" not in rest] == []
    assert "torch" not in {name for name, _, _ in entries}
