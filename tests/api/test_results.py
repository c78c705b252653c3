"""keel.load_run, keel.compare, keel.diagnose: what is read is what was written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import keel


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_stages_say_what_they_are(finished: keel.Run, stages: dict[str, Any]) -> None:
    assert list(finished.stages) == list(stages)
    ppo = finished.stages["ppo"]
    assert (ppo.kind, ppo.status, ppo.inputs) == ("ppo", "done", ("sft", "reward"))
    assert ppo.seconds is not None
    assert ppo.seconds > 0
    assert ppo.settings["updates"] == 4
    assert ppo.directory == finished.path / "stages" / "ppo"
    assert finished.name == "tiny"
    assert finished.config["threads"] == 1


def test_metrics_are_the_lines_of_the_log(finished: keel.Run) -> None:
    frame, rows = finished.metrics("ppo"), _rows(finished.path / "stages" / "ppo" / "metrics.jsonl")
    assert list(frame.index) == [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert {name: frame.loc[row["step"], name] for name in row if name != "step"} == {
            name: value for name, value in row.items() if name != "step"
        }


def test_samples_are_the_lines_of_the_log(finished: keel.Run) -> None:
    frame, rows = finished.samples("ppo"), _rows(finished.path / "stages" / "ppo" / "samples.jsonl")
    assert list(frame["completion"]) == [row["completion"] for row in rows]
    assert list(frame["rewards/reward"]) == [row["rewards"]["reward"] for row in rows]


def test_results_have_their_intervals(finished: keel.Run) -> None:
    written = json.loads((finished.path / "stages" / "judge" / "result.json").read_text(encoding="utf-8"))
    frame = finished.result("judge")
    assert list(frame.columns) == ["mean", "low", "high", "n"]
    for model in ("sft", "ppo"):
        assert frame.loc[(model, "kl")].to_dict() == written["models"][model]["kl"]
    assert finished.stages["judge"].result == written

    reward = finished.result("reward")
    assert reward.loc["accuracy", "low"] <= reward.loc["accuracy", "mean"] <= reward.loc["accuracy", "high"]
    assert reward.loc[["std"]].isna().to_numpy().tolist() == [[False, True, True, True]], "a plain number"


def test_a_model_path_is_what_transformers_loads(finished: keel.Run) -> None:
    assert (finished.model_path("ppo") / "config.json").exists()
    with pytest.raises(keel.UsageError, match="'judge' has no model: it is of kind evaluate"):
        finished.model_path("judge")


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda run: run.metrics("pppo"), "no stage 'pppo'; did you mean 'ppo'?"),
        (lambda run: run.metrics("judge"), "'judge' has no metrics"),
        (lambda run: run.samples("base"), "'base' has no samples"),
    ],
)
def test_what_is_not_there_is_a_usage_error(
    finished: keel.Run, ask: Callable[[keel.Run], object], message: str
) -> None:
    with pytest.raises(keel.UsageError) as raised:
        ask(finished)
    assert message in str(raised.value)


def test_no_run_is_a_usage_error(tmp_path: Path) -> None:
    for read in (keel.load_run, keel.diagnose, keel.compare):
        with pytest.raises(keel.UsageError, match=str(tmp_path)):
            read(tmp_path)
    with pytest.raises(keel.UsageError, match="at least one run"):
        keel.compare()


def test_diagnosis_of_a_run_and_of_a_stage_agree(finished: keel.Run) -> None:
    found = finished.diagnose()
    assert list(found) == ["ppo"]
    assert found["ppo"].steps == 4
    assert keel.diagnose(finished.stages["ppo"].directory)["ppo"] == found["ppo"]


def test_a_comparison_ranks_with_intervals(finished: keel.Run, tmp_path: Path) -> None:
    found = keel.compare(finished)
    assert found.ranked_by == "proxy"
    assert any("proxy alone" in note for note in found.notes)
    table, judged = found.table(), finished.result("judge")
    for model in ("sft", "ppo"):
        assert table.loc[(model, "proxy"), "mean"] == judged.loc[(model, "proxy"), "mean"]
    apart = found.differences()
    assert len(apart) == 1
    best = ({"sft", "ppo"} - {*apart.index}).pop()
    gap = judged.loc[(best, "proxy"), "mean"] - judged.loc[(apart.index[0], "proxy"), "mean"]
    assert apart["mean"].iloc[0] == pytest.approx(gap)
    assert gap >= 0
    assert found.verdict in str(found)
    assert found.write(tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!")


def test_a_report_is_written_where_it_says(finished: keel.Run) -> None:
    assert finished.report() == finished.path / "report.html"
    assert "ppo" in str(finished)
    assert repr(finished) == f"Run({str(finished.path)!r})"


def test_frames_say_what_they_need(finished: keel.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(keel.KeelError, match="pip install pandas"):
        finished.metrics("ppo")
