"""What the pages say of the code is so: the files and functions they name are there, the rooms are described,
and a newcomer finds what the notes promise in the files they name.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "keel"
PAGES = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PATH = re.compile(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|md|toml|yaml))`")
OF_USERS = {"mine.py", "FILE.py", "config.yaml"}  # files of the reader's own and of a run
GONE = {"stages/ppo.py", "config/policy.py"}  # files of the version before, which the notes compare with


def _text(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def _places(name: str, page: Path) -> Iterator[Path]:
    """Where a path on a page may lead: from the repository, from the package, from the page."""
    yield from (ROOT / name, PACKAGE / name, page.parent / name, ROOT / "docs" / name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_that_a_page_names_are_there(page):
    named = set(PATH.findall(_text(page))) - OF_USERS - GONE
    assert not {name for name in named if not any(path.exists() for path in _places(name, page))}


def _resolved(name: str) -> Any:
    """What a dotted name of docs/papers.md stands for, below `keel.algorithms` or `keel`; None: nothing."""
    for base in ("keel.algorithms", "keel"):
        parts = f"{base}.{name}".split(".")
        for cut in range(len(parts), 1, -1):  # a module itself, too
            try:
                value = importlib.import_module(".".join(parts[:cut]))
                for part in parts[cut:]:
                    value = getattr(value, part)
            except (ModuleNotFoundError, AttributeError):
                continue
            return value
    return None


def test_the_functions_that_the_papers_page_names_are_there():
    page = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("| ")]
    cells = [row[3] for row in rows if len(row) == 5] + [row[0] for row in rows if len(row) == 4]
    names = {name for cell in cells for name in re.findall(r"`([a-z_]+(?:\.[A-Za-z_]+)+)`", cell)}
    assert len(names) > 30
    assert not {name for name in names if _resolved(name) is None}


def test_every_room_is_described_in_the_order_of_the_contract():
    page = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if re.match(r"\| `[a-z_`, ]+` \|", line)]
    described = [room for row in rows for room in re.findall(r"`([a-z_]+)`", row.split("|")[1])]
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms - set(described) == set()
    assert {f"{room}/__init__.py" for room in set(described) - rooms} == set()
    modules = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert not {name for name in modules if f"`{name}`" not in page}
    contract = (
        (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("layers = [")[2].partition("\n]")[0]
    )
    layers = re.findall(r'"(keel[^"]*)"', contract)
    heights = {}
    for height, layer in enumerate(layers):
        for module in re.split(r" [|:] ", layer):
            heights.setdefault(module.split(".")[1], height)
    order = [heights[room] for room in described if room in heights]
    assert order == sorted(order)


# ---------------------------------------------------------------- the newcomer's five jobs

LIMITS = {"policy loss": 3, "reward": 1, "engine": 2, "stage kind": 2, "where a metric comes from": 1}
HOLDS = {  # file → what a newcomer looks for in it
    "algorithms/policy.py": r"^LOSSES\b.*clipped",
    "rl/ppo.py": r"^    def loss\(",
    "rl/algorithm.py": r"^class Surrogate",
    "rewards/rules.py": r"^def repetition\(.*-> Reward:",
    "rollout/protocol.py": r"^class Engine\(Protocol\)",
    "rollout/scripted_engine.py": r"^class ScriptedEngine",
    "pipeline/stage_kinds.py": r"^class StageKind\b",
    "config/stage.py": r"^class Stage\(Settings\)",
    "docs/metrics.md": r"^\| `objective/kl` \|",
}


def _jobs() -> dict[str, tuple[int, int, list[str]]]:
    """Job → (files before, files after, the files), from the table of docs/notes.md."""
    table = (ROOT / "docs" / "notes.md").read_text(encoding="utf-8").partition("## What a newcomer opens")[2]
    rows = re.findall(
        r"^\| ([a-z ]+) \| (\d+) \| (\d+) \| (.+) \|$", table.partition("\n## ")[0], re.MULTILINE
    )
    return {job: (int(old), int(new), re.findall(r"`([\w/]+\.\w+)`", files)) for job, old, new, files in rows}


@pytest.mark.parametrize("job", LIMITS)
def test_a_newcomer_opens_few_files(job):
    before, after, files = _jobs()[job]
    assert after == len(files) <= LIMITS[job]
    assert after < before
    for name in files:
        path = next(path for path in (PACKAGE / name, ROOT / name) if path.exists())
        assert re.search(HOLDS[name], path.read_text(encoding="utf-8"), re.MULTILINE), name
