"""Reward by round of refreshing a reward model: what each round brought."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keel.config.collect import round_name
from keel.report import pictures
from keel.report.notes import mapping
from keel.report.pictures import Picture
from keel.report.reading import Run
from keel.report.wording import mean, measure

MOST = 100  # rounds that a config may have


def by_round(run: Run) -> tuple[str, list[tuple[int, Mapping[str, float]]]]:
    """The reward that rounds are judged by, "gold" or else "proxy", and (round, its measure) for each that is
    judged; 0 is the reference. The first evaluate stage that knows two rounds decides. ("", []) for a run
    without rounds or such a stage."""
    rounds = mapping(run.config.get("rounds"))
    policy, n = rounds.get("policy"), min(int(rounds.get("n") or 0), MOST)
    for stage in run.stages:
        models: Mapping[str, Any] = stage.result.get("models") or {}
        names = {
            0: str(stage.result.get("reference")),
            **{k: round_name(str(policy), k) for k in range(1, n + 1)},
        }
        for by in ("gold", "proxy"):
            known = [
                (k, models[name][by])
                for k, name in names.items()
                if mean(models.get(name) or {}, by) is not None
            ]
            if len([k for k, _ in known if k > 0]) > 1:
                return by, known
    return "", []


def picture(run: Run) -> Picture | None:
    """A point a round with its interval; None where fewer than two rounds are judged."""
    by, known = by_round(run)
    if not known:
        return None
    x, y = [k for k, _ in known], [value["mean"] for _, value in known]
    above = [value.get("high", value["mean"]) - value["mean"] for _, value in known]
    below = [value["mean"] - value.get("low", value["mean"]) for _, value in known]
    bars = {
        "type": "data",
        "symmetric": False,
        "array": above,
        "arrayminus": below,
        "color": "--train",
        "thickness": 1.5,
        "width": 0,
    }
    trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": x,
        "y": y,
        "error_y": bars,
        "line": {"color": "--train", "width": 2},
        "marker": {"color": "--train", "size": 8},
        "hovertemplate": "round %{x}: %{y:.3f}<extra></extra>",
    }
    layout = pictures._layout(x_title="round of refreshing; 0 is the reference", height=290)
    pictures._pad(layout, x, [*(a + b for a, b in zip(y, above)), *(a - b for a, b in zip(y, below))])
    layout["xaxis"]["dtick"] = 1
    return Picture("rounds", f"{measure(by).label} by round", "", (), {"data": [trace], "layout": layout})
