"""A stage's logs as a run writes them, and a tracker of another package that writes what it is sent."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

RECORDER = '''
"""Writes what it is sent to a file, a line a call; does what `fault` says."""
import json, os, time


class Recorder:
    def __init__(self, path, fault="", last=None):
        self.path, self.fault, self.last = path, fault, last

    def write(self, **what):
        with open(self.path, "a") as handle:
            handle.write(json.dumps(what) + "\\n")

    def open(self, stage):
        if os.path.exists(self.fault + ".hang"):
            time.sleep(3600)
        self.write(open=stage.label, settings=dict(stage.settings))
        return self.last

    def where(self):
        return "read " + self.path

    def send(self, frames):
        if os.path.exists(self.fault + ".fail"):
            raise ConnectionError("nobody answers\\nat all")
        if os.path.exists(self.fault + ".exit"):
            os._exit(7)
        for frame in frames:
            self.write(step=frame.step, numbers=frame.numbers, samples=frame.samples, findings=frame.findings)

    def result(self, step, measures):
        self.write(result=dict(measures), step=step)

    def close(self, done):
        self.write(closed=done)
'''


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package that adds the tracker `recorder`; returns the file that it writes."""
    site = tmp_path / "site"
    info = site / "recorder_package-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "recorder_package.py").write_text(RECORDER)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: recorder-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[keel.trackers]\nrecorder = recorder_package:Recorder\n")
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    yield tmp_path / "received.jsonl"
    sys.modules.pop("recorder_package", None)


Write = Callable[[Path, int, int], None]


@pytest.fixture(scope="session")
def write() -> Write:
    """Append the logs of steps `first` to `last`, with a sample and a finding at the first one."""

    def go(folder: Path, first: int, last: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        logs: dict[str, list[dict[str, Any]]] = {
            "samples": [{"step": first, "prompt": "<b>hi</b>", "completion": "|yo", "rewards": {"r": 0.5}}],
            "metrics": [{"step": s, "loss": 1 / s, "objective/kl": s / 10} for s in range(first, last + 1)],
            "times": [{"step": s, "train": 0.5} for s in range(first, last + 1)],
            "events": [
                {
                    "step": first,
                    "check": "length_drift",
                    "severity": "act",
                    "evidence": "long",
                    "remedy": "cap",
                }
            ],
        }
        for log, rows in logs.items():
            with (folder / f"{log}.jsonl").open("a") as handle:
                handle.writelines(json.dumps(row) + "\n" for row in rows)

    return go
