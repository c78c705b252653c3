"""Which weight files a done stage answers for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from keel.rundir import weights

LEFT = ("model/members/2/model.safetensors", "model/model.safetensors")


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """A stage's directory whose command ended before it was cleared up."""
    for name in (*LEFT, "members/2/model/model.safetensors", "checkpoints/step-000001/x.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def test_a_stage_answers_for_what_stays_when_it_is_cleared_up(stage: Path) -> None:
    recorded = weights.record(stage)
    assert tuple(recorded) == LEFT
    shutil.rmtree(stage / "members")
    shutil.rmtree(stage / "checkpoints")
    assert weights.differs(stage, recorded) is None


def test_a_record_of_before_that_names_members_is_no_fault(stage: Path) -> None:
    recorded = weights.record(stage)
    recorded["members/2/model/model.safetensors"] = recorded[LEFT[1]]
    shutil.rmtree(stage / "members")
    assert weights.differs(stage, recorded) is None


@pytest.mark.parametrize("name", LEFT)
def test_an_edited_file_is_named(stage: Path, name: str) -> None:
    recorded = weights.record(stage)
    (stage / name).write_bytes(b"edited")
    assert weights.differs(stage, recorded) == name
    (stage / name).unlink()
    assert weights.differs(stage, recorded) == name
