"""The phase that is furthest above its floor, and the setting that is named."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from keel.cli import diagnose
from keel.diagnosis import speed
from keel.models.precision import fast_in_bfloat16

SLOW = {
    "step": 9, "train": 50.0, "optimizer": 10.0, "rollout": 40.0,
    "train/roofline": 0.2, "optimizer/roofline": 0.5, "rollout/roofline": 0.9, "train/useful": 0.5,
}  # fmt: skip


def test_a_phase_is_what_no_other_has_of_it():
    assert {(p.name, p.seconds, p.floor, p.useful) for p in speed.phases([SLOW, SLOW])} == {
        ("train", 80.0, 20.0, 0.5), ("optimizer", 20.0, 10.0, None), ("rollout", 80.0, 72.0, None)
    }  # fmt: skip


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """A machine that is fast in bfloat16, or as a test says."""
    monkeypatch.setattr(speed, "_fast_half", lambda: True)


def test_the_phase_with_most_seconds_above_its_floor_is_named_with_a_setting_that_is_not_set_so():
    found = speed.finding([SLOW], {"kind": "ppo", "sharing": "separate", "model": {"dtype": "float32"}})
    assert found is not None
    assert (found.check, found.severity, found.step) == (speed.CHECK, "note", 9)
    assert found.evidence.startswith("train (forward and backward) took 40 of 90 s")
    assert "needs 10 s for it at least (25 %); 50 % of the tokens" in found.evidence
    assert "dtype: auto" in found.remedy
    assert "sharing: trunk" in found.remedy
    set_so = speed.finding([SLOW], {"kind": "ppo", "sharing": "trunk", "model": {"dtype": "auto"}})
    assert set_so is not None
    assert "dtype" not in set_so.remedy + set_so.cause
    assert "no setting" in set_so.remedy


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"gradient_checkpointing": True}, "gradient_checkpointing"),
        ({"kind": "sft", "packing": False}, "packing"),
        ({"batch_size": 64, "micro_batch": 4}, "micro_batch"),
        ({"offload": True}, "no setting"),
        ({"mini_batch": 4, "batch_size": 64, "micro_batch": 4}, "no setting"),
    ],
)
def test_settings_are_named_where_they_would_help(settings, word):
    found = speed.finding([SLOW], settings)
    assert found is not None
    assert word in found.remedy


@pytest.mark.parametrize(
    ("dtype", "micro_batch", "fast", "words"),
    [
        ("float32", 4, False, {"micro_batch"}),
        ("float32", 8, False, set()),
        ("float32", 8, True, {"dtype"}),
        ("auto", 8, False, set()),
        ("auto", 8, True, {"micro_batch"}),
        ("bfloat16", 16, False, {"micro_batch"}),
    ],
)
def test_what_would_not_help_on_this_machine_is_not_named(dtype, micro_batch, fast, words, monkeypatch):
    monkeypatch.setattr(speed, "_fast_half", lambda: fast)
    settings = {"model": {"dtype": dtype}, "batch_size": 64, "micro_batch": micro_batch}
    found = speed.finding([SLOW], settings)
    assert found is not None
    assert {word for word in ("dtype", "micro_batch") if f"`{word}" in found.remedy} == words


def test_the_machine_is_asked(monkeypatch):
    monkeypatch.undo()
    assert speed._fast_half() == fast_in_bfloat16(
        torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )


def test_the_cost_of_models_that_rest_on_the_cpu_is_named():
    rows = [{"step": 1, "forward": 70.0, "forward/roofline": 0.1}]
    found = speed.finding(rows, {"offload": True})
    assert found is not None
    assert "offload: false" in found.remedy


def test_the_reading_of_a_reference_is_a_phase():
    found = speed.finding([{**SLOW, "reference": 200.0, "reference/roofline": 0.1}], {})
    assert found is not None
    assert found.evidence.startswith("reference (log-probabilities of the reference) took 200 of 290 s")


def test_a_phase_without_a_floor_is_part_of_the_time():
    """A server's, say: a stage that mostly waits for it is not slow by what little it does itself."""
    found = speed.finding([{**SLOW, "rollout/roofline": None}], {})
    assert found is not None
    assert "took 40 of 90 s" in found.evidence
    assert speed.finding([{"step": 1, "rollout": 500.0, "train": 70.0, "train/roofline": 0.1}], {}) is None
    assert speed.finding([{"step": 1, "rollout": 500.0}], {}) is None


@pytest.mark.parametrize("part", [{"train": 5.0, "rollout": 5.0}, {"train/roofline": 0.9}, {"train": "x"}])
def test_nothing_is_said_of_a_short_stage_nor_of_one_near_its_floor(part):
    assert speed.finding([{**SLOW, **part}], {}) is None


def test_diagnose_says_it_of_any_stage(tmp_path):
    stage = tmp_path / "run" / "stages" / "sft"
    stage.mkdir(parents=True)
    (stage / "metrics.jsonl").write_text('{"step": 9, "loss": 1.0}\n')
    (stage / "times.jsonl").write_text(json.dumps(SLOW) + "\n")
    (tmp_path / "run" / "config.yaml").write_text(
        yaml.safe_dump({"name": "run", "stages": {"sft": {"kind": "sft", "packing": False}}})
    )
    text = diagnose.as_text(diagnose.diagnose(stage))
    assert "time_above_floor" in text
    assert "packing: true" in text
    assert not diagnose.urgent(diagnose.diagnose(stage))
