"""What a command loads before it does anything: seconds of everybody's day."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from keel import user_cache
from keel.pipeline import code_graph
from keel.pipeline.code_graph import CodeGraph

HEAVY = ("torch", "transformers", "peft", "datasets", "pandas", "numpy", "pyarrow", "plotly", "rich.progress")


def _loaded(code: str) -> list[str]:
    """Which of the heavy libraries a process has loaded when it ends."""
    at_end = f"atexit.register(lambda: print(*(set({HEAVY!r}) & sys.modules.keys())))"
    script = f"import sys, atexit\n{at_end}\n{code}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()


def test_help_loads_no_heavy_library():
    code = "sys.argv = ['keel', '--help']\nfrom keel.__main__ import main\nmain()"
    assert _loaded(code) == []


def test_reading_a_config_loads_no_heavy_library():
    """But of ppo and grpo: those name losses, which are looked at, and take torch."""
    stages = {
        "sft": {"kind": "sft", "model": "a/b", "data": "rows.jsonl"},
        "reward": {"kind": "reward", "model": "sft", "data": "pairs.parquet"},
        "dpo": {"kind": "dpo", "model": "sft", "data": {"source": "pairs.jsonl", "rows": 9}},
        "judge": {"kind": "evaluate", "models": ["sft"], "reward": "reward", "data": "prompts.jsonl"},
    }
    assert _loaded(f"from keel.config import parse\nparse({{'name': 'x', 'stages': {stages!r}}})") == []


# ---------------------------------------------------------------- keel's own code is read once


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of two modules, and a cache of its own, as each new process finds it."""
    monkeypatch.setenv("KEEL_CACHE", str(tmp_path / "cache"))
    for name, text in {"__init__": "", "a": "import keel.b", "b": "x = 1"}.items():
        (tmp_path / "keel").mkdir(exist_ok=True)
        (tmp_path / "keel" / f"{name}.py").write_text(text)
    yield tmp_path / "keel"
    code_graph._kept.cache_clear()


def _as_a_new_process(package):
    code_graph._kept.cache_clear()
    graph = CodeGraph(package)
    return graph.prints(graph.used_by(["keel.a"]))


def test_what_is_known_of_a_file_is_not_parsed_again(package, monkeypatch):
    first = _as_a_new_process(package)
    monkeypatch.setattr(ast, "parse", lambda text: pytest.fail("parsed again"))
    assert _as_a_new_process(package) == first
    assert set(first) == {"a.py", "b.py"}


def test_a_file_that_was_edited_is_read_again(package):
    first = _as_a_new_process(package)
    (package / "b.py").write_text("x = 2")
    second = _as_a_new_process(package)
    assert second["a.py"] == first["a.py"]
    assert second["b.py"] != first["b.py"]


@pytest.mark.parametrize(
    "spoil", ["", "[]", '{"reader": "older", "files": {}}', "broken", ["x"], ["x", [["keel", ["y"]]], {}]]
)
def test_a_cache_that_says_nothing_useful_changes_nothing(package, spoil):
    first = _as_a_new_process(package)
    if isinstance(spoil, list):
        kept = user_cache.read(code_graph.KEPT)
        user_cache.write(code_graph.KEPT, kept | {"files": dict.fromkeys(kept["files"], spoil)})
    else:
        (user_cache.folder() / code_graph.KEPT).write_text(spoil)
    assert _as_a_new_process(package) == first


def test_a_cache_folder_that_cannot_be_written_is_no_error(package, tmp_path, monkeypatch):
    first = _as_a_new_process(package)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KEEL_CACHE", str(tmp_path / "file" / "below"))
    assert _as_a_new_process(package) == first
    assert user_cache.write("x.json", {}) is None
