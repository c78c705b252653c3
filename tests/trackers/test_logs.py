"""A stage's logs as frames: every step once, whatever was cut back in between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keel.trackers.logs import AT_ONCE, LOGS, Sent, StageLogs
from keel.trackers.protocol import NOTHING, Frame, finding_text, flat


def all_frames(logs: StageLogs, ended: bool = True) -> list[Frame]:
    """What is sent until there is nothing left, as the follower does it."""
    found: list[Frame] = []
    while frames := logs.frames(ended):
        logs.were_sent(frames)
        found += frames
    return found


def steps(frames: list[Frame]) -> list[int]:
    return [frame.step for frame in frames if frame.numbers]


def test_a_frame_has_what_belongs_to_its_step(tmp_path: Path, write: Any) -> None:
    write(tmp_path, 1, 2)
    first, second = all_frames(StageLogs(tmp_path, "t"))
    assert first.numbers == {"loss": 1.0, "objective/kl": 0.1, "time/train": 0.5}
    assert [row["completion"] for row in first.samples] == ["|yo"]
    assert [row["check"] for row in first.findings] == ["length_drift"]
    assert (second.step, second.samples, second.findings) == (2, [], [])


def test_the_newest_step_waits_until_its_seconds_are_there(tmp_path: Path, write: Any) -> None:
    write(tmp_path, 1, 3)
    logs = StageLogs(tmp_path, "t")
    assert steps(logs.frames(False)) == [1, 2]
    assert steps(logs.frames(False)) == [3]
    assert logs.frames(False) == []


def test_half_a_line_waits_for_its_other_half(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1}\n{"step": 2, "lo')
    logs = StageLogs(tmp_path, "t")
    assert steps(all_frames(logs)) == [1]
    with path.open("a") as handle:
        handle.write('ss": 2}\n')
    assert steps(all_frames(logs)) == [2]


@pytest.mark.parametrize("cut", range(7))
def test_a_stage_that_goes_on_from_a_checkpoint_sends_no_step_twice_and_loses_none(
    tmp_path: Path, write: Any, cut: int
) -> None:
    """The logs are cut back to any length after any number of steps was sent, and written again."""
    write(tmp_path, 1, 6)
    whole = {log: (tmp_path / f"{log}.jsonl").read_bytes() for log in LOGS}
    logs, received = StageLogs(tmp_path, "t"), list[Frame]()
    for sent in range(1, 7):
        received += (frames := logs.frames(False))
        logs.were_sent(frames)
        logs = StageLogs(tmp_path, "t") if sent % 2 else logs  # the process is another one, or the same
    for log in LOGS:
        lines = whole[log].splitlines(keepends=True)
        (tmp_path / f"{log}.jsonl").write_bytes(b"".join(lines[:cut]))
    received += all_frames(logs, ended=False)
    for log in LOGS:
        (tmp_path / f"{log}.jsonl").write_bytes(whole[log])
    received += all_frames(logs)
    assert steps(received) == [1, 2, 3, 4, 5, 6]
    assert sum(len(frame.samples) for frame in received) == 1
    assert sum(len(frame.findings) for frame in received) == 1


def test_what_a_tracker_holds_counts_more_than_keels_record(tmp_path: Path, write: Any) -> None:
    write(tmp_path, 1, 5)
    logs = StageLogs(tmp_path, "t")
    all_frames(logs)
    logs.rewind(3)  # two steps that keel had handed over never arrived
    again = all_frames(logs)
    assert steps(again) == [4, 5]
    assert not any(frame.samples for frame in again)
    logs.rewind(NOTHING)  # its database is gone
    assert steps(all_frames(logs)) == [1, 2, 3, 4, 5]
    logs.rewind(None)
    assert all_frames(logs) == []


def test_many_steps_come_in_parts(tmp_path: Path, write: Any) -> None:
    write(tmp_path, 1, 3 * AT_ONCE + 7)
    logs = StageLogs(tmp_path, "t")
    assert len(logs.frames(True)) == AT_ONCE
    logs = StageLogs(tmp_path, "t")
    assert steps(all_frames(logs)) == list(range(1, 3 * AT_ONCE + 8))
    assert logs.unsent() == 0


def test_rows_without_a_step_come_at_the_end(tmp_path: Path) -> None:
    """As those of `evaluate`, which logs no metrics."""
    (tmp_path / "samples.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    logs = StageLogs(tmp_path, "t")
    assert logs.frames(False) == []
    (frame,) = all_frames(logs)
    assert (frame.step, [row["prompt"] for row in frame.samples]) == (0, ["a", "b"])


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"id": 1}', '{"id": "a", "lines": [], "step": 0, "result": 0}']
)
def test_a_record_that_is_broken_begins_anew(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tracker-t.json"
    path.write_text(text)
    assert Sent.read(path).lines == dict.fromkeys(LOGS, 0)
    assert len(Sent.read(path).id) == 6


def test_flat_keeps_numbers_alone() -> None:
    value = {
        "models": {"sft": {"gold": {"mean": 0.5, "note": "x"}}},
        "members": [1, 2],
        "ok": True,
        "no": None,
    }
    assert flat(value) == {"models/sft/gold/mean": 0.5, "members/0": 1.0, "members/1": 2.0}


def test_a_finding_and_what_was_done_about_it_have_a_text() -> None:
    finding = {"step": 3, "check": "kl_runaway", "severity": "act", "evidence": "KL 40", "remedy": "raise β"}
    assert finding_text(finding) == ("kl_runaway", "KL 40; raise β", True)
    event = json.loads('{"step": 3, "event": "rollback", "to": 2, "kl_coef": 0.1, "lr_factor": null}')
    assert finding_text(event) == ("rollback", "to 2, kl_coef 0.1", False)
