"""What a command loads before it does anything: seconds of everybody's day."""

from __future__ import annotations

import ast
import gc
import subprocess
import sys
from contextlib import nullcontext
from importlib import import_module

import pytest
from transformers.utils.import_utils import create_import_structure_from_path

from keel import user_cache
from keel.cli import model_scan, startup
from keel.pipeline import code_graph
from keel.pipeline.code_graph import CodeGraph

HEAVY = ("torch", "transformers", "peft", "datasets", "pandas", "numpy", "pyarrow", "plotly", "rich.progress")


def _loaded(code: str) -> list[str]:
    """Which of the heavy libraries a process has loaded when it ends."""
    at_end = f"atexit.register(lambda: print(*(set({HEAVY!r}) & sys.modules.keys())))"
    script = f"import sys, atexit\n{at_end}\n{code}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()


@pytest.mark.parametrize("word", ["--help", "recipes"])
def test_help_and_a_list_of_recipes_load_no_heavy_library(word):
    code = f"sys.argv = ['keel', {word!r}]\nfrom keel.__main__ import main\nmain()"
    assert _loaded(code) == []


@pytest.mark.parametrize("arguments", [("run", "first.yaml", "sft.lrr=1"), ("plan", "nowhere.yaml")])
def test_a_config_that_cannot_be_read_is_an_error_before_anything_heavy_is_loaded(tmp_path, arguments):
    path = tmp_path / "first.yaml"
    path.write_text("name: x\nstages: {sft: {kind: sft, model: a/b, data: rows.jsonl}}")
    words = ["keel", *(str(path) if word == path.name else word for word in arguments)]
    code = "import os\nfrom keel.__main__ import main\ntry:\n    main()\nexcept SystemExit as ended:"
    assert _loaded(f"sys.argv = {words!r}\n{code}\n    assert ended.code == 2") == []


def test_a_name_for_later_is_the_module_s_own_once_it_is_called(tmp_path, monkeypatch):
    (tmp_path / "laterpkg").mkdir()
    (tmp_path / "laterpkg" / "__init__.py").write_text("")
    (tmp_path / "laterpkg" / "part.py").write_text("def twice(x, *, more=0):\n    return 2 * x + more\n")
    monkeypatch.syspath_prepend(tmp_path)
    with startup._later("laterpkg.part", "twice"):
        from laterpkg.part import twice
    assert "laterpkg.part" not in sys.modules
    assert twice(3, more=1) == 7
    with startup._later("laterpkg.part", "twice"):  # it is there now: nobody gets another
        assert import_module("laterpkg.part").twice is not twice
    with startup._later("nowherepkg.part", "twice"), pytest.raises(ModuleNotFoundError):
        import_module("nowherepkg.part")


def test_whoever_else_needs_the_module_has_it_whole(tmp_path, monkeypatch):
    """A library that is installed beside transformers, and imported by it."""
    for name, text in {
        "__init__": "",
        "part/__init__": "from eagerpkg.part.below import minimize\ndef twice(x):\n    return 2 * x\n",
        "part/below": "def minimize():\n    return 'least'\n",
    }.items():
        path = tmp_path / "eagerpkg" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with startup._later("eagerpkg.part", "twice"):
        from eagerpkg.part import twice
        from eagerpkg.part.below import minimize as least

        part = sys.modules["eagerpkg.part"]
        assert not hasattr(part, "__file__")  # so far nobody needed it
        from eagerpkg.part import minimize

        with pytest.raises(ImportError, match="nothing"):
            from eagerpkg.part import nothing  # noqa: F401
    assert minimize is least
    assert sys.modules["eagerpkg.part"] is not part
    assert part.twice is twice
    assert twice(4) == 8


def test_files_of_models_are_read_once_until_one_changes(tmp_path, monkeypatch):
    """What is kept is what transformers' own function finds, down to folders in folders."""
    monkeypatch.setenv("KEEL_CACHE", str(tmp_path / "cache"))
    models, code = tmp_path / "models", tmp_path / "code.py"
    (models / "one" / "deep").mkdir(parents=True)
    code.write_text("")
    (models / "__init__.py").write_text("")
    (models / "auto.py").write_text('__all__ = ["Auto"]\n')
    (models / "one" / "configuration_one.py").write_text('__all__ = ["Config"]\n')
    (models / "one" / "modeling_one.py").write_text('__all__ = [\n    "One",\n    "Two",\n]\n')
    (models / "one" / "tokenization_one_fast.py").write_text('__all__ = ["Fast"]\n')
    (models / "one" / "deep" / "configuration_deep.py").write_text('__all__ = ["Deep"]\n')
    own = create_import_structure_from_path.__wrapped__
    seen: list[object] = []

    def in_a_new_process() -> object:
        create_import_structure_from_path.cache_clear()
        read = model_scan.reader(lambda place: (seen.append(place), own(place))[1], models, [code])
        assert read(models) is read(
            str(models / "__init__.py")
        )  # as `transformers` and `transformers.models` ask
        return read(models)

    first = in_a_new_process()
    assert first == own(models)
    assert {"One", "Two"} in [
        names for files in first["one"].values() if type(files) is dict for names in files.values()
    ]
    kept = in_a_new_process()
    assert kept == first
    assert [*kept] == [*first]  # of two files with one name transformers takes the last
    assert [*kept["one"]] == [*first["one"]]
    assert seen == [models]
    (models / "one" / "modeling_one.py").write_text('__all__ = ["Three"]\n')
    changed = in_a_new_process()
    assert changed == own(models) != first
    code.write_text("# what reads them is another")
    assert in_a_new_process() == changed
    assert len(seen) == 3
    for kept in (
        "{",
        '{"stamp": 1}',
        (tmp_path / "cache" / model_scan.FILE).read_text().replace('"own"', '"not"'),
    ):
        (tmp_path / "cache" / model_scan.FILE).write_text(kept)
        assert in_a_new_process() == changed
    assert len(seen) == 6
    read = model_scan.reader(lambda place: (seen.append(place), own(place))[1], models, [code])
    assert read(models / "one") == own(models / "one")  # of one model nothing is kept
    assert seen[-1] == models / "one"


def test_in_a_process_that_is_not_its_own_garbage_is_left_alone():
    before = gc.get_freeze_count()
    with startup.importing():
        assert gc.isenabled()
    assert gc.get_freeze_count() == before


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


@pytest.mark.parametrize("fault", [OSError("full"), KeyboardInterrupt()])
def test_a_cache_file_that_is_not_written_to_its_end_leaves_nothing(tmp_path, monkeypatch, fault):
    monkeypatch.setenv("KEEL_CACHE", str(tmp_path))

    def fails(value, handle):
        raise fault

    monkeypatch.setattr(user_cache.json, "dump", fails)
    with pytest.raises(KeyboardInterrupt) if isinstance(fault, KeyboardInterrupt) else nullcontext():
        assert user_cache.write("x.json", {}) is None
    assert list(tmp_path.iterdir()) == []
