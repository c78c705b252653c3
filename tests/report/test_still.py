"""Pictures without scripts: the same points at the same places as in the figure."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from keel.report import pictures
from keel.report.still import still
from keel.report.wording import short

sys.path.insert(0, str(Path(__file__).parent))


def figure(*traces: dict[str, Any], height: int = 180, **axes: Any) -> dict[str, Any]:
    layout = pictures._layout(x_title="step", height=height)
    for name, settings in axes.items():
        layout[name] |= settings
    return {"data": list(traces), "layout": layout}


def measured(mean: float, error: float = 0.1) -> dict[str, float]:
    return {"mean": mean, "low": mean - error, "high": mean + error}


def parts(found: Any, tag: str) -> list[ElementTree.Element]:
    return ElementTree.fromstring(str(found)).findall(f".//{tag}")


def line_of(found: Any) -> list[tuple[float, float]]:
    (path,) = [part for part in parts(found, "path") if part.get("fill") == "none"]
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.-]+) ([\d.-]+)", path.get("d") or "")]


def words(found: Any) -> list[str]:
    return [part.text or "" for part in parts(found, "text")]


def test_a_line_keeps_its_shape_and_its_gaps():
    found = still(
        figure(pictures._line([(1, 0.0), (2, 10.0), (3, None), (4, 5.0), (5, 5.0)], "--train", 2, "x")), "t"
    )
    points = line_of(found)
    assert len(points) == 4
    (x1, y1), (x2, y2), (x4, y4), (x5, _) = points
    assert y2 < y4 < y1  # down is up
    assert x5 - x4 == pytest.approx(x2 - x1, abs=0.2)
    (path,) = [part for part in parts(found, "path") if part.get("fill") == "none"]
    assert (path.get("d") or "").count("M") == 2
    assert "var(--train)" in (path.get("style") or "")


def test_the_axes_say_numbers_that_lie_where_they_are():
    found = still(figure(pictures._line([(0, 0.0), (100, 1.0)], "--train", 2, "x")), "t")
    labels = [part for part in parts(found, "text") if part.get("text-anchor") == "end"]
    (_, y0), (_, y1) = line_of(found)
    assert len(labels) >= 3
    for part in labels:
        value = float((part.text or "").replace("−", "-"))
        assert float(part.get("y") or 0) - 3.5 == pytest.approx(y0 + value * (y1 - y0), abs=0.2)


def test_many_points_are_thinned_and_the_last_is_kept():
    points = [(step, float(step % 7)) for step in range(1, 5001)]
    found = line_of(still(figure(pictures._line(points, "--train", 2, "x")), "t"))
    assert len(found) <= 162
    last = line_of(still(figure(pictures._line([points[0], points[-1]], "--train", 2, "x")), "t"))
    assert found[-1][0] == pytest.approx(last[-1][0], abs=0.2)


def test_points_have_their_names_and_intervals():
    models = {
        "sft": {"kl": {"mean": 0.0, "low": 0.0, "high": 0.0}, "gold": {"mean": 0.4, "low": 0.3, "high": 0.5}},
        "ppo <b>": {
            "kl": {"mean": 6.0, "low": 5.0, "high": 7.0},
            "gold": {"mean": 0.7, "low": 0.6, "high": 0.8},
        },
    }
    found = pictures.points("one", models, "kl", "gold", {"ppo <b>": 6.0}).still()
    assert {"sft", "ppo <b>"} <= set(words(found))
    assert len(parts(found, "circle")) == 2
    bars = [part for part in parts(found, "path") if "1.5" in (part.get("style") or "")]
    assert len(bars) == 4
    assert any(part.get("stroke-dasharray") for part in parts(found, "path"))  # the target


def test_named_and_logarithmic_axes():
    trace = pictures._line([(1, 1.0), (10, 2.0), (100, 3.0)], "--train", 2, "x")
    xs = [x for x, _ in line_of(still(figure(trace, xaxis={"type": "log"}), "t"))]
    assert xs[2] - xs[1] == pytest.approx(xs[1] - xs[0], abs=0.2)
    named = {**trace, "x": ["sft", "ppo", "dpo"]}
    found = still(figure(named, xaxis={"type": "category"}), "t")
    assert {"sft", "ppo", "dpo"} <= set(words(found))


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0, 0.0], [None, None], [1e-9, 2e-9], [1e12, -1e12]])
def test_odd_values_draw_something_valid(values):
    points = list(enumerate(values))
    found = still(figure(pictures._line(points, "--train", 2, "x")), "a < b")
    assert "nan" not in str(found)
    assert ElementTree.fromstring(str(found)).get("aria-label") == "a < b"


def test_labels_of_near_points_do_not_lie_on_each_other():
    one = {"mean": 0.5, "low": 0.45, "high": 0.55}
    models = {
        name: {"kl": {"mean": 6.0, "low": 6.0, "high": 6.0}, "gold": one} for name in ("a", "b", "c", "d")
    }
    models["far"] = {
        "kl": {"mean": 1.0, "low": 1.0, "high": 1.0},
        "gold": {"mean": 0.1, "low": 0.1, "high": 0.1},
    }
    drawn = pictures.points("one", models, "kl", "gold", {})
    places = [trace["textposition"] for trace in drawn.figure["data"]]
    assert len(set(places[:4])) == 4


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ppo", "ppo"),
        ("owner/model", "owner/model"),
        ("/data/models/tiny", "tiny"),
        ("./models/tiny/", "tiny"),
        ("runs/one/stages/ppo/model", "one/ppo"),
        ("/home/me/runs/one/stages/ppo/model", "one/ppo"),
        ("sft best of 4", "sft best of 4"),
        ("", ""),
    ],
)
def test_a_path_is_shown_by_what_tells_it_apart(name, said):
    assert short(name) == said
