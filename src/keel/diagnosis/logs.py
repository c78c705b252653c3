"""Logs as the checks read them: keel's metrics.jsonl and events.jsonl, and TRL's trainer_state.json."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from keel.diagnosis.findings import Conditions, Finding, conditions
from keel.diagnosis.watch import CHECKS, replay
from keel.errors import DataError

# TRL's names → keel's, where they are not the same. PPO and RLOO of TRL up to 0.29 log keel's own names.
_TRL = {
    "reward": "objective/scores",
    "reward_std": "objective/scores_std",
    "completions/mean_length": "rollout/response_length",
    "completions/clipped_ratio": "rollout/truncated",
    "entropy": "policy/entropy_avg",
    "clip_ratio": "policy/clipfrac_avg",
    "clip_ratio/region_mean": "policy/clipfrac_avg",
    "sampling/sampling_logp_difference/mean": "rollout/sampler_drift",
    "eval_reward": "eval/objective/scores",
}
_SAME = (
    "objective/kl", "objective/scores", "policy/clipfrac_avg", "policy/entropy_avg", "frac_reward_zero_std",
    "loss", "grad_norm", "loss/policy_avg", "loss/value_avg", "val/ratio",
)  # fmt: skip

# names in logs of version 0.1 → today's
RENAMED = {"policy/pace": "policy/lr_factor", "policy/logp_drift": "policy/logp_mismatch"}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was found in the logs of one stage, and what was done about it."""

    findings: tuple[Finding, ...]  # by step
    actions: tuple[Mapping[str, Any], ...]  # lines of events.jsonl that are no findings
    steps: int  # the last step that was seen


def stage(directory: Path, settings: Mapping[str, Any]) -> Diagnosis:
    """The diagnosis of a stage directory. settings: the stage's resolved ones, {} where unknown.

    What the stage found while it ran is in events.jsonl. The checks are run again on metrics.jsonl, so that a
    run without checks (`control.on_finding: off`, or an older keel) is diagnosed as well. A finding of both
    is listed once. DataError for a file that is not JSON lines.
    """
    rows, events = lines(directory / "metrics.jsonl"), lines(directory / "events.jsonl")
    actions = [row for row in events if row["event"] != "finding"]
    _, again = replay(rows, conditions(settings), {int(row["step"]) for row in actions})
    names = [f.name for f in fields(Finding)]
    logged = [Finding(**{name: row[name] for name in names}) for row in events if row["event"] == "finding"]
    known = {(f.check, f.severity, f.step) for f in logged}
    findings = sorted(
        [*logged, *(f for f in again if (f.check, f.severity, f.step) not in known)], key=lambda f: f.step
    )
    return Diagnosis(
        tuple(findings), tuple(actions), max([0, *(int(row["step"]) for row in [*rows, *events])])
    )


def trainer_state(path: Path) -> Diagnosis:
    """The diagnosis of a run of TRL, or of any trainer of transformers, from its trainer_state.json.
    DataError for any other file."""
    try:
        history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        rows = [(int(row["step"]), row) for row in history]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(
            f"{path} is no trainer_state.json: it has no `log_history` of rows with a `step`"
        ) from None
    by_step: dict[int, dict[str, float]] = {}
    for step, row in rows:
        by_step.setdefault(step, {"step": step}).update(_from_trl(row))
    _, findings = replay((by_step[step] for step in sorted(by_step)), Conditions())
    return Diagnosis(tuple(findings), (), max(by_step, default=0))


def _from_trl(row: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that checks know. A reward that applies to no sample is NaN in TRL and healthy: others are
    left out."""
    values = {k: float(v) for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    metrics = {name: values[name] for name in _SAME if name in values}
    metrics |= {_TRL[name]: value for name, value in values.items() if name in _TRL}
    if "kl" in values and "completions/mean_length" in values:  # TRL's GRPO: nats a token
        metrics["objective/kl"] = values["kl"] * values["completions/mean_length"]
    return metrics


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, metrics by today's names; a last line without its end is still being
    written. Empty where there is none."""
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(io.StringIO(text, newline="\n"), start=1):
        try:
            row: Any = json.loads(line)
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number} is not a JSON object")
            rows.append({RENAMED.get(str(name), str(name)): value for name, value in row.items()})
        except (ValueError, RecursionError) as error:
            if not line.endswith("\n"):
                break
            raise DataError(f"{path}:{number} is not JSON: {error}") from None
    return rows


def worst(findings: tuple[Finding, ...]) -> list[Finding]:
    """One finding a check: the first of its worst severity, by step."""
    order = ("act", "warn", "note")
    worst_of_checks = [
        min(
            (f for f in findings if f.check == name),
            key=lambda f: (order.index(f.severity), f.step),
            default=None,
        )
        for name in CHECKS
    ]
    return sorted((f for f in worst_of_checks if f), key=lambda f: (order.index(f.severity), f.step))
