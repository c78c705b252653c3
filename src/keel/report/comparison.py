"""Models of one run or several side by side: the table, and reward against KL. One HTML file that opens
offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from keel.report import page, pictures
from keel.report.pictures import Picture
from keel.report.wording import bound, decimals, duration, mean, measure, number

COLUMNS = ("gold", "gold_lift", "proxy", "kl", "win_rate", "length")
WIDTH, HEIGHT = 270, 210  # of a plot's inside on a phone of 390 px, where labels have the least room
LETTER, LINE, GAP = 7.2, 16, 8  # a label's width a letter, its height and its distance from the point, in px
LONGEST_LABEL, MOST_LABELS = 18, 10  # beyond, points are labelled by their place in the table


class Model(NamedTuple):
    """One model, as judged in one run or over several."""

    name: str
    runs: int
    reference: bool
    measures: Mapping[str, Any]  # of `evaluate`; over several runs their mean
    seconds: float | None
    peak_memory_mib: float | None


class Cell(NamedTuple):
    value: str
    interval: str = ""


def write(path: Path, *, title: str, word: str, verdict: str, **parts: Any) -> None:
    """Write the page. parts: `level` of the verdict, `models` in their order, `more` sentences after the
    verdict, `notes`."""
    page.put(path, render(title=title, word=word, verdict=verdict, **parts))


def render(
    *,
    title: str,
    level: str,
    word: str,
    verdict: str,
    models: Sequence[Model],
    more: Sequence[str],
    notes: Sequence[str],
) -> str:
    """The whole page."""
    drawn = against_kl(models)
    head, rows = table(models)
    return page.fill(
        "compare.html",
        drawn,
        title=title,
        level=level,
        word=word,
        verdict=verdict,
        more=more,
        notes=notes,
        head=head,
        rows=rows,
        models=models,
        places=_colour_places(models),
        pictures=drawn,
        pooled=any(model.runs > 1 for model in models),
    )


def table(models: Sequence[Model]) -> tuple[list[str], list[list[Cell]]]:
    """Headings, and a row of cells a model, both without the model's name; columns that no model has are left
    out."""
    shown = [name for name in COLUMNS if any(mean(model.measures, name) is not None for model in models)]
    columns = [(measure(name).label, _column(models, name)) for name in shown]
    if any(model.seconds is not None for model in models):
        columns.append(("Time", [Cell(duration(model.seconds)) for model in models]))
    if any(model.peak_memory_mib is not None for model in models):
        memory = [model.peak_memory_mib for model in models]
        columns.append(("Peak memory", [Cell("–" if m is None else f"{m:,.0f} MiB") for m in memory]))
    cells = [[column[place] for _, column in columns] for place in range(len(models))]
    return [label for label, _ in columns], cells


def _column(models: Sequence[Model], name: str) -> list[Cell]:
    found = [[bound(model.measures, name, end) for end in ("mean", "low", "high")] for model in models]
    places = decimals([values[0] for values in found])
    if name != "length":
        places = max(places, 2 if max(abs(values[0] or 0) for values in found) < 10 else 1)
    cells = []
    for middle, low, high in found:
        known = low is not None and high is not None and low < high
        cells.append(
            Cell(number(middle, places), f"{number(low, places)} to {number(high, places)}" if known else "")
        )
    return cells


# ---------------------------------------------------------------- reward against KL


def against_kl(models: Sequence[Model]) -> list[Picture]:
    """Gold and proxy reward against KL, a point a model with its intervals; a picture for each reward that
    two models have."""
    order = sorted(range(len(models)), key=lambda i: not models[i].reference)  # the first colour is grey
    by_name = {models[i].name: models[i].measures for i in order}
    ranks = {model.name: str(rank) for rank, model in enumerate(models, 1)}
    long = max((len(model.name) for model in models), default=0) > LONGEST_LABEL
    drawn: list[Picture] = []
    for by in ("gold", "proxy"):
        shown = [m for m in by_name.values() if mean(m, by) is not None and mean(m, "kl") is not None]
        if len(shown) < 2:
            continue
        picture = pictures.points(f"compare-{by}-kl", by_name, "kl", by, {})
        if long or len(models) > MOST_LABELS:
            names = [name for name, m in by_name.items() if m in shown]
            for trace, name in zip(picture.figure["data"], names, strict=True):
                trace["text"] = [ranks[name]]
        _place_labels(picture.figure)
        drawn.append(picture)
    return drawn


def _colour_places(models: Sequence[Model]) -> list[int]:
    """The place of each model's colour, as `against_kl` gives them out."""
    order = sorted(range(len(models)), key=lambda i: not models[i].reference)
    return [order.index(i) for i in range(len(models))]


def _place_labels(figure: dict[str, Any]) -> None:
    """Put each label where it covers the least of other labels, points and the edge, on the narrowest
    page."""
    ranges = [figure["layout"][axis]["range"] for axis in ("xaxis", "yaxis")]

    def pixels(trace: Mapping[str, Any]) -> tuple[float, float]:
        x, y = ((trace[key][0] - low) / (high - low) for key, (low, high) in zip("xy", ranges, strict=True))
        return x * WIDTH, (1 - y) * HEIGHT

    taken = [_box(x, y, 12, 12) for x, y in map(pixels, figure["data"])]
    for trace in figure["data"]:
        (x, y), width = pixels(trace), LETTER * len(trace["text"][0])
        choices: list[tuple[float, int, str, tuple[float, float, float, float]]] = []
        for turn, (side, dx) in enumerate((("right", 1), ("left", -1), ("center", 0))):
            for below, (edge, dy) in enumerate((("top", -1), ("bottom", 1))):
                box = _box(x + dx * (GAP + width / 2), y + dy * (GAP + LINE / 2), width, LINE)
                cost = sum(_overlap(box, other) for other in taken) + _outside(box)
                choices.append((cost, 2 * turn + below, f"{edge} {side}", box))
        _, _, trace["textposition"], box = min(choices)
        taken.append(box)


def _box(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _outside(box: Sequence[float]) -> float:
    whole = (box[2] - box[0]) * (box[3] - box[1])
    return 2 * (whole - _overlap(box, (0, 0, WIDTH, HEIGHT)))
