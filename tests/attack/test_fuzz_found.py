"""What fuzzing has found, read again: see `fuzz_readers.py`. Without atheris, and quick."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

_spec = importlib.util.spec_from_file_location("fuzz_readers", Path(__file__).with_name("fuzz_readers.py"))
assert _spec is not None
assert _spec.loader is not None
fuzz_readers: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fuzz_readers)

# name → target, input
FOUND: dict[str, tuple[str, bytes]] = {
    "a tag on nothing": ("config", b"name: a\nseed: !!int ''\n"),
    "a tag on another text": ("config", b"name: a\nstages: !!timestamp soon\n"),
    "a margin beyond all floats": (
        "data",
        b'\0\0{"prompt":"a","chosen":"b","rejected":"c","margin":1' + b"0" * 400 + b"}\n",
    ),
    "a config of a run in its short form": ("run", bytes([0]) + fuzz_readers.CONFIG.encode()),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_is_refused_or_read(name: str, tmp_path: Path) -> None:
    target, content = FOUND[name]
    fuzz_readers.TARGETS[target](content, tmp_path)


@pytest.mark.attack
@pytest.mark.parametrize("target", fuzz_readers.TARGETS)
def test_good_inputs_pass(target: str, tmp_path: Path) -> None:
    """What fuzzing begins with; a target that refuses everything would find nothing."""
    for content in fuzz_readers.seeds(target):
        fuzz_readers.TARGETS[target](content, tmp_path)
