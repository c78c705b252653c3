"""A run's directory may come from anybody: nothing outside of it is read, and what keel has not written is
one line."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from keel import report
from keel.errors import DataError
from keel.report import compare

_spec = importlib.util.spec_from_file_location("fake_run", Path(__file__).with_name("fake_run.py"))
assert _spec is not None
assert _spec.loader is not None
fake_run: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake_run)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return fake_run.write_run(tmp_path / "run")


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a file of JSON or YAML."""
    yaml_ = path.suffix == ".yaml"
    value = change(yaml.safe_load(path.read_text()) if yaml_ else json.loads(path.read_text()))
    path.write_text(yaml.safe_dump(value) if yaml_ else json.dumps(value))


def stages(value: Any) -> Callable[[Any], Any]:
    return lambda whole: {**whole, "stages": value(whole["stages"]) if callable(value) else value}


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.yaml", stages(["sft"]), "`stages` is no mapping"),
        ("config.yaml", stages(lambda s: {**s, "../../outside": {"kind": "sft"}}), "is no stage's name"),
        ("config.yaml", stages(lambda s: {**s, "/etc": {"kind": "sft"}}), "is no stage's name"),
        ("config.yaml", stages(lambda s: {**s, 7: {"kind": "sft"}}), "is no stage's name"),
        ("config.yaml", stages(lambda s: {**s, "sft": "x"}), "is no mapping"),
        ("manifest.json", stages(3), "`stages` is no mapping"),
        ("manifest.json", lambda whole: [whole], "does not hold a JSON object"),
        ("stages/judge/result.json", lambda r: {**r, "models": "sft"}, "is no object of measures"),
        (
            "stages/judge/result.json",
            lambda r: {**r, "models": {"sft": [1]}},
            "is no object of measures",
        ),
    ],
)
def test_what_no_run_of_keel_writes_is_one_line(run: Path, file: str, change: Any, message: str) -> None:
    (run.parent / "outside").mkdir()
    (run.parent / "outside" / "stage.json").write_text('{"kind": "secret of somebody"}')
    edit(run / file, change)
    for show in (report.write, report.summary):
        with pytest.raises(DataError, match=message) as error:
            show(run)
        assert "\n" not in str(error.value)
        assert "secret" not in str(error.value)
    assert not (run / "report.html").exists()


def test_steps_that_are_none_are_named_by_their_line(run: Path) -> None:
    path = run / "stages" / "sft" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], '{"step": "<script>", "loss": 1}']) + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: `step` is no whole number"):
        report.write(run)


def test_compare_says_it_too(run: Path) -> None:
    edit(run / "stages" / "judge" / "result.json", lambda r: {**r, "models": {"sft": [1]}})
    with pytest.raises(DataError, match="is no object of measures"):
        compare.compare([run])
