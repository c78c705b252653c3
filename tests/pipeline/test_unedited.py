"""What is recorded of a stage is what it was made of: files that are edited while a run is at work."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from keel.config import parse
from keel.data import load as loading_data
from keel.errors import DataError, KeelError
from keel.pipeline import following
from keel.pipeline.pipeline import Pipeline
from keel.rewards import loading


@pytest.fixture
def files(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project: rows, and a reward that imports a module of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_bytes(data.demonstrations.read_bytes())
    (tmp_path / "prompts.jsonl").write_bytes(data.prompts.read_bytes())
    (tmp_path / "mine.py").write_text(
        "import words\ndef score(prompts, completions, **columns):\n    return [words.BEST] * len(prompts)\n"
    )
    (tmp_path / "words.py").write_text("BEST = 1.0\n")
    return tmp_path


@pytest.fixture
def config(files: Path, tiny_model: Path) -> dict[str, Any]:
    sft = {"kind": "sft", "model": str(tiny_model), "data": "rows.jsonl", "max_steps": 2, "batch_size": 2}
    grpo = {
        "kind": "grpo",
        "model": "sft",
        "reward": "python:mine.py:score",
        "data": "prompts.jsonl",
        "updates": 1,
        "batch_size": 4,
        "samples_per_prompt": 2,
        "sampling": {"max_new_tokens": 4},
    }
    return {"name": "tiny", "threads": 1, "device": "cpu", "stages": {"sft": sft, "grpo": grpo}}


def go(config: dict[str, Any], directory: Path, during: Callable[[], Any] = lambda: None) -> Pipeline:
    """Run it; `during` is called while the first stage trains."""

    def progress(stage: str, step: int, steps: int, metrics: Mapping[str, float]) -> None:
        if stage == "sft" and step == 1:
            during()

    pipeline = Pipeline(parse(config), directory, lambda line: None, progress)
    pipeline._report = lambda: None
    pipeline.run()
    return pipeline


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("words.py", "BEST = 2.0\n", "grpo: the code of its reward functions changed since this run began"),
        ("prompts.jsonl", '{"prompt": "the pig?"}\n' * 4, "prompts.jsonl was changed since it was read"),
    ],
)
def test_what_is_edited_while_an_earlier_stage_trains_ends_the_run_and_loses_nothing(
    config: dict[str, Any],
    files: Path,
    file: str,
    content: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(KeelError, match=message):
        go(config, files / "run", lambda: (files / file).write_text(content))
    done = files / "run" / "stages" / "sft" / "stage.json"
    before = done.stat().st_mtime_ns
    assert not (files / "run" / "stages" / "grpo").exists()
    worked: list[str] = []

    def work(stage: Any, run: Any) -> Any:
        worked.append(run.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(following, "run_stage", work)
    with pytest.raises(KeyboardInterrupt):
        go(config, files / "run")  # the same command goes on with what is there now
    assert worked == ["grpo"]
    assert done.stat().st_mtime_ns == before


def test_rows_that_a_running_stage_has_read_already_may_be_edited(
    config: dict[str, Any], files: Path
) -> None:
    """They are in memory; the record is of those, and the next run finds the edit."""
    del config["stages"]["grpo"]
    first = go(
        config,
        files / "run",
        lambda: (files / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n'),
    )
    recorded = json.loads((first.stage_directory("sft") / "fingerprint.json").read_text())["data"]
    assert recorded == first.parts("sft")["data"]
    assert not Pipeline(parse(config), files / "run", str).is_done("sft")


def test_a_file_that_changes_while_it_is_read_is_said(
    config: dict[str, Any], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = loading_data.load

    def edited(*arguments: Any) -> Any:
        found = read(*arguments)
        with (files / "rows.jsonl").open("a") as handle:
            handle.write('{"prompt": "a", "completion": "b"}\n')
        return found

    monkeypatch.setattr(loading_data, "load", edited)
    with pytest.raises(DataError, match=r"rows\.jsonl: it was changed while it was being read; start again"):
        go(config, files / "run")
    assert not (files / "run").exists()


def test_a_rewards_own_imports_are_part_of_it(files: Path) -> None:
    def printed() -> str:
        return loading.source_print("mine.py:score")

    (files / "words.py").write_text("from deep.inner import VALUE\nimport json, os\nBEST = VALUE\n")
    (files / "deep").mkdir()
    (files / "deep" / "__init__.py").write_text("")
    (files / "deep" / "inner.py").write_text("from . import other\nVALUE = other.X\n")
    (files / "deep" / "other.py").write_text("X = 1.0\n")
    (files / "aside.py").write_text("nobody imports this\n")
    assert set(loading.project_files(files / "mine.py")) == {"words", "deep", "deep.inner", "deep.other"}
    seen = {printed()}
    for file in ("mine.py", "words.py", "deep/__init__.py", "deep/inner.py", "deep/other.py"):
        with (files / file).open("a") as handle:
            handle.write("\nMORE = 1\n")
        assert printed() not in seen
        seen.add(printed())
    (files / "aside.py").write_text("changed\n")
    assert printed() in seen


def test_a_function_of_an_installed_package_brings_no_library_with_it() -> None:
    import json as library

    assert loading.project_files(Path(library.__file__)) == {}


def test_a_stream_that_is_edited_while_it_is_read_makes_no_done_stage(
    config: dict[str, Any], files: Path, data: Any
) -> None:
    (files / "text.jsonl").write_bytes(data.text.read_bytes())
    stage = {k: v for k, v in config["stages"]["sft"].items() if k != "data"}
    config["stages"] = {
        "sft": {**stage, "kind": "pretrain", "data": "text.jsonl", "stream": True, "holdout": 0}
    }
    with pytest.raises(KeelError, match="its data changed since this run began"):
        go(config, files / "run", lambda: (files / "text.jsonl").open("a").write('{"text": "more"}\n'))
    assert not (files / "run" / "stages" / "sft" / "stage.json").exists()
