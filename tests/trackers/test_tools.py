"""Trackio and TensorBoard for real: what they hold after a run that was killed and went on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from keel.trackers.process import Trackers
from keel.trackers.to_tensorboard import Tensorboard

TRACK = [{"kind": "trackio", "project": "tests", "space": None}, {"kind": "tensorboard", "folder": None}]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, write: Any) -> Path:
    """Steps 1 to 4 sent; then cut back to step 2, as a kill does, and gone on with to step 6."""
    folder = tmp_path_factory.mktemp("tools")
    stage = folder / "run" / "stages" / "sft"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        write(stage, 1, 4)
        said: list[str] = []
        with Trackers(TRACK, folder / "run", said.append) as trackers:
            trackers.follow("sft", "sft", stage, {"lr": 0.1, "model": {"path": "x"}}, False)
        for log in ("metrics", "times"):
            path = stage / f"{log}.jsonl"
            path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
        with Trackers(TRACK, folder / "run", said.append) as trackers:
            trackers.follow("sft", "sft", stage, {"lr": 0.1, "model": {"path": "x"}}, False)
            for log, name in (("metrics", "loss"), ("times", "train")):
                with (stage / f"{log}.jsonl").open("a") as handle:
                    handle.writelines(json.dumps({"step": s, name: 1 / s}) + "\n" for s in range(3, 7))
            (stage / "result.json").write_text('{"eval_loss": 0.25}')
            trackers.ended("sft", True)
    assert sorted(set(said)) == [
        f"tensorboard: tensorboard --logdir {folder / 'run' / 'tensorboard'}",
        "trackio: trackio show --project tests",
    ]
    return folder


def test_trackio_holds_every_step_once(run: Path) -> None:
    read = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as S; name = S.get_runs('tests');"
        "print(json.dumps([name, S.get_logs('tests', name[0]), S.get_alerts('tests', name[0]), "
        "S.get_run_config('tests', name[0])], default=str))"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(run / "trackio")}
    output = subprocess.run(
        [sys.executable, "-c", read], env=environment, capture_output=True, text=True, check=True
    )
    names, logs, alerts, config = json.loads(output.stdout)
    assert len(names) == 1
    assert names[0].startswith("run-sft-")
    losses = [(row["step"], row["loss"]) for row in logs if "loss" in row]
    assert losses == [(s, 1 / s) for s in range(1, 7)]
    assert all("time/train" in row for row in logs if "loss" in row)
    (table,) = [row["samples"]["_value"] for row in logs if "samples" in row]
    assert table[0]["prompt"] == "&lt;b&gt;hi&lt;/b&gt;"  # markup of a model's is shown, not read
    assert [(alert["title"], alert["level"]) for alert in alerts] == [("length_drift", "warn")]
    assert [row["result/eval_loss"] for row in logs if "result/eval_loss" in row] == [0.25]
    assert (config["lr"], config["_Group"], config["stage"]) == (0.1, "run", "sft")


def test_tensorboard_holds_every_step_once(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (run / "run" / "tensorboard").iterdir()
    assert len(list(folder.iterdir())) == 1  # written anew, not beside the first one
    read = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [
        (s, pytest.approx(1 / s)) for s in range(1, 7)
    ]
    assert [(e.step, e.value) for e in read.Scalars("result/eval_loss")] == [(6, 0.25)]
    assert [e.step for e in read.Scalars("time/train")] == list(range(1, 7))
    texts = {tag: read.Tensors(tag) for tag in read.Tags()["tensors"]}
    assert set(texts) == {"settings", "samples/0", "findings/length_drift"}
    shown = texts["samples/0"][0].tensor_proto.string_val[0].decode()
    assert '"completion": "|yo"' in shown
    assert all(line.startswith("    ") for line in shown.splitlines())  # code, in which no markup is read


def test_tensorboard_leaves_files_of_others_alone(tmp_path: Path) -> None:
    from keel.trackers.protocol import NOTHING, TrackedStage

    stage = TrackedStage("run", "sft", "sft", "abc123", str(tmp_path), {})
    tracker = Tensorboard(str(tmp_path / "all"))
    other = tmp_path / "all" / "run-sft-abc123" / "events.out.tfevents.1.host"
    other.parent.mkdir(parents=True)
    other.touch()
    for _ in range(2):
        assert tracker.open(stage) == NOTHING
        tracker.close(True)
    assert other.exists()
    assert len(list(other.parent.iterdir())) == 2
