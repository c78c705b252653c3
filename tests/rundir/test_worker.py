"""Who works in a run: found by its lock, and by nothing that a lock of somebody else says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from keel.pipeline.pipeline import locked
from keel.rundir import worker

HOLD = """
import fcntl, signal, sys, time
from pathlib import Path
from keel.rundir import worker
{before}
with (Path(sys.argv[1]) / worker.LOCK).open("a+", encoding="utf-8") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    worker.sign(lock)
    try:
        print("here", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("kindly", flush=True)
"""


def holder(run: Path, before: str = "") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(before=before), str(run)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    return process


def test_who_holds_the_lock_is_known_while_it_does(tmp_path):
    assert worker.worker(tmp_path) is None
    with locked(tmp_path):
        assert worker.worker(tmp_path) == worker.Worker(os.getpid(), signal.SIGINT)
    assert (tmp_path / ".lock").exists()
    assert worker.worker(tmp_path) is None  # it lives on, and has let go


def test_a_run_is_stopped_as_by_ctrl_c(tmp_path):
    process = holder(tmp_path)
    try:
        assert worker.stop(tmp_path) == process.pid
        assert process.communicate(timeout=20)[0] == "kindly\n"
    finally:
        process.kill()
    assert worker.stop(tmp_path) is None


def test_a_process_that_ignores_ctrl_c_is_sent_sigterm(tmp_path):
    process = holder(tmp_path, "signal.signal(signal.SIGINT, signal.SIG_IGN)")
    try:
        found = worker.worker(tmp_path)
        assert found is not None
        assert found.signal is signal.SIGTERM
        process.kill()
        process.wait()
        assert worker.worker(tmp_path) is None
    finally:
        process.kill()


@pytest.mark.parametrize(
    "change",
    [
        {"born": "1"},
        {"host": "elsewhere"},
        {"pid": 1},
        {"pid": -1},
        {"pid": True},
        {"signal": "SIGKILL"},
        {"pid": "7"},
    ],
    ids=str,
)
def test_a_lock_that_is_not_the_processs_own_stops_nothing(tmp_path, change, monkeypatch):
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(pid))
    with locked(tmp_path):
        facts = json.loads((tmp_path / ".lock").read_text())
        (tmp_path / ".lock").write_text(json.dumps({**facts, **change}))
        assert worker.stop(tmp_path) is None
    assert not killed


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the system does not say who holds a file")
def test_a_planted_lock_names_nobody(tmp_path):
    """A folder from elsewhere whose lock names a live process of this machine, with everything right."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "theirs").mkdir()
    with locked(tmp_path / "mine"):
        (tmp_path / "theirs" / ".lock").write_bytes((tmp_path / "mine" / ".lock").read_bytes())
        assert worker.worker(tmp_path / "mine") is not None
        assert worker.worker(tmp_path / "theirs") is None


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", '{"pid": 1e400}', "9" * 2000])
def test_a_lock_of_noise(tmp_path, text):
    (tmp_path / ".lock").write_text(text)
    assert worker.worker(tmp_path) is None


def test_a_second_process_does_not_disturb_the_first(tmp_path):
    from keel.errors import KeelError

    with locked(tmp_path):
        before = (tmp_path / ".lock").read_text()
        with pytest.raises(KeelError), locked(tmp_path):
            pass
        assert (tmp_path / ".lock").read_text() == before


def test_a_lock_that_leads_to_another_runs_stops_nothing(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "theirs").mkdir()
    with locked(tmp_path / "mine"):
        (tmp_path / "theirs" / ".lock").symlink_to(tmp_path / "mine" / ".lock")
        assert worker.worker(tmp_path / "mine") is not None
        assert worker.worker(tmp_path / "theirs") is None
