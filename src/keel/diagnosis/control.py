"""Findings → what to do about them. These functions only decide; the RL loop carries the action out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from keel.diagnosis.findings import Change, Finding
from keel.diagnosis.watch import CHECKS

KL_FACTOR, LR_FACTOR = 1.5, 0.5

ActionKind = Literal["adjust", "rollback", "stop"]


@dataclass(frozen=True, slots=True)
class Action:
    """What is done about the findings of one step."""

    kind: ActionKind
    checks: tuple[str, ...]  # the checks that led to it
    raise_kl: bool = False  # β × KL_FACTOR
    cut_lr: bool = False  # learning rate × LR_FACTOR


def decide(findings: Sequence[Finding], on_finding: str, actions_taken: int, attempts: int) -> Action | None:
    """The action for the findings of one step; None where nothing but saying so is to be done.

    Only findings of severity "act" lead to one. on_finding: as in `control`. actions_taken: how many
    adjustments or rollbacks there were before. After `attempts` of them adjust does nothing more, and
    rollback stops the stage.
    """
    urgent = tuple(f.check for f in findings if f.severity == "act")
    if not urgent:
        return None
    match on_finding:
        case "stop":
            return Action("stop", urgent)
        case "rollback":
            return (
                Action("rollback", urgent, True, True) if actions_taken < attempts else Action("stop", urgent)
            )
        case "adjust":
            changes: set[Change] = {change for name in urgent for change in CHECKS[name].changes}
            if not changes or actions_taken >= attempts:
                return None
            return Action("adjust", urgent, "raise_kl" in changes, "cut_lr" in changes)
    return None


def raised(coef: float) -> float:
    """β after a raise. With a KL target the adaptive controller goes on from the new β; the target stays."""
    return coef * KL_FACTOR


def event(step: int, action: Action, coef: float, lr_factor: float, to: int | None) -> dict[str, Any]:
    """A line of events.jsonl. coef: β from now on; lr_factor: learning rate as a share of the schedule's,
    from now on; to: the update whose weights are taken, None for those of now."""
    return {
        "step": step, "event": action.kind, "checks": list(action.checks), "kl_coef": coef,
        "lr_factor": lr_factor, "to": to,
    }  # fmt: skip
