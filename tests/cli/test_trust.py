"""Code that a config brings: never run by a plan, by a run only where a person agrees."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import keel
from keel.cli import consent, main, sweep
from keel.config import parse, read
from keel.errors import UsageError
from keel.pipeline import trust


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path, data: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config whose reward leaves a file behind when it is imported."""
    monkeypatch.setenv("KEEL_STATE", str(tmp_path / "state"))
    folder = tmp_path / "theirs"
    folder.mkdir()
    source = "def f(completions, **_): return [1.0] * len(completions)\n"
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\n{source}")
    stage = {
        "kind": "evaluate", "models": [str(tiny_model)], "data": str(data.prompts),
        "reward": f"python:{folder}/mine.py:f", "sampling": {"max_new_tokens": 4},
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"name": "t", "threads": 1, "device": "cpu", "stages": {"judge": stage}}))
    return path


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_plan_runs_nothing_and_says_what_a_run_would(config: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main.app, ["plan", str(config), "--json"])
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "was_run").exists()
    assert json.loads(result.stdout)["stages"][0]["stage"] == "judge"
    assert "brings code of its own, which this plan has not run (--trust would)" in result.stderr
    assert f"judge: reward {config.parent}/mine.py:f" in result.stderr
    assert keel.plan_run(config).entries
    for command in (["schema"], ["doctor"], ["recipes"]):
        CliRunner().invoke(main.app, command)
    assert not (tmp_path / "was_run").exists()


def test_a_server_that_a_config_has_started_is_code_of_its_own() -> None:
    def lines(**rollout: Any) -> list[str]:
        stage = {"kind": "grpo", "model": "m", "data": "d", "reward": "r", "samples_per_prompt": 2}
        stage["rollout"] = {"engine": "vllm", **rollout}
        return trust.code_of(parse({"name": "x", "stages": {"s": stage}}))

    assert lines() == []
    assert lines(address="http://localhost:1") == []
    assert lines(args=["--gpu-memory-utilization", "0.4", "--tensor-parallel-size=2"]) == []
    assert lines(environment="theirs/env") == ["s: programs in theirs/env (rollout.environment)"]
    for args in (
        ["--tool-parser-plugin", "theirs.py"],
        ["--middleware=theirs.m"],
        ["--tool_parser_plugin=x"],
    ):
        assert len(lines(args=args)) == 1


def test_a_plan_of_a_trusted_folder_runs_it(config: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main.app, ["plan", str(config), "--trust"])
    assert "brings code" not in result.stderr
    assert (tmp_path / "was_run").exists()
    (tmp_path / "was_run").unlink()
    CliRunner().invoke(main.app, ["plan", str(config)])  # once a folder
    assert (tmp_path / "was_run").exists()
    other = config.with_name("other.yaml")
    other.write_text(config.read_text())
    assert trust.is_trusted(other)
    (tmp_path / "elsewhere").mkdir()
    assert not trust.is_trusted(tmp_path / "elsewhere" / "config.yaml")


def test_a_script_that_runs_a_config_agrees(config: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main.app, ["run", str(config), "--runs", str(tmp_path / "runs")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "was_run").exists()
    assert f"{config} brings code of its own" in result.stderr
    assert not trust.is_trusted(config)


def test_a_sweep_says_what_its_points_run(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(self: Any) -> None:
        raise UsageError("far enough")

    monkeypatch.setattr(sweep.Sweep, "run", stopped)
    result = CliRunner().invoke(main.app, ["sweep", str(config), "--seeds", "0,1", "--runs", str(tmp_path)])
    assert str(result.exception) == "far enough"
    assert f"judge: reward {config.parent}/mine.py:f" in result.stderr
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    ("answer", "runs"), [("y\n", True), ("YES\n", True), ("\n", False), ("n\n", False), ("", False)]
)
def test_on_a_terminal_a_person_is_asked_once_a_folder(
    config: Path, monkeypatch: pytest.MonkeyPatch, answer: str, runs: bool
) -> None:
    shown = Terminal()
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    monkeypatch.setattr("sys.stderr", shown)
    settings = read(config)
    if not runs:
        with pytest.raises(UsageError, match="nothing was run"):
            consent.to_run(config, settings, given=False)
        assert not trust.is_trusted(config)
        return
    consent.to_run(config, settings, given=False)
    assert "[y/N]" in shown.getvalue()
    shown.truncate(0)
    consent.to_run(config, settings, given=False)
    assert "[y/N]" not in shown.getvalue()


def test_code_of_models_counts_and_a_config_without_code_asks_nobody(
    config: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = read(config, ["judge.trust_remote_code=true"])
    assert [line.partition(": ")[2].split(" ")[0] for line in trust.code_of(settings)] == ["reward", "Python"]
    monkeypatch.setattr("sys.stdin", Terminal(""))
    plain = read(config, ["judge.reward={kind: length, high: 9}"])
    consent.to_run(config, plain, given=False)
    assert consent.to_plan(config, plain, given=False)


@pytest.mark.parametrize("text", ["", "[]", '{"folders": 3}', "{", '{"folders": [1]}'])
def test_a_broken_list_of_folders_trusts_nobody_and_is_mended(
    config: Path, tmp_path: Path, text: str
) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "trusted.json").write_text(text)
    assert not trust.is_trusted(config)
    trust.remember(config)
    assert trust.is_trusted(config)


def test_where_the_list_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KEEL_STATE", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert trust.state_folder() == tmp_path / "keel"
    monkeypatch.delenv("XDG_STATE_HOME")
    assert trust.state_folder() == Path.home() / ".local" / "state" / "keel"
