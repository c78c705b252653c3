"""A full disk, limits, read-only folders: one line that names the remedy, nothing half-written, and on it
goes."""

from __future__ import annotations

import contextlib
import errno
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from keel.config import parse
from keel.errors import MachineError
from keel.pipeline.pipeline import Pipeline
from keel.plan import disk
from keel.rundir import checkpoint, machine_faults
from keel.rundir.machine_faults import explain


@contextlib.contextmanager
def limited(kind: int, count: int) -> Iterator[None]:
    """A limit of this process, while it lasts."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


class OutOfMemoryError(RuntimeError):
    """As torch's, by name."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "no space is left on the disk of /x/y"),
        (OSError(errno.EDQUOT, "quota"), "no space is left on the disk of runs/tiny"),
        (OSError(errno.EFBIG, "File too large"), "runs/tiny: the limit on the size of a file (ulimit -f)"),
        (OSError(errno.EMFILE, "Too many open files"), "too many open files (ulimit -n)"),
        (OSError(errno.EROFS, "Read-only", "a"), "a lies on a disk that is read-only"),
        (PermissionError(errno.EACCES, "denied", "a"), "a cannot be written or read with your rights"),
        (MemoryError(), "the memory is used up"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "the memory is used up"),
        (OutOfMemoryError("CUDA out of memory"), "the GPU's memory is used up"),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), "no space"),
        (
            RuntimeError("unable to open file <x> in read-only mode: Too many (24)"),
            "too many open",
        ),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), "no space"),
    ],
)
def test_what_the_machine_refuses_has_a_line_with_a_remedy(error: Exception, words: str) -> None:
    told = explain(error, Path("runs/tiny"))
    assert isinstance(told, MachineError)
    assert told.exit_code == 1
    assert words in str(told)
    assert "\n" not in str(told)


def test_what_a_library_makes_of_it_is_looked_behind() -> None:
    """torch's writer fails at its end with words of its own; the system's are what it came of."""
    with pytest.raises(RuntimeError) as caught:  # noqa: PT012
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 17408 vs 17302")
    assert "no space is left" in str(explain(caught.value))


@pytest.mark.parametrize(
    "error", [ValueError("x"), FileNotFoundError(errno.ENOENT, "no", "a"), OSError("plain")]
)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    assert explain(error) is None
    with pytest.raises(type(error)) as caught:
        raise error from PermissionError(errno.EACCES, "denied", "probed")  # met on the way, and got over
    assert explain(caught.value) is None


def test_a_log_has_a_whole_line_or_none(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    checkpoint.append(path, '{"step": 1}\n')
    with limited(resource.RLIMIT_FSIZE, 20), pytest.raises(OSError, match="large"):
        checkpoint.append(path, '{"step": 2, "loss": 1.5}\n')
    assert path.read_text() == '{"step": 1}\n'
    checkpoint.append(path, '{"step": 2}\n')
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("room", [100, 3_000])
def test_a_checkpoint_that_does_not_fit_leaves_the_one_before_and_no_part_of_itself(
    tmp_path: Path, room: int
) -> None:
    checkpoint.save(tmp_path, checkpoint.Checkpoint(1, {"w": torch.zeros(8)}))
    with limited(resource.RLIMIT_FSIZE, room), pytest.raises((OSError, RuntimeError)) as caught:
        checkpoint.save(tmp_path, checkpoint.Checkpoint(2, {"w": torch.zeros(2000)}))
    assert isinstance(explain(caught.value, tmp_path), MachineError)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.step == 1


@pytest.fixture
def config(data: Any, tiny_model: Path) -> dict[str, Any]:
    stage = {"model": str(tiny_model), "data": str(data.demonstrations), "max_steps": 3, "batch_size": 4}
    sft = {"kind": "sft", "save_every": 1, **stage}
    return {"name": "tiny", "threads": 1, "device": "cpu", "stages": {"sft": sft}}


def go(config: dict[str, Any], directory: Path, **settings: Any) -> Pipeline:
    pipeline = Pipeline(parse(config), directory, lambda line: None, **settings)
    pipeline._report = lambda: None
    pipeline.run()
    return pipeline


def test_a_run_that_met_a_limit_goes_on_to_the_same_bytes(config: dict[str, Any], tmp_path: Path) -> None:
    whole = go(config, tmp_path / "whole").stage_directory("sft")
    weights = (whole / "model" / "model.safetensors").stat().st_size
    for size in (10, weights - 1):
        with limited(resource.RLIMIT_FSIZE, size), pytest.raises(MachineError, match="ulimit -f"):
            go(config, tmp_path / "cut")
        assert [path for path in (tmp_path / "cut").rglob("*") if "partial" in path.name] == []
    again = go(config, tmp_path / "cut").stage_directory("sft")
    for file in ("metrics.jsonl", "result.json", "model/model.safetensors"):
        assert (again / file).read_bytes() == (whole / file).read_bytes()


def test_a_folder_that_is_a_file_is_said(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(MachineError, match="a part of its path is a file"):
        go(config, tmp_path / "runs" / "tiny")


# ---------------------------------------------------------------- before anything is run


def test_what_a_stage_needs_is_what_it_leaves(config: dict[str, Any], tmp_path: Path) -> None:
    """The reckoned model and checkpoint against the files themselves."""
    seen: list[int] = []

    def progress(*_: Any) -> None:
        seen.extend(path.stat().st_size for path in tmp_path.rglob("tensors.pt"))

    pipeline = Pipeline(parse(config), tmp_path / "run", lambda line: None, progress)
    need = disk.need(pipeline, "sft")
    assert need is not None
    go(config, tmp_path / "run", progress=progress)
    weights = tmp_path / "run" / "stages" / "sft" / "model" / "model.safetensors"
    assert need.model == pytest.approx(weights.stat().st_size, rel=0.1)
    assert need.checkpoint == pytest.approx(max(seen), rel=0.1)


def test_a_disk_without_room_is_said_before_anything_is_run(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = disk.need(Pipeline(parse(config), tmp_path / "run", str), "sft")
    assert need is not None
    usage = shutil.disk_usage(tmp_path)
    said: list[str] = []

    def free(count: int) -> None:
        monkeypatch.setattr(machine_faults.shutil, "disk_usage", lambda _: usage._replace(free=count))
        pipeline = Pipeline(parse(config), tmp_path / "run", said.append, room=disk.room)
        monkeypatch.setattr(pipeline, "_run_stages", lambda *_: None)
        pipeline.run()

    least = need.model + need.checkpoint
    with pytest.raises(
        MachineError, match=r"has .* free, and models and checkpoints of sft take about .*; free some"
    ):
        free(least - 1)
    assert not (tmp_path / "run").exists()
    free(least + 1)  # enough for one checkpoint, not for the one that takes its place
    assert any("it may become full" in line for line in said)
    said.clear()
    free(least + need.checkpoint)
    assert not any("full" in line for line in said)
