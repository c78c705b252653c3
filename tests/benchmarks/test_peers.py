"""The pairs with TRL: what can be asked for, and that one step has a beginning by the clock of its end."""

from __future__ import annotations

import json
import sys

import pytest


@pytest.fixture
def peers(script):
    return script("peers")


def settings(peers, monkeypatch, *arguments: str):
    """What `compare` is given."""
    given = []
    monkeypatch.setattr(peers, "compare", lambda settings, kinds: given.append((settings, kinds)))
    monkeypatch.setattr(sys, "argv", ["peers.py", *arguments])
    peers.main()
    return given[0]


@pytest.mark.parametrize("kinds", [["ppo"], ["sft", "dpo-auto"], []])
def test_one_step_of_what_has_no_beginning_is_refused(peers, monkeypatch, capsys, kinds):
    with pytest.raises(SystemExit):
        settings(peers, monkeypatch, *kinds, "--steps", "1")
    assert "--steps 1 measures no ppo nor dpo; name kinds of sft" in capsys.readouterr().err
    assert settings(peers, monkeypatch, "grpo", "--steps", "1")[1] == ["grpo"]


def test_long_responses_are_those_that_are_sampled_and_rows_stay_as_they_are(peers, monkeypatch, tmp_path):
    settings(peers, monkeypatch, "grpo", "--new", "700")
    peers.prepare(tmp_path, "tiny")
    row = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])
    assert [len(row[name].split()) for name in ("prompt", "chosen", "rejected")] == [32, 64, 64]
    config = json.loads((tmp_path / "ending" / "config.json").read_text())
    assert config["max_position_embeddings"] == 732


def test_trl_computes_as_asked(peers, monkeypatch, tmp_path):
    commands = []

    class Done:
        returncode, stdout = 0, '{"seconds": 1}'

    monkeypatch.setattr(peers.subprocess, "run", lambda command, **named: commands.append(command) or Done)
    for bf16 in (False, True):
        peers.measured("python", "sft", "trl", tmp_path, 1, bf16=bf16)
    assert ["--peer-bf16" in command for command in commands] == [False, True]


def test_a_steps_floor_has_its_share_of_what_the_reference_read_before_the_first(peers, tmp_path):
    rows = [{"step": n + 1, "train": 2.0, "train/roofline": 0.5, "optimizer": 1.0} for n in range(4)]
    rows[0] |= {"reference": 8.0, "reference/roofline": 0.25}
    times = tmp_path / "times.jsonl"
    times.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert peers.floor(times) == 1.0 + 2.0 / 4
    times.write_text(json.dumps(rows[0]))
    assert peers.floor(times) == 1.0 + 2.0


@pytest.mark.parametrize("kind", ["sft", pytest.param("grpo", marks=pytest.mark.slow)])
def test_one_step_is_as_long_as_its_phases(peers, monkeypatch, tmp_path, capsys, kind):
    """By the processor's clock here: the sum of the log's phases is by another one."""
    from keel.rundir.stage_run import StageRun

    monkeypatch.setattr(StageRun, "timed", StageRun.timed)
    monkeypatch.setattr(peers, "STEPS", {**peers.STEPS, kind: 1})
    monkeypatch.setenv("KEEL_TRUST", "1")
    ticks = iter(range(10**6))
    monkeypatch.setattr(peers, "now", lambda device: float(next(ticks)))
    peers.prepare(tmp_path, "tiny")
    peers.of_keel(kind, tmp_path, "cpu", 16)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    phases = {"sft": 2, "grpo": 5}[kind]  # train and its optimizer; before them rollout, forward, score
    assert (found["seconds"], found["steps"]) == (phases, 2)
