"""All checks, kept up with a run step by step: an alarm is raised once, and again after an action."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from keel.diagnosis import learning, samples
from keel.diagnosis.findings import SEVERITIES, Check, Conditions, Finding, History

CHECKS: dict[str, Check] = {check.name: check for check in (*learning.CHECKS, *samples.CHECKS)}


class Watch:
    """Every check on a history that grows. Deterministic: the same metrics and actions give the same
    findings."""

    def __init__(self, conditions: Conditions) -> None:
        self.history = History(conditions)
        self._raised: dict[str, int] = {}  # check → the worst severity said since the last action

    def see(self, step: int, metrics: Mapping[str, float]) -> list[Finding]:
        """The findings that are new at this step: a check that was silent, or that has become worse."""
        self.history.add(step, metrics)
        findings = (check.finding(self.history) for check in CHECKS.values())
        return [finding for finding in findings if finding and self._is_news(finding)]

    def acted(self, step: int) -> None:
        """Something was done: windows begin anew, and what lasts is found again."""
        self.history.since, self._raised = step, {}

    def _is_news(self, finding: Finding) -> bool:
        severity = SEVERITIES.index(finding.severity)
        if severity <= self._raised.get(finding.check, -1):
            return False
        self._raised[finding.check] = severity
        return True


def replay(
    rows: Iterable[Mapping[str, Any]], conditions: Conditions, acted: Collection[int] = ()
) -> tuple[Watch, list[Finding]]:
    """A watch that has seen all rows (each with its `step`), and what it found on the way. acted: steps of
    actions."""
    watch, findings = Watch(conditions), []
    for row in rows:
        step = int(row["step"])
        findings += watch.see(step, row)
        if step in acted:
            watch.acted(step)
    return watch, findings
