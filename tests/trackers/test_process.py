"""The process beside a run: what arrives, and what a tracker that fails, hangs or ends costs the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from keel.errors import UsageError
from keel.trackers import process
from keel.trackers.process import Trackers, run_name

SAID_ONCE = "The run goes on; its own logs are whole, and what is not sent is sent later"


def rows_of(path: Path) -> list[dict[str, Any]]:
    """A log's rows; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def settings(received: Path, fault: Path | None = None, **more: Any) -> list[dict[str, Any]]:
    return [{"kind": "recorder", "args": {"path": str(received), "fault": str(fault or ""), **more}}]


def stage_of(run: Path, write: Any, last: int = 3) -> Path:
    folder = run / "stages" / "sft"
    write(folder, 1, last)
    (folder / "result.json").write_text('{"accuracy": {"mean": 0.5}}')
    return folder


def send(run: Path, track: list[dict[str, Any]], say: Any, wait: float = 20, *, done: bool = True) -> float:
    """Follow a stage that is written already; the seconds it took."""
    start = time.monotonic()
    with Trackers(track, run, say, wait) as trackers:
        trackers.follow("sft", "sft", run / "stages" / "sft", {"lr": 0.1}, done)
    return time.monotonic() - start


def steps(received: Path) -> list[int]:
    return [row["step"] for row in rows_of(received) if row.get("numbers")]


def test_metrics_samples_findings_and_result_arrive(tmp_path: Path, recorder: Path, write: Any) -> None:
    run, said = tmp_path / "run", list[str]()
    with Trackers(settings(recorder), run, said.append) as trackers:
        trackers.follow("sft", "sft", run / "stages" / "sft", {"lr": 0.1}, done=False)
        folder = stage_of(run, write)  # written while it is followed
        trackers.ended("sft", done=True)
    opened, *frames, result, closed = rows_of(recorder)
    assert opened["open"].startswith("run-sft-")
    assert opened["settings"] == {"lr": 0.1}
    assert [row["numbers"]["loss"] for row in frames] == [
        row["loss"] for row in rows_of(folder / "metrics.jsonl")
    ]
    assert frames[0]["samples"] == rows_of(folder / "samples.jsonl")
    assert frames[0]["findings"] == rows_of(folder / "events.jsonl")
    assert (result["result"], closed["closed"]) == ({"accuracy/mean": 0.5}, True)
    assert said == [f"recorder: read {recorder}"]
    # all is there: another start says and sends nothing
    said.clear()
    send(run, settings(recorder), said.append)
    assert (said, len(rows_of(recorder))) == ([], 6)


def test_what_failed_is_one_line_and_is_sent_by_the_next_start(
    tmp_path: Path, recorder: Path, write: Any
) -> None:
    run, fault, said = tmp_path / "run", tmp_path / "fault", list[str]()
    stage_of(run, write)
    fault.with_suffix(".fail").touch()
    send(run, settings(recorder, fault), said.append)
    assert said == [
        f"recorder: read {recorder}",
        f"recorder: ConnectionError: nobody answers at all. {SAID_ONCE}",
        "recorder: has not got 8 lines of the logs; the next start of this run sends them",
    ]
    assert steps(recorder) == []
    fault.with_suffix(".fail").unlink()
    send(run, settings(recorder, fault), said.append)
    labels = {row["open"] for row in rows_of(recorder) if "open" in row}
    assert (steps(recorder), len(labels)) == ([1, 2, 3], 1)  # the same run of the tracker


def test_a_failure_in_a_run_is_tried_again_while_it_lasts(
    tmp_path: Path, recorder: Path, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, fault, said = tmp_path / "run", tmp_path / "fault", list[str]()
    stage_of(run, write)
    fault.with_suffix(".fail").touch()
    with Trackers(settings(recorder, fault), run, said.append) as trackers:
        trackers.follow("sft", "sft", run / "stages" / "sft", {}, True)
        _until(lambda: any("nobody answers" in line for line in said))
        fault.with_suffix(".fail").unlink()
    assert steps(recorder) == [1, 2, 3]
    assert len(said) == 2  # where to look, and the trouble once


@pytest.mark.parametrize(
    ("fault", "words"), [("hang", "did not end in time"), ("exit", "its process has ended")]
)
def test_a_tracker_that_hangs_or_ends_costs_the_run_a_bounded_time(
    tmp_path: Path, recorder: Path, write: Any, fault: str, words: str
) -> None:
    run, said = tmp_path / "run", list[str]()
    stage_of(run, write)
    marked = tmp_path / "fault"
    marked.with_suffix(f".{fault}").touch()
    start = time.monotonic()
    with Trackers(settings(recorder, marked), run, said.append, wait=0.5) as trackers:
        for _ in range(50):  # a run says what begins and what has ended, and waits for nothing
            trackers.follow("sft", "sft", run / "stages" / "sft", {}, False)
            trackers.ended("sft", done=True)
        assert time.monotonic() - start < 1
    assert time.monotonic() - start < 6
    assert any(words in line for line in said), said
    assert _lingering(run) == []


def test_a_run_that_is_killed_leaves_a_process_that_sends_what_is_there_and_ends(
    tmp_path: Path, recorder: Path, write: Any
) -> None:
    run = tmp_path / "run"
    folder = stage_of(run, write)
    script = (
        "import json, sys, time; from pathlib import Path; from keel.trackers.process import Trackers\n"
        "track, run, folder = json.loads(sys.argv[1])\n"
        "trackers = Trackers(track, Path(run), print).__enter__()\n"
        "trackers.follow('sft', 'sft', Path(folder), {}, False)\n"
        "print('ready', flush=True); time.sleep(600)\n"
    )
    arguments = json.dumps([settings(recorder), str(run), str(folder)])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    child = subprocess.Popen(
        [sys.executable, "-c", script, arguments], stdout=subprocess.PIPE, env=environment, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    _until(lambda: rows_of(recorder)[-1:] == [{"closed": False}])  # and no result: the stage is not done
    _until(lambda: _lingering(run) == [])
    assert steps(recorder) == [1, 2, 3]
    # the same command goes on
    said = list[str]()
    send(run, settings(recorder), said.append)
    assert steps(recorder) == [1, 2, 3]
    assert any("result" in row for row in rows_of(recorder))


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(process.MODULES, "mlflow", "no_such_module_of_anybody")
    with pytest.raises(
        UsageError, match=r"track: mlflow is not installed: pip install 'keel-rlhf\[mlflow\]'"
    ):
        process.check(["trackio", "mlflow"])
    process.check(["trackio", "tensorboard"])


def test_a_folder_that_cannot_be_written_is_no_end_of_a_run(tmp_path: Path, recorder: Path) -> None:
    said = list[str]()
    run = tmp_path / "run"
    run.mkdir()
    (run / "trackers").write_text("a file where a folder belongs")
    send(run, settings(recorder), said.append)
    assert len(said) == 1
    assert SAID_ONCE in said[0]


def test_a_point_of_a_sweep_is_called_by_its_sweep_too(tmp_path: Path) -> None:
    assert run_name(tmp_path / "helpdesk") == "helpdesk"
    assert run_name(tmp_path / "kl-sweep" / "points" / "seed-0") == "kl-sweep-seed-0"


def _lingering(run: Path) -> list[str]:
    """Processes of trackers that still hold the run's log."""
    found: list[str] = []
    for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else []:
        if entry.name.isdigit():
            try:
                if os.readlink(entry / "fd" / "2").startswith(str(run.resolve())):
                    found.append(entry.name)
            except OSError:
                continue
    return found


def _until(condition: Any, seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come to that in time"
        time.sleep(0.05)
