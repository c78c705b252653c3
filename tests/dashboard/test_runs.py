"""Which runs lie in a folder, and what is said of each."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from made_runs import append, at_work, events_run, foul_run, keel_run, ppo_row, trl_run, write_json

from keel.dashboard.discovery import find
from keel.dashboard.findings import CONCERNS, TOO_LONG
from keel.dashboard.keel_run import yaml_object
from keel.dashboard.runs import Runs
from keel.dashboard.samples import groups
from keel.diagnosis import logs
from keel.diagnosis.watch import CHECKS


def stage(state: dict, name: str) -> dict:
    return next(one for one in state["stages"] if one["name"] == name)


def only(folder: Path):
    return Runs(folder).all()[0]


def test_runs_of_every_kind_are_found(tmp_path):
    keel_run(tmp_path / "ours", 3)
    keel_run(tmp_path / "sweep" / "points" / "one", 3)
    trl_run(tmp_path / "trl", 4)
    (tmp_path / "tb" / "version_0").mkdir(parents=True)
    (tmp_path / "tb" / "version_0" / "events.out.tfevents.1").touch()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "ours")
    found = [(place.name, place.format) for place in find(tmp_path)]
    assert found == [
        ("ours", "keel"),
        ("sweep/points/one", "keel"),
        ("tb/version_0", "tensorboard"),
        ("trl", "transformers"),
    ]
    assert [(place.name, place.path) for place in find(tmp_path / "ours")] == [("ours", tmp_path / "ours")]
    assert find(tmp_path / "nowhere") == []


def test_a_run_that_is_begun_later_appears(tmp_path, monkeypatch):
    monkeypatch.setattr("keel.dashboard.runs.LOOK_AGAIN", 0.0)
    runs = Runs(tmp_path)
    assert runs.all() == []
    first = keel_run(tmp_path / "one", 3)
    opened = runs.get("one")
    assert opened is not None
    keel_run(tmp_path / "two", 3)
    assert [run.name for run in runs.all()] == ["one", "two"]
    assert runs.get("one") is opened  # and not read again
    shutil.rmtree(first)
    assert [run.name for run in runs.all()] == ["two"]


def test_a_run_that_is_done(tmp_path):
    keel_run(tmp_path / "run", 40)
    run = only(tmp_path)
    line = run.summary()
    assert (line["status"], line["stage"], line["step"], line["steps"]) == ("done", "ppo", 40, 40)
    assert line["values"]["kl"] == pytest.approx(json.loads(_last(tmp_path / "run"))["objective/kl"])
    state = run.state()
    ppo = stage(state, "ppo")
    assert (ppo["status"], ppo["inputs"], ppo["memory_mib"]) == ("done", ["reward"], 741.2)
    assert ppo["result"] == "score 0.82, KL 6.6 nats"
    assert next(c for c in ppo["curves"] if c["metric"] == "objective/kl")["level"] == 6.0
    assert state["can_stop"] is False


def _last(run: Path) -> str:
    return (run / "stages" / "ppo" / "metrics.jsonl").read_text().splitlines()[-1]


def test_a_run_at_work_says_how_long_it_will_take(tmp_path):
    path = keel_run(tmp_path / "run", 100, done=60, status="running")
    with at_work(path):
        run = only(tmp_path)
        state = run.state()
        assert (run.summary()["status"], state["can_stop"]) == ("running", True)
        ppo = stage(state, "ppo")
        assert (ppo["status"], ppo["step"], ppo["steps"]) == ("running", 60, 100)
        rows = [json.loads(row) for row in (path / "stages/ppo/times.jsonl").read_text().splitlines()][-20:]
        spent = sum(row[phase] for row in rows for phase in ("rollout", "forward", "score", "train")) / 20
        assert ppo["left"] == pytest.approx(40 * spent, abs=1)
        assert state["memory_mib"] > 10
    assert run.summary()["status"] == "interrupted"


def test_only_the_stage_that_was_begun_by_the_process_is_at_work(tmp_path):
    path = keel_run(tmp_path / "run", 100, done=60, status="running")
    with at_work(path):
        (path / "stages/reward/stage.json").unlink()  # cut off by an earlier process
        os.utime(path / "stages/reward/fingerprint", (1, 1))
        state = only(tmp_path).state()
        assert stage(state, "reward")["left"] is None
    assert [stage(state, name)["status"] for name in ("reward", "ppo")] == ["interrupted", "running"]


def test_what_other_settings_made_is_not_shown(tmp_path):
    path = keel_run(tmp_path / "run", 10)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["stages"]["ppo"]["fingerprint"] = "another"
    write_json(path / "manifest.json", manifest)
    run = only(tmp_path)
    ppo = stage(run.state(), "ppo")
    assert (ppo["status"], ppo["step"]) == ("out of date", None)
    assert all(not run.samples(one).spots for one in run.facts().stages if one.name == "ppo")


def test_a_half_written_run_is_shown_as_far_as_it_is(tmp_path):
    path = keel_run(tmp_path / "run", 10)
    (path / "config.yaml").write_text("stages: [")
    (path / "stages/ppo/stage.json").write_text('{"kind": "pp')
    (path / "stages/ppo/result.json").unlink()
    state = only(tmp_path).state()
    assert [one["name"] for one in state["stages"]] == ["reward", "ppo"]
    assert stage(state, "ppo")["status"] == "interrupted"
    for name in ("manifest.json", "config.yaml"):
        (path / name).write_text("")
    assert only(tmp_path).state()["stages"] == []


def test_a_run_of_somebody_who_means_ill(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    append(tmp_path / "elsewhere" / "metrics.jsonl", [{"step": 1, "secret": 1.0}])
    foul_run(tmp_path / "odd")
    run = only(tmp_path)
    assert run.summary()["name"] == "odd"
    state = run.state()
    assert {one["name"] for one in state["stages"]} == {"reward", "ppo", "odd"}  # none leads out of the run
    assert stage(state, "ppo")["broken_lines"] == 4
    assert json.loads(json.dumps(state, allow_nan=False)) == state


def test_a_config_that_stands_for_too_much_is_left_out():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    assert yaml_object("\n".join(lines)) == {}
    assert yaml_object("a: &x [1]\nb: *x") == {"a": [1], "b": [1]}
    assert yaml_object("[" * 5000) == {}


def test_runs_of_one_config_are_a_group(tmp_path):
    for seed in (0, 1):
        keel_run(tmp_path / f"a{seed}", 3, seed=seed)
    keel_run(tmp_path / "b", 3, coef=0.3)
    groups = [run.summary()["group"] for run in Runs(tmp_path).all()]
    assert groups[0] == groups[1] != groups[2]


# ---------------------------------------------------------------- other trainers


def test_a_run_of_trl(tmp_path):
    path = trl_run(tmp_path / "trl", 40)
    run = only(tmp_path)
    training = stage(run.state(), "training")
    assert (training["step"], training["steps"], training["kind"]) == (40, 40, "trl")
    assert [c["metric"] for c in training["curves"]][:2] == ["reward", "kl"]
    [samples] = [run.samples(one) for one in run.facts().stages]
    assert groups(samples) == [("step 1", 2), ("step 40", 2)]
    assert training["findings"] is not None
    assert run.summary()["values"]["length"] == 60.0
    # a further checkpoint: only what is new is added
    table = run.table(run.facts().stages[0])
    before = table.position
    state = json.loads((path / "checkpoint-40" / "trainer_state.json").read_text())
    state["log_history"].append({"step": 41, "reward": 7.0})
    (path / "checkpoint-41").mkdir()
    write_json(path / "checkpoint-41" / "trainer_state.json", state)
    os.utime(path / "checkpoint-41" / "trainer_state.json")
    table = run.table(run.facts().stages[0])
    assert (table.position.epoch, table.position.rows) == (before.epoch, before.rows + 1)
    assert table.points("reward", before.rows)[1].tolist() == [7.0]


def test_a_trainer_with_event_files_is_one_run(tmp_path):
    pytest.importorskip("tensorboard")
    path = trl_run(tmp_path / "trl", 4, at_end=True)
    events_run(path / "runs" / "Nov29_host", 5)
    state = only(tmp_path).state()
    assert [one["name"] for one in state["stages"]] == ["training", "runs/Nov29_host"]
    assert stage(state, "runs/Nov29_host")["step"] == 5
    assert state["status"] == "done"


# ---------------------------------------------------------------- findings


def test_findings_are_those_of_keel_diagnose(tmp_path):
    path = keel_run(tmp_path / "run", 40)
    folder = path / "stages" / "ppo"
    run = only(tmp_path)
    assert stage(run.state(), "ppo")["findings"] == []
    draw = random.Random(0)
    worse = [{**ppo_row(s, 80, draw), "policy/clipfrac_avg": 0.7} for s in range(41, 61)]
    append(folder / "metrics.jsonl", worse)
    logged = {"check": "kl_too_high", "severity": "act", "evidence": "e", "cause": "c", "remedy": "r"}
    append(folder / "events.jsonl", [{"step": 50, "event": "finding", **logged}])
    while stage(run.state(), "ppo")["note"]:
        pass  # a slice of the checks at a time
    found = stage(run.state(), "ppo")["findings"]
    expected = logs.stage(folder, run.facts().stages[1].settings).findings
    assert [(f["step"], f["name"], f["evidence"]) for f in found] == [
        (f.step, f.check.replace("_", " "), f.evidence) for f in expected
    ]
    assert {f["name"] for f in found} >= {"clip fraction", "kl too high"}
    assert next(f for f in found if f["name"] == "clip fraction")["curves"][0] == "policy/clipfrac_avg"


def test_every_check_has_its_curves():
    assert set(CONCERNS) == set(CHECKS) - {"not_finite"}  # which belongs to all


def test_a_run_of_very_many_steps_shows_what_it_found_itself(tmp_path):
    folder = keel_run(tmp_path / "run", 10) / "stages" / "ppo"
    append(folder / "metrics.jsonl", ({"step": n, "objective/kl": 500.0} for n in range(11, 10_100)))
    logged = {"check": "kl_too_high", "severity": "act", "evidence": "e", "cause": "c", "remedy": "r"}
    append(folder / "events.jsonl", [{"step": 50, "event": "finding", **logged}])
    ppo = stage(only(tmp_path).state(), "ppo")
    assert ppo["note"] == TOO_LONG
    assert [finding["evidence"] for finding in ppo["findings"]] == ["e"]
