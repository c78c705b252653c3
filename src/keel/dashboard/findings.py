"""What diagnosis says of a stage while it runs, and to which curves it belongs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keel.dashboard.table import numbers, parse_object, step_of
from keel.dashboard.tail import Tail
from keel.diagnosis import logs
from keel.diagnosis.findings import SEVERITIES, Conditions, Finding, Severity, conditions
from keel.diagnosis.watch import Watch
from keel.errors import DataError
from keel.report import health

MOST_REPLAYED = 64 * 2**20  # bytes of metrics, and
MOST_ROWS = (
    10_000  # steps: of more only what the run itself found is shown, for checks take time over all steps
)
MOST_FOUND = 1000  # findings and actions of a stage that are shown
SLICE = 0.15  # seconds of checking at a time
TOO_LONG = "There are too many steps to check them all again: these are the findings of the run itself."
TOO_MANY = f"There are more than {MOST_FOUND:,} findings: the later ones are left out."
CHECKING = "The metrics are still being checked."
UNLIKE = "The checks cannot be made on numbers like these: only what the run itself found is shown."
LONGEST = 2000  # characters of a text

# check → the curves that show what it found; a check that is not here belongs to all
CONCERNS: Mapping[str, tuple[str, ...]] = {
    "kl_too_high": ("objective/kl", "objective/kl_exact", "kl"),
    "kl_negative": ("objective/kl", "kl"),
    "entropy_collapse": ("policy/entropy_avg", "objective/entropy", "entropy"),
    "teacher_farther": ("loss/policy_avg",),
    "curriculum_spent": ("objective/scores",),
    "judge_silent": ("objective/scores",),
    "clip_fraction": ("policy/clipfrac_avg", "clip_ratio", "clip_ratio/region_mean"),
    "rate_held_back": ("policy/lr_factor", "lr"),
    "critic_unexplaining": ("val/explained_variance",),
    "sampler_disagrees": ("rollout/sampler_drift", "sampling/sampling_logp_difference/mean"),
    "stale_samples": ("rollout/staleness_kl", "rollout/importance_capped"),
    "reward_implausible": ("objective/scores", "objective/scores_std", "reward"),
    "reward_falls": ("objective/scores", "objective/scores_std", "reward"),
    "reward_without_spread": ("objective/scores_std", "reward_std"),
    "nothing_rewarded": ("objective/scores", "reward"),
    "length_drift": ("rollout/response_length", "completions/mean_length"),
    "truncated_rising": ("rollout/truncated", "completions/clipped_ratio"),
    "repetition": ("rollout/repetition",),
    "groups_all_equal": ("frac_reward_zero_std",),
    "judge_falls": ("eval/judge", "eval/objective/scores", "objective/scores"),
    "reward_is_length": ("rollout/length_correlation", "rollout/response_length"),
}


class Findings:
    """The findings and actions of a stage, kept up with its files. Not for two threads at once."""

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        self._metrics, self._events = Tail(directory / "metrics.jsonl"), Tail(directory / "events.jsonl")
        self._settings = settings
        self.note = ""
        self._start()

    def _start(self) -> None:
        self._watch = Watch(_conditions(self._settings))
        self._unlike = False  # a run of keel's: its numbers break a check
        self._logged: list[Finding] = []
        self._again: list[Finding] = []
        self._actions: list[dict[str, Any]] = []
        self._acted: set[int] = set()
        self._waiting: deque[bytes] = deque()
        self._skips = False

    def refresh(self) -> bool:
        """Read what is new, and check it for a short while; whether more is left. Both files are read anew
        where one of them was cut back."""
        if self._read_events() or self._read_metrics():
            self._metrics, self._events = Tail(self._metrics.path), Tail(self._events.path)
            self._start()
            self._read_events()
            self._read_metrics()
        until = time.monotonic() + SLICE
        while self._waiting and time.monotonic() < until:
            self._check(self._waiting.popleft())
        many = len(self._logged) + len(self._again) + len(self._actions) >= MOST_FOUND
        self.note = (
            TOO_LONG if self._skips else TOO_MANY if many else UNLIKE if self._unlike
            else CHECKING if self._waiting else ""
        )  # fmt: skip
        return bool(self._waiting)

    def _read_events(self) -> bool:
        for piece in self._events.read():
            if piece.reset:
                return True
            for line in piece.data.splitlines():
                row = parse_object(line)
                if row is not None:
                    self._event(row)
        return False

    def _event(self, row: dict[str, Any]) -> None:
        step = step_of(row, 0)
        if len(self._logged) + len(self._actions) >= MOST_FOUND:
            return
        if row.get("event") == "finding":
            texts = {name: str(row.get(name, ""))[:LONGEST] for name in ("evidence", "cause", "remedy")}
            known: dict[object, Severity] = {one: one for one in SEVERITIES}
            severity = known.get(str(row.get("severity")), "note")
            self._logged.append(Finding(str(row.get("check", ""))[:80], severity, step, **texts))
            return
        self._actions.append({**row, "step": step})
        self._acted.add(step)
        if step <= self._watch.history.step:
            self._watch.acted(step)

    def _read_metrics(self) -> bool:
        if self._skips:
            return False
        first = self._metrics.offset == 0
        try:
            if first and self._metrics.path.stat().st_size > MOST_REPLAYED:
                self._skips = True
                return False
        except OSError:
            return False
        for piece in self._metrics.read():
            if piece.reset:
                return True
            self._waiting += piece.data.splitlines()
        if first and len(self._waiting) > MOST_ROWS:
            self._skips = True
            self._waiting.clear()
        return False

    def _check(self, line: bytes) -> None:
        row = parse_object(line)
        if row is None or self._unlike or len(self._again) >= MOST_FOUND:
            return
        step = step_of(row, self._watch.history.step + 1)
        named = {logs.RENAMED.get(name, name): value for name, value in numbers(row).items()}
        try:
            self._again += self._watch.see(step, named)
        except (TypeError, ArithmeticError, ValueError):  # settings of other types, sums beyond any number
            self._unlike = True
            return
        if step in self._acted:
            self._watch.acted(step)

    def rows(self) -> list[dict[str, Any]]:
        """Findings and actions by step."""
        known = {(f.check, f.severity, f.step) for f in self._logged}
        new = [f for f in self._again if (f.check, f.severity, f.step) not in known]
        return rows_of([*self._logged, *new], self._actions)[:MOST_FOUND]


class StateFindings:
    """The same of a trainer_state.json."""

    def __init__(self) -> None:
        self.note = ""
        self._seen: tuple[Path, int] | None = None
        self._rows: list[dict[str, Any]] = []

    def refresh(self, path: Path | None, rows: int) -> None:
        """Check the file again if it changed. rows: how many it has."""
        try:
            seen = (path, path.stat().st_mtime_ns) if path else None
            if path is None or seen == self._seen:
                return
            self._seen = seen
            self.note = TOO_LONG if rows > MOST_ROWS else ""
            if not self.note and path.stat().st_size > MOST_REPLAYED:
                self.note = TOO_LONG
            if self.note:
                return
            found = logs.trainer_state(path)
        except (DataError, OSError, RecursionError, ArithmeticError, ValueError, TypeError, AttributeError):
            return
        self._rows = rows_of(list(found.findings), [dict(action) for action in found.actions])[:MOST_FOUND]

    def rows(self) -> list[dict[str, Any]]:
        """Findings by step."""
        return self._rows


def rows_of(findings: list[Finding], actions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Findings and actions by step, an action after what led to it, each with the curves it belongs to; [] of
    curves: all of them."""
    rows: list[dict[str, Any]] = [
        {
            "step": f.step, "level": f.severity, "name": f.check.replace("_", " "), "evidence": f.evidence,
            "cause": f.cause, "remedy": f.remedy, "curves": list(CONCERNS.get(f.check, ())),
        }
        for f in findings
    ]  # fmt: skip
    rows += [
        {
            "step": action["step"], "level": "done", "name": str(action.get("event", ""))[:40],
            "evidence": _sentence(action), "cause": "", "remedy": "", "curves": [],
        }
        for action in actions
    ]  # fmt: skip
    return sorted(rows, key=lambda row: (row["step"], row["level"] == "done"))


def _conditions(settings: Mapping[str, Any]) -> Conditions:
    """What a stage's settings say; nothing, where they have other types than keel writes."""
    try:
        return conditions(settings)
    except (TypeError, AttributeError):
        return Conditions()


def _sentence(action: Mapping[str, Any]) -> str:
    try:
        return health.action_sentence(action)[:LONGEST]
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        return str(action.get("event", ""))[:80]
