"""The statistics page: what `keel.feedback.statistics` counts, as tables and small pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from markupsafe import Markup
from starlette.responses import Response

from keel.feedback import charts, web
from keel.feedback.locales import Translator

router = APIRouter()
Measure = Mapping[str, Any] | None  # mean, low, high, n


@router.get("/projects/{project}/statistics")
def statistics(request: Request, project: str) -> Response:
    """Agreement, people, time, biases, drift, and the order of the models."""
    from keel.feedback import statistics as of

    settings = web.project_of(request, project)
    store = web.store(request)
    numbers = web.web(request).counted("statistics", project, lambda: of.of_project(store, project))
    words = web.translator(request)
    return web.page(
        request,
        "statistics.html",
        project=settings,
        tab="statistics",
        numbers=numbers,
        shown=interval,
        percent=percent,
        agreement=_agreement(numbers["agreement"], words),
        biases=_biases(numbers, words),
        drift=_drift(numbers["drift"], words),
        order=_order(numbers["order"], words),
        scales=_scales(numbers["scales"], words),
    )


def interval(measure: Measure, digits: int = 2) -> str:
    """A value with its interval: 0.71 (0.62 to 0.78); a dash where there is none."""
    if measure is None:
        return "–"
    value, low, high = (
        None if measure.get(key) is None else f"{measure[key]:.{digits}f}".replace("-", "−")
        for key in ("mean", "low", "high")
    )
    return f"{value}" if low is None else f"{value} ({low} – {high})"


def percent(measure: Measure) -> str:
    """A share with its interval in percent."""
    if measure is None:
        return "–"
    ends = (
        "" if measure.get("low") is None else f" ({100 * measure['low']:.0f} – {100 * measure['high']:.0f})"
    )
    return f"{100 * measure['mean']:.0f} %{ends}"


def _agreement(found: Mapping[str, Any] | None, words: Translator) -> list[dict[str, str]]:
    return [
        {
            "name": words.known(f"agreement.{name}", words.known(f"scale.{name}", name)),
            "alpha": interval(alpha),
            "items": str(alpha["n"]),
            "unanimous": percent(alpha.get("unanimous")),
        }
        for name, alpha in (found or {}).items()
    ]


def _points(rows: Sequence[tuple[str, Measure]]) -> list[charts.Interval]:
    return [
        (
            name,
            m["mean"] if m["low"] is None else m["low"],
            m["mean"],
            m["mean"] if m["high"] is None else m["high"],
        )
        for name, m in rows
        if m is not None
    ]


def _biases(numbers: Mapping[str, Any], words: Translator) -> dict[str, Any] | None:
    """The picture of shares that ½ would mean no bias for, and the table beside it."""
    length = numbers["length"] or {}
    rows: list[tuple[str, Measure]] = [
        (words("statistics.first_side"), numbers["sides"]),
        (words("statistics.longer"), length.get("longer")),
    ]
    rows = [(name, measure) for name, measure in rows if measure is not None]
    if not rows:
        return None
    picture = charts.intervals(_points(rows), low=0, high=1, zero=0.5, title=words("statistics.biases"))
    return {
        "picture": picture,
        "rows": [(name, percent(measure), str(measure["n"])) for name, measure in rows if measure],
        "slope": interval(length.get("slope")),
    }


def _drift(found: Mapping[str, Any] | None, words: Translator) -> list[tuple[str, Markup]]:
    if not found:
        return []
    windows: Sequence[Mapping[str, Any]] = found["windows"]

    def means(key: str) -> list[float | None]:
        return [None if window[key] is None else window[key]["mean"] for window in windows]

    taken = [window["seconds"] for window in windows]
    most = max((value for value in taken if value is not None), default=0.0)
    lines = [
        (words("statistics.agrees"), means("agrees"), 1.0),
        (words("statistics.first_side"), means("first_side"), 1.0),
        (words("statistics.seconds"), taken, float(f"{most:.2g}") or 1.0),
    ]
    return [
        (name, picture)
        for name, values, high in lines
        if (picture := charts.line(values, low=0, high=high, title=name))
    ]


def _order(found: Mapping[str, Any] | None, words: Translator) -> dict[str, Any] | None:
    if not found:
        return None
    rows = [(entry["name"], entry["strength"]) for entry in found["ranked"]]
    points = _points(rows)
    widest = max((max(abs(low), abs(high)) for _, low, _, high in points), default=1.0)
    high = float(f"{widest * 1.05:.2g}") or 1.0
    return {
        "picture": charts.intervals(points, low=-high, high=high, zero=0, title=words("statistics.order")),
        "ranked": [
            {
                "name": entry["name"],
                "strength": interval(entry["strength"]),
                "wins": percent_of(entry.get("wins")),
            }
            for entry in found["ranked"]
        ],
        "neighbours": [
            {
                "pair": f"{pair['higher']} > {pair['lower']}",
                "preferred": f"{100 * pair['preferred']:.0f} %",
                "until_clear": _votes(pair["until_clear"], words),
                "until_changed": _votes(pair["until_changed"], words),
            }
            for pair in found["neighbours"]
        ],
    }


def percent_of(value: Any) -> str:
    """A share that may be a bare number or one with its interval."""
    return percent(value) if isinstance(value, Mapping) or value is None else f"{100 * value:.0f} %"


def _votes(count: int | None, words: Translator) -> str:
    if count is None:
        return words("statistics.too_many")
    return words("statistics.clear") if count == 0 else f"{count:,}"


def _scales(found: Mapping[str, Any] | None, words: Translator) -> list[dict[str, str]]:
    return [
        {
            "scale": words.known(f"scale.{name}", name),
            "source": source or "–",
            "mean": interval(values if "mean" in values else None),
            "spread": ", ".join(f"{value}: {n}" for value, n in values.get("spread", {}).items()),
        }
        for name, by_source in (found or {}).items()
        for source, values in by_source.items()
    ]
