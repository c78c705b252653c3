"""What a command has started ends with it, however it ends: no point of a sweep trains on for nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keel.rundir.worker import Worker, worker

pytestmark = pytest.mark.attack

STARTS_WITHIN, ENDS_WITHIN = 120.0, 30.0  # seconds, on a machine with other work
ENDS = {
    "SIGTERM": [signal.SIGTERM],
    "SIGTERM twice": [signal.SIGTERM, signal.SIGTERM],
    "SIGINT twice": [signal.SIGINT, signal.SIGINT],
    "SIGKILL": [signal.SIGKILL],
}


def waited(seconds: float, what: Callable[[], Any]) -> Any:
    """The first true answer within so many seconds, else the last one."""
    until = time.monotonic() + seconds
    while not (found := what()) and time.monotonic() < until:
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("how", ENDS)
def test_the_points_of_a_sweep_end_with_it(
    how: str, every_kind: dict[str, Any], write_config: Any, tmp_path: Path
) -> None:
    """Two points train, in processes of their own; the sweep is ended."""
    endless = {**every_kind["sft"], "epochs": 100_000, "save_every": 50, "eval_every": 1_000_000}
    endless.pop("max_steps", None)
    config = write_config(tmp_path, {"sft": endless})
    sweep = subprocess.Popen(
        [sys.executable, "-m", "keel", "sweep", str(config), "--seeds", "0,1", "--jobs", "2", "--name", "s"],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that signals reach the sweep alone
    )
    points = [tmp_path / "runs" / "s" / "points" / f"seed-{seed}" for seed in (0, 1)]
    found: list[Worker] = []
    try:

        def at_work() -> bool:
            found[:] = [one for point in points if (one := worker(point)) is not None]
            logged = [(point / "stages" / "sft" / "metrics.jsonl").exists() for point in points]
            return len(found) == 2 and all(logged)

        assert waited(STARTS_WITHIN, at_work), sweep.poll()
        assert len({one.pid for one in found}) == 2
        for number in ENDS[how]:
            sweep.send_signal(number)
            time.sleep(0.02)
        _, said = sweep.communicate(timeout=ENDS_WITHIN)
        assert waited(ENDS_WITHIN, lambda: all(worker(point) is None for point in points))
        assert waited(ENDS_WITHIN, lambda: not any(is_alive(one.pid) for one in found))
        assert "Traceback" not in said
        assert sweep.returncode == (-signal.SIGKILL if how == "SIGKILL" else 130)
    finally:
        for pid in [sweep.pid, *(one.pid for one in found)]:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        sweep.wait()


def is_alive(pid: int) -> bool:
    """Whether there is such a process, one that has ended and is not fetched aside."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
