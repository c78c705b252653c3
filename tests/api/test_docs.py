"""docs/python.md: its examples run, in order, and it names every public name."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

import keel

PAGE = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")


def test_the_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "docs/python.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "judge (evaluate) ← sft, grpo" in printed
    assert "ppo.lerning: unknown key" in printed


def test_every_public_name_is_on_the_page() -> None:
    for name in keel.__all__:
        assert name.startswith("__") or re.search(rf"\b{name}\b", PAGE), name


def test_the_examples_of_the_docstrings_run() -> None:
    folder = Path(keel.__file__).parent / "api"
    done = [
        doctest.testmod(importlib.import_module(f"keel.api.{path.stem}"))
        for path in folder.glob("*.py")
        if path.stem != "__init__"
    ]
    assert sum(found.attempted for found in done) >= 6
    assert sum(found.failed for found in done) == 0
