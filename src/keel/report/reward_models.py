"""What `evaluate` found out about the reward model, for reading: a table, a reliability diagram, a line of
text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from keel.report import pictures
from keel.report.pictures import Key, Picture
from keel.report.wording import bound, mean, number, signed

_MOST_BINS = 200
_INSIDE = {"calibration", "length", "position", "disagreement", "offset", "by_margin", "by_subset"}


class Line(NamedTuple):
    """One number with what it means."""

    label: str
    value: str
    explanation: str


def lines(found: Mapping[str, Any]) -> list[Line]:
    """The table of `reward_model` in an evaluate result, in reading order; what was not measured is left
    out."""
    part = {name: found.get(name) or {} for name in _INSIDE}
    table: list[Line] = []

    def add(label: str, value: str, explanation: str = "") -> None:
        if value:
            table.append(Line(label, value, explanation))

    add("Accuracy", _measured(found, "accuracy"), "pairs ranked as most votes say")
    for name, label in (("unanimous", "of unanimous votes"), ("split", "of split votes")):
        add(label, _measured(part["by_margin"], name))
    for name in part["by_subset"]:
        add(f"of “{name}”", _measured(part["by_subset"], name))
    add(
        "Calibration error",
        _plain(part["calibration"], "ece"),
        "ECE: how far its certainty is from the votes; 0 is best",
    )
    add(
        "Brier score",
        _measured(part["calibration"], "brier"),
        "squared error of its probabilities; ¼ is guessing",
    )
    for name, label, why in (
        ("replies", "Length: all replies", "rank correlation of score and length"),
        ("pairs", "Length: within pairs", "rank correlation of the two differences"),
        ("votes", "Length: people", "the same of people’s votes: more than this is the model’s own taste"),
    ):
        add(label, _signed(part["length"].get(name) or {}, "spearman"), why)
    for name, label in (("reward", "First one preferred"), ("votes", "First one preferred by people")):
        add(label, _measured(part["position"].get(name) or {}, "first"), "0.5 without bias")
    add(
        "Disagreement",
        _plain(part["disagreement"], "auroc"),
        "AUROC of the members’ spread as a sign of error; 0.5 says nothing",
    )
    add(
        "Offset of prompts",
        _plain(part["offset"], "share"),
        "share of the scores’ variance between prompts, where it means nothing",
    )
    return table  # fmt: skip


def in_short(found: Mapping[str, Any]) -> str:
    """The few numbers for a terminal; "" without any."""
    part = {name: found.get(name) or {} for name in _INSIDE}
    said = [
        ("accuracy", _measured(found, "accuracy")),
        ("unanimous", _plain(part["by_margin"], "unanimous")),
        ("split", _plain(part["by_margin"], "split")),
        ("calibration error", _plain(part["calibration"], "ece")),
        ("length within pairs", _signed(part["length"].get("pairs") or {}, "spearman")),
        ("AUROC of disagreement", _plain(part["disagreement"], "auroc")),
        ("variance between prompts", _plain(part["offset"], "share")),
    ]
    return ", ".join(f"{label} {value}" for label, value in said if value)


def reliability_diagram(name: str, found: Mapping[str, Any]) -> Picture | None:
    """Share of the votes against how sure the model is, bin by bin, with intervals; on the dashed line it
    means what it says. None where it was not measured."""
    bins = (found.get("calibration") or {}).get("bins") or []
    if not 0 < len(bins) <= _MOST_BINS:
        return None
    shares = [one["share"] for one in bins]
    points = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [float(one["confidence"]) for one in bins],
        "y": [share["mean"] for share in shares],
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [share["high"] - share["mean"] for share in shares],
            "arrayminus": [share["mean"] - share["low"] for share in shares],
            "color": "--train",
            "thickness": 1.5,
            "width": 0,
        },
        "line": {"color": "--train", "width": 1.5},
        "marker": {"color": "--train", "size": 8},
        "customdata": [share["n"] for share in shares],
        "hovertemplate": "sure %{x:.2f}<br>votes %{y:.2f}<br>%{customdata} pairs<extra></extra>",
        "cliponaxis": False,
    }
    layout = pictures._layout(x_title="how sure the model is", height=290)
    low = min(share["low"] for share in shares)
    layout["xaxis"]["range"], layout["yaxis"]["range"] = [0.5, 1.0], [min(0.45, low - 0.03), 1.02]
    layout["hovermode"] = "closest"
    line = {"color": "--ink", "width": 1, "dash": "dash"}
    layout["shapes"] = [
        {"type": "line", "x0": 0.5, "y0": 0.5, "x1": 1, "y1": 1, "line": line, "layer": "below"}
    ]
    keys = (Key("votes for the side it prefers", "--train", "dot"), Key("calibrated", "--ink", "dash"))
    return Picture(
        f"{name}-reliability",
        "Reliability of the reward model",
        "share of votes",
        keys,
        {"data": [points], "layout": layout},
    )


def _measured(part: Mapping[str, Any], name: str) -> str:
    value, low, high = mean(part, name), bound(part, name, "low"), bound(part, name, "high")
    if value is None or low is None or high is None:
        return ""
    return f"{number(value, 2)} ({number(low, 2)} to {number(high, 2)})"


def _plain(part: Mapping[str, Any], name: str) -> str:
    value = mean(part, name)
    return "" if value is None else number(value, 2)


def _signed(part: Mapping[str, Any], name: str) -> str:
    value = mean(part, name)
    return "" if value is None else signed(value, 2)
