"""Findings and actions of a stage in words: what the verdict says of them, and the list below it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from keel.diagnosis import logs
from keel.diagnosis.findings import SEVERITIES, Finding
from keel.diagnosis.logs import Diagnosis
from keel.errors import DataError
from keel.report.notes import short
from keel.report.reading import Run, StageRun

_TIMES = {1: "once", 2: "twice", 3: "three times"}
_DONE = {"rollback": "rolled back", "adjust": "adjusted", "stop": "stopped"}
_KEPT = "kept the best"
MOST_LINES, LONGEST = 500, 1000  # of a stage's findings, and characters of one's text


class Line(NamedTuple):
    """One finding or action, for a table."""

    step: int
    level: str  # note | warn | act | done
    name: str
    evidence: str
    cause: str
    remedy: str


def diagnoses(run: Run) -> dict[str, Diagnosis]:
    """Stage → its diagnosis, for each that learns from its own samples and has metrics. One whose logs are
    broken has none."""
    found: dict[str, Diagnosis] = {}
    for stage in run.stages:
        if stage.shown_as.on_policy and (stage.metrics or (stage.directory / "events.jsonl").exists()):
            what = f"what was found while {stage.name} trained is not known"
            one = run.notes.of(what, lambda stage=stage: _diagnosis(stage), None)
            found |= {} if one is None else {stage.name: one}
    return found


def _diagnosis(stage: StageRun) -> Diagnosis | None:
    """None where a log is nothing that may be read."""
    for name in ("metrics.jsonl", "events.jsonl"):
        path = stage.directory / name
        if stage.files is not None and os.path.lexists(path):
            handle = stage.files.open(path)
            if handle is None:
                return None
            handle.close()
    try:
        return logs.stage(stage.directory, stage.settings)
    except DataError as error:  # which names the whole path: see RunFiles.name
        folder = f"{stage.directory.parent.parent}{os.sep}"
        raise DataError(str(error).replace(folder, "", 1)) from None


def said(diagnosis: Diagnosis) -> str:
    """ "the proxy rose, the judge fell from step 40: rolled back twice", "2 findings", …; "" for none."""
    found = logs.worst(diagnosis.findings)
    if not found:
        return ""
    kinds = [str(action["event"]) for action in diagnosis.actions]
    done = ", ".join(
        word if kind == "stop" else f"{word} {_times(kinds.count(kind))}"
        for kind, word in _DONE.items()
        if kind in kinds
    )
    judged = next((f for f in found if f.check == "judge_falls" and f.severity == "act"), None)
    urgent = judged or found[0]
    if judged:
        words = f"the proxy rose, the judge fell from step {judged.step}"
    elif urgent.severity == "act":
        words = f"{urgent.check.replace('_', ' ')} from step {urgent.step}"
    else:
        words = ", ".join(
            f"{count} {word}" + ("s" if count > 1 else "")
            for severity, word in zip(reversed(SEVERITIES[:2]), ("warning", "note"), strict=True)
            if (count := sum(f.severity == severity for f in found))
        )
    return words + (f": {done}" if done else "")


def _times(count: int) -> str:
    return _TIMES.get(count, f"{count} times")


def lines(diagnosis: Diagnosis) -> list[Line]:
    """Findings and actions by step; an action after what led to it."""
    rows = [
        Line(f.step, *(short(text, LONGEST) for text in _texts(f))) for f in diagnosis.findings[:MOST_LINES]
    ]
    rows += [
        Line(int(a["step"]), "done", _DONE.get(a["event"], _KEPT), action_sentence(a), "", "")
        for a in diagnosis.actions[:MOST_LINES]
    ]
    return sorted(rows, key=lambda row: (row.step, row.level == "done"))


def _texts(finding: Finding) -> tuple[str, ...]:
    """As they stand in a line, after the step."""
    name = finding.check.replace("_", " ")
    return finding.severity, name, finding.evidence, finding.cause, finding.remedy


def action_sentence(action: Mapping[str, Any]) -> str:
    """An action as a sentence."""
    if action["event"] == "keep":
        return f"the weights of step {action['to']} were kept, which the judge liked best"
    because = ", ".join(action["checks"]).replace("_", " ")
    if action["event"] == "stop":
        return f"stopped at step {action['step']} for {because}; the weights of step {action['to']} were kept"
    went = f", back to the weights of step {action['to']}" if action["to"] is not None else ""
    return (
        f"{_DONE[action['event']]} at step {action['step']} for {because}{went}; "
        f"from then on β {action['kl_coef']:.3g}, learning rate × {action['lr_factor']:g}"
    )
