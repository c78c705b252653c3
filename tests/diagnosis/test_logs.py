"""Logs of keel and of TRL as the checks read them, and the command that says what they show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from keel.cli import diagnose
from keel.cli.main import app
from keel.diagnosis import logs
from keel.errors import DataError, UsageError


def trl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps({"global_step": len(rows), "log_history": rows}))
    return path


def names(found: logs.Diagnosis) -> dict[str, str]:
    return {f.check: f.severity for f in found.findings}


GRPO = {
    "loss": 0.01,
    "grad_norm": 0.3,
    "reward": 0.4,
    "reward_std": 0.4,
    "kl": 0.01,
    "completions/mean_length": 100.0,
    "completions/clipped_ratio": 0.02,
    "entropy": 0.5,
    "clip_ratio/region_mean": 0.02,
    "frac_reward_zero_std": 0.2,
    "sampling/sampling_logp_difference/mean": 0.01,
    "rewards/format/mean": float("nan"),
}


def grpo(ill: dict[str, float], steps: int = 40) -> list[dict[str, Any]]:
    return [{"step": s, "epoch": s / steps, **GRPO, **(ill if s > 20 else {})} for s in range(1, steps + 1)]


def test_a_healthy_run_of_trl_has_no_finding(tmp_path):
    """Also not where a reward applies to no sample, whose mean TRL logs as NaN."""
    found = logs.trainer_state(
        trl(tmp_path / "trainer_state.json", [*grpo({}), {"step": 40, "train_runtime": 9.0}])
    )
    assert found.findings == ()
    assert found.steps == 40


@pytest.mark.parametrize(
    ("ill", "check", "severity"),
    [
        ({"kl": 0.4}, "kl_too_high", "act"),  # 40 nats a response
        ({"loss": float("nan")}, "not_finite", "act"),
        ({"completions/clipped_ratio": 0.95}, "truncated_rising", "act"),
        ({"completions/mean_length": 400.0, "kl": 0.001}, "length_drift", "warn"),
        ({"clip_ratio/region_mean": 0.6}, "clip_fraction", "act"),
        ({"frac_reward_zero_std": 0.9}, "groups_all_equal", "warn"),
        ({"sampling/sampling_logp_difference/mean": 0.3}, "sampler_disagrees", "act"),
        ({"entropy": 0.01, "reward": 0.3}, "entropy_collapse", "act"),
        ({"reward_std": 0.01}, "reward_without_spread", "warn"),
        ({"reward": 5.0}, "reward_implausible", "act"),
    ],
)
def test_an_ill_run_of_trls_grpo_is_diagnosed(ill, check, severity, tmp_path):
    assert names(logs.trainer_state(trl(tmp_path / "trainer_state.json", grpo(ill)))) == {check: severity}


def test_an_ill_run_of_trls_ppo_is_diagnosed(tmp_path):
    rows = [
        {"step": s, "objective/kl": 2.0 if s < 20 else 80.0, "policy/clipfrac_avg": 0.1 if s < 20 else 0.4}
        for s in range(1, 41)
    ]
    assert names(logs.trainer_state(trl(tmp_path / "s.json", rows))) == {
        "kl_too_high": "act",
        "clip_fraction": "warn",
    }


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"log_history": [{"loss": 1}]}', '{"log_history": 3}'])
def test_a_file_that_is_no_trainer_state_is_refused(text, tmp_path):
    path = tmp_path / "trainer_state.json"
    path.write_text(text)
    with pytest.raises(DataError, match="has no `log_history`"):
        logs.trainer_state(path)


# ---------------------------------------------------------------- keel's own


def stage(folder: Path, kl: float, events: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir(parents=True)
    rows = [{"step": s, "objective/kl_exact": kl} for s in range(1, 31)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if events is not None:
        (folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in events))
    return folder


def run(folder: Path, kl: float, target: float) -> Path:
    stage(folder / "stages" / "ppo", kl)
    settings = {"kind": "ppo", "model": {"path": "gpt2"}, "kl": {"coef": 0.1, "target": target}}
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": "r", "stages": {"ppo": settings}}))
    return folder


def test_a_run_is_judged_by_its_own_target_and_so_is_its_stage(tmp_path):
    folder = run(tmp_path / "r", 20.0, 15.0)
    for path in (folder, folder / "stages" / "ppo"):
        assert diagnose.diagnose(path)["ppo"].findings == ()
    near = run(tmp_path / "n", 20.0, 6.0)
    for path in (near, near / "stages" / "ppo"):
        assert names(diagnose.diagnose(path)["ppo"]) == {"kl_too_high": "act"}


def test_what_the_stage_said_itself_is_said_once_and_its_actions_begin_windows_anew(tmp_path):
    said = logs.stage(stage(tmp_path / "one", 30.0), {"kl": {"target": 6.0}})
    events = [
        said.findings[0].row(),
        {
            "step": 10,
            "event": "adjust",
            "checks": ["kl_too_high"],
            "kl_coef": 0.1,
            "lr_factor": 0.5,
            "to": None,
        },
    ]
    found = logs.stage(stage(tmp_path / "two", 30.0, events), {"kl": {"target": 6.0}})
    assert [(f.check, f.step) for f in found.findings] == [("kl_too_high", 10), ("kl_too_high", 20)]
    assert [a["event"] for a in found.actions] == ["adjust"]
    assert [f.step for f in logs.worst(found.findings)] == [10]


def test_exit_codes_and_json(tmp_path):
    runner = CliRunner()
    ill = runner.invoke(app, ["diagnose", str(run(tmp_path / "ill", 30.0, 6.0)), "--json"])
    assert ill.exit_code == 3
    found = json.loads(ill.stdout)["stages"]["ppo"]["findings"][0]
    assert (found["check"], found["severity"], found["step"]) == ("kl_too_high", "act", 10)
    assert {"evidence", "cause", "remedy"} <= found.keys()
    well = runner.invoke(app, ["diagnose", str(run(tmp_path / "well", 5.0, 6.0))])
    assert well.exit_code == 0
    assert "no finding" in well.stdout
    text = runner.invoke(app, ["diagnose", str(tmp_path / "ill" / "stages" / "ppo")])
    assert text.exit_code == 3
    assert "remedy: raise kl.coef" in text.stdout


def test_a_path_with_nothing_to_read_is_a_usage_error(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UsageError, match="nothing to diagnose"):
            diagnose.diagnose(path)
    assert UsageError.exit_code == 2
