"""Checkpoints and logs: whole or not at all, and cut back to where they belong together."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from keel.errors import KeelError
from keel.models.machine_speed import Speed
from keel.models.phase_cost import PhaseCost
from keel.rundir.checkpoint import Checkpoint, discard, latest, save, write_json


def test_the_newest_checkpoint_comes_back_as_it_was_and_is_the_only_one_left(tmp_path: Path) -> None:
    tensors = {"model": {"w": torch.randn(3)}, "best": None}
    for step in (999_998, 999_999, 1_000_000):
        save(tmp_path, Checkpoint(step, tensors, {"coef": 0.1, "waited": 2}, {"metrics.jsonl": 17}))
        assert [path.name for path in tmp_path.iterdir()] == [f"step-{step}"]
    found = latest(tmp_path)
    assert found is not None
    assert (found.step, found.values, found.logs) == (
        1_000_000,
        {"coef": 0.1, "waited": 2},
        {"metrics.jsonl": 17},
    )
    assert torch.equal(found.tensors["model"]["w"], tensors["model"]["w"])
    assert found.tensors["best"] is None


def test_of_several_checkpoints_the_one_of_the_last_step_counts(tmp_path: Path) -> None:
    """A kill between the rename and the removal leaves two; names sort otherwise than numbers do."""
    for step in (999_999, 1_000_000):
        save(tmp_path / str(step), Checkpoint(step, {}))
        (tmp_path / str(step) / f"step-{step}").rename(tmp_path / f"step-{step}")
    found = latest(tmp_path)
    assert found is not None
    assert found.step == 1_000_000


def test_what_a_kill_left_half_written_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".partial-step-000007").mkdir()
    assert latest(tmp_path) is None
    assert latest(tmp_path / "not there") is None
    save(tmp_path, Checkpoint(7, {}))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000007"]


def test_a_checkpoint_is_read_as_data_and_runs_no_code(tmp_path: Path) -> None:
    save(tmp_path, Checkpoint(1, {}))
    torch.save({"evil": Path}, tmp_path / "step-000001" / "tensors.pt")
    said: list[str] = []
    assert latest(tmp_path, said.append) is None
    assert "is broken (Weights only load failed" in said[0]


def test_a_discarded_directory_is_gone_and_so_is_what_an_earlier_kill_left_of_it(tmp_path: Path) -> None:
    for name in ("stage", ".stage.gone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    discard(tmp_path / "stage")
    assert list(tmp_path.iterdir()) == []
    discard(tmp_path / "stage")


def test_json_is_replaced_whole_and_refuses_what_json_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"mean": 1.5, "text": "ü"})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"mean": math.nan})
    assert json.loads(path.read_text(encoding="utf-8")) == {"mean": 1.5, "text": "ü"}


def test_logs_are_cut_back_to_the_checkpoint(stage_run: Any) -> None:
    stage_run.log(1, 3, {"loss": 2.0})
    stage_run.samples([{"completion": "é"}])
    stage_run.save(1, {})
    stage_run.log(2, 3, {"loss": 1.0})
    stage_run.samples([{"completion": "lost"}])
    assert stage_run.restore().step == 1
    assert (stage_run.directory / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n'
    assert (stage_run.directory / "samples.jsonl").read_text(encoding="utf-8") == '{"completion": "é"}\n'


def test_without_a_checkpoint_the_logs_start_again(stage_run: Any) -> None:
    stage_run.log(1, 3, {"loss": 2.0})
    assert stage_run.restore() is None
    assert (stage_run.directory / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_stops_the_stage_and_is_not_logged(value: float, stage_run: Any) -> None:
    with pytest.raises(KeelError, match=r"stage: loss is .* at step 4"):
        stage_run.log(4, 9, {"grad_norm": 1.0, "loss": value})
    assert not (stage_run.directory / "metrics.jsonl").exists()


def test_what_depends_on_the_clock_is_in_a_log_of_its_own(stage_run: Any) -> None:
    with stage_run.timed("train"):
        pass
    stage_run.log(1, 2, {"loss": 2.0})
    assert json.loads((stage_run.directory / "metrics.jsonl").read_text()) == {"step": 1, "loss": 2.0}
    assert json.loads((stage_run.directory / "times.jsonl").read_text()).keys() == {"step", "train"}


def test_rates_are_those_of_the_tokens_counted(stage_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0, 20.0, 22.0])
    monkeypatch.setattr("keel.rundir.stage_run.time.perf_counter", lambda: next(clock))
    stage_run.costs, stage_run.speed = {"train": PhaseCost(6e6)}, Speed(1e9)
    for _ in range(2):
        with stage_run.timed("train"):
            stage_run.count("train", 100, 150)
    stage_run.log(1, 2, {"loss": 1.0})
    (line,) = (stage_run.directory / "times.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "step": 1, "train": 4.0, "train/tokens_per_second": 50.0, "train/useful": 0.6667, "train/mfu": 0.3,
        "train/roofline": 0.3,
    }  # fmt: skip


def test_a_small_share_is_not_logged_as_none(stage_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine's share of a tiny model's step, which four decimals would make zero."""
    clock = iter([0.0, 1000.0])
    monkeypatch.setattr("keel.rundir.stage_run.time.perf_counter", lambda: next(clock))
    stage_run.costs, stage_run.speed = {"train": PhaseCost(1.0)}, Speed(1e3)
    with stage_run.timed("train"):
        stage_run.count("train", 12, 12)
    stage_run.log(1, 2, {"loss": 1.0})
    times = json.loads((stage_run.directory / "times.jsonl").read_text())
    assert (times["train/roofline"], times["train/tokens_per_second"]) == (1.2e-05, 0.012)


def test_the_roofline_is_what_the_machine_needs_at_least(stage_run: Any, monkeypatch) -> None:
    clock = iter([0.0, 1.0, 5.0, 10.0])  # the optimiser within training
    monkeypatch.setattr("keel.rundir.stage_run.time.perf_counter", lambda: next(clock))
    stage_run.costs = {"train": PhaseCost(10.0, 1.0, passed=4.0), "optimizer": PhaseCost(passed=100.0)}
    stage_run.speed = Speed(100.0, {1000: 50.0})
    with stage_run.timed("train"):
        stage_run.count("train", 30, 40, passes=1, pairs=200)
        with stage_run.stepping():
            pass
    stage_run.log(1, 2, {"loss": 1.0})
    times = json.loads((stage_run.directory / "times.jsonl").read_text())
    assert (times["train"], times["optimizer"]) == (10.0, 4.0)
    assert times["train/roofline"] == 0.5  # 30 tokens of 10 FLOP and 200 pairs of one, at 100 a second: 5 s
    assert times["optimizer/roofline"] == 0.5  # 100 bytes at 50 a second
    assert "optimizer/tokens_per_second" not in times


def test_what_people_made_survives_its_directory(tmp_path: Path) -> None:
    for number, name in ((1, "collect.kept"), (2, "collect.kept-2")):
        folder = tmp_path / "collect"
        folder.mkdir()
        for file in ("votes.jsonl", "pairs.jsonl", "stage.json"):
            (folder / file).write_text(f"{file} {number}")
        discard(folder)
        assert not folder.exists()
        assert {p.name: p.read_text() for p in (tmp_path / name).iterdir()} == {
            "votes.jsonl": f"votes.jsonl {number}", "pairs.jsonl": f"pairs.jsonl {number}"
        }  # fmt: skip
