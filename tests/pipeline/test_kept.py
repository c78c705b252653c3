"""Nothing that was trained is lost: other settings, a mistyped override, an edited file, a link, a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from keel.cli import clean as cleaning
from keel.config import parse
from keel.errors import UsageError
from keel.pipeline import following
from keel.pipeline.pipeline import Pipeline
from keel.rundir import kept

Go = Callable[..., tuple[list[str], list[str]]]


@pytest.fixture
def go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Any, tiny_model: Path) -> Go:
    """Run two stages of SFT, one after the other; returns what was worked on, and what was said."""
    monkeypatch.setattr(Pipeline, "_report", lambda self: None)
    worked: list[str] = []
    dispatch = following.run_stage
    monkeypatch.setattr(
        following, "run_stage", lambda stage, run: (worked.append(run.name), dispatch(stage, run))[1]
    )
    source = {"source": str(data.demonstrations), "rows": 8}
    common = {"kind": "sft", "data": source, "max_steps": 2, "batch_size": 2, "holdout": 0.0, "save_every": 1}

    def call(
        lr: float = 1e-3,
        *,
        confirm: Callable[[str], bool] = lambda question: True,
        stop_at: tuple[str, int] | None = None,
        **options: Any,
    ) -> tuple[list[str], list[str]]:
        def progress(stage: str, step: int, steps: int, metrics: Mapping[str, float]) -> None:
            if (stage, step) == stop_at:
                raise KeyboardInterrupt

        said: list[str] = []
        worked.clear()
        stages = {"sft": {**common, "model": str(tiny_model), "lr": lr}, "more": {**common, "model": "sft"}}
        config = parse({"name": "tiny", "threads": 1, "device": "cpu", "stages": stages})
        Pipeline(config, tmp_path / "run", said.append, progress, confirm=confirm).run(**options)
        return list(worked), said

    return call


def weights(folder: Path) -> bytes:
    (file,) = (folder / "model").glob("*.safetensors")
    return file.read_bytes()


def kept_of(run: Path, stage: str) -> list[Path]:
    return [one.path for one in kept.listed(run) if one.stage == stage]


def test_what_other_settings_made_is_kept_and_comes_back_by_itself(go: Go, tmp_path: Path) -> None:
    run = tmp_path / "run"
    go()
    first = weights(run / "stages" / "more")
    worked, said = go(2e-3)
    assert worked == ["sft", "more"]
    assert any("done before, and to be run again: sft (" in line for line in said)
    assert any(line.startswith("sft: what was made before is kept in ") for line in said)
    assert [weights(path) for path in kept_of(run, "more")] == [first]
    second = weights(run / "stages" / "more")
    assert second != first
    worked, said = go()  # the mistyped setting is taken back
    assert worked == []
    assert "sft: made before with these settings, brought back" in said
    assert weights(run / "stages" / "more") == first
    assert [weights(path) for path in kept_of(run, "more")] == [second]
    assert go(2e-3)[0] == []


def test_a_stage_that_was_cut_off_is_kept_and_gone_on_with(go: Go, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        go(stop_at=("sft", 2))
    go(2e-3)
    (half,) = kept_of(tmp_path / "run", "sft")
    assert list((half / "checkpoints").glob("step-*"))
    worked, said = go()
    assert worked == ["sft", "more"]
    assert any("going on after step 1" in line for line in said)


def test_long_work_is_asked_about_before_anything_is_touched(go: Go, tmp_path: Path) -> None:
    go()
    mark = tmp_path / "run" / "stages" / "sft" / "stage.json"
    mark.write_text(json.dumps({**json.loads(mark.read_text()), "seconds": 7200.0}))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    asked: list[str] = []
    with pytest.raises(UsageError, match="nothing was changed"):
        go(2e-3, confirm=lambda question: bool(asked.append(question)))
    assert "sft is run again, since settings changed (lr 0.001 → 0.002)" in asked[0]
    assert "2 h 00 min" in asked[0]
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert after == before
    go(2e-3, confirm=lambda question: True)
    go(3e-3, confirm=lambda question: pytest.fail("short work is not asked about"))


def test_fresh_forgets_what_is_there_and_what_is_kept_of_these_settings(go: Go, tmp_path: Path) -> None:
    run = tmp_path / "run"
    go()
    go(2e-3)
    assert go(fresh=True)[0] == ["sft", "more"]
    assert len(kept_of(run, "sft")) == 0  # that of 1e-3 is forgotten, that of 2e-3 was the current one
    go(2e-3)
    assert len(kept_of(run, "sft")) == 1


def test_an_edited_weight_is_found_and_the_edited_file_kept(go: Go, tmp_path: Path) -> None:
    run = tmp_path / "run"
    go()
    (file,) = (run / "stages" / "sft" / "model").glob("*.safetensors")
    whole = file.read_bytes()
    edited = whole[:-1] + bytes([whole[-1] ^ 1])
    file.write_bytes(edited)
    worked, said = go()
    assert worked == ["sft"]  # what follows was made from what is made again
    assert any("model.safetensors is not what it left" in line for line in said)
    assert file.read_bytes() == whole
    assert [weights(path) for path in kept_of(run, "sft")] == [edited]


def test_a_copied_run_is_not_run_again(go: Go, tmp_path: Path) -> None:
    go()
    shutil.copytree(tmp_path / "run", tmp_path / "copy", copy_function=shutil.copyfile)  # with other times
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "copy").rename(tmp_path / "run")
    assert go()[0] == []


def test_a_link_to_another_disk_is_followed(go: Go, tmp_path: Path) -> None:
    disk, stage = tmp_path / "disk" / "big", tmp_path / "run" / "stages" / "sft"
    disk.mkdir(parents=True)
    stage.parent.mkdir(parents=True)
    stage.symlink_to(disk)
    go()
    first = weights(disk)
    go(2e-3)
    assert stage.is_symlink()
    assert weights(disk) != first
    (other,) = kept_of(tmp_path / "run", "sft")
    assert other.resolve().parent == disk.parent
    assert weights(other) == first
    assert go()[0] == []
    assert stage.is_symlink()
    assert weights(disk) == first


def test_clean_lists_asks_and_removes(go: Go, tmp_path: Path) -> None:
    run, said = tmp_path / "run", list[str]()
    go()
    go(2e-3)
    current = weights(run / "stages" / "sft")
    found = cleaning.clean(run, "sft", agree=lambda question: False, say=said.append)
    assert [one["stage"] for one in found["kept"]] == ["sft"]
    assert not found["removed"]
    assert "done in" in said[0]
    assert len(kept_of(run, "sft")) == 1
    cleaning.clean(run, None, agree=lambda question: True, say=said.append)
    assert kept.listed(run) == []
    assert weights(run / "stages" / "sft") == current
    with pytest.raises(UsageError, match="nothing is kept of a stage 'sft'"):
        cleaning.clean(run, "sft", agree=lambda question: True, say=said.append)


def test_only_takes_a_kept_input(go: Go) -> None:
    go()
    go(2e-3, only="sft")
    assert go(only="more")[0] == []
