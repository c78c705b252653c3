"""Gold and proxy against √KL, for best-of-n and reinforcement learning, with the laws fitted to them
(2210.10760).

Points come from what runs hold: of an on-policy stage with a world as its judge every evaluation, of an
evaluate stage every n of `best_of`. Both rewards are taken relative to the model at distance 0; the proxy is
in standard deviations of that model's own proxy, so that reward models of different scales share an axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from keel.evaluation.measures import Measure, across_runs
from keel.evaluation.overoptimization import WORDS, Course, Law, LawFit, course, fit, spread
from keel.report import pictures
from keel.report.pictures import Key, Picture
from keel.report.reading import Run, StageRun
from keel.report.wording import bound, mean, number, signed

DRAWN = 60  # points of a fitted line


@dataclass(frozen=True, slots=True)
class Path:
    """One way away from the starting model, in one run."""

    name: str
    law: Law
    at: tuple[int, ...]  # (N,) the update, or n
    d: tuple[float, ...]  # (N,) √KL
    gold: tuple[float, ...]  # (N,) minus the start's
    proxy: tuple[
        float, ...
    ]  # (N,) minus the start's, in its standard deviations; () where the start's is not known


class Line(NamedTuple):
    """A way as a row of a table: over the seeds where there are several."""

    name: str
    law: str
    fit: LawFit | None
    peak: float  # mean over runs of the highest gold (a mean of three neighbours)
    peak_kl: float  # where it was
    end: float
    fall: Measure | None  # peak − end over runs; None for a single one
    proxy_rise: float | None  # from the gold's peak to the end

    @property
    def cells(self) -> list[str]:
        """name, α, β, R², KL at the fitted peak, gold at its peak, KL there, gold at the end, fall, proxy's
        rise after."""
        found, end = self.fit, self.peak - self.end
        shown = [number(found.alpha, 3), number(found.beta, 3), number(found.r2, 2)] if found else ["–"] * 3
        top = "–" if found is None or found.peak is None or found.peak > 100 else number(found.peak**2, 1)
        fall = number(end, 2)
        if self.fall is not None:
            fall += f" ({number(self.fall['low'], 2)} to {number(self.fall['high'], 2)})"
        proxy = "–" if self.proxy_rise is None else signed(self.proxy_rise, 2)
        return [
            self.name,
            self.law,
            *shown,
            top,
            signed(self.peak, 2),
            number(self.peak_kl, 1),
            signed(self.end, 2),
            fall,
            proxy,
        ]


HEAD = (
    "way",
    "law fitted",
    "α",
    "β",
    "R²",
    "KL at the law's peak",
    "gold at its peak",
    "KL there",
    "gold at the end",
    "fall",
    "proxy, peak to end",
)


# ---------------------------------------------------------------- what runs hold


def paths(run: Run) -> list[Path]:
    """All ways of one run that have a start whose gold reward is known."""
    judged = run.with_models
    best = [found for stage in judged if (found := _best_of_n(stage)) is not None]
    trained = [stage for stage in run.stages if stage.shown_as.on_policy]
    return best + [found for stage in trained if (found := _trained(stage, judged)) is not None]


def _best_of_n(stage: StageRun) -> Path | None:
    models: Mapping[str, Any] = stage.result["models"]
    reference = str(stage.result.get("reference"))
    points: list[tuple[int, float, float, float | None]] = []
    for n in sorted(stage.settings.get("best_of") or []):
        own = models.get(f"{reference} best of {n}") or {}
        kl, gold = mean(own, "kl"), mean(own, "gold_lift")
        if kl is not None and gold is not None:
            points.append((n, kl, gold, _in_deviations(mean(own, "proxy_lift"), models[reference])))
    rewards = ", ".join(_names_of(stage.settings.get("reward")))
    return _path(f"best of n by {rewards}", "best_of_n", points)


def _trained(stage: StageRun, judged: Sequence[StageRun]) -> Path | None:
    """The evaluations of an on-policy stage whose judge is a world; the start is as an evaluate stage of that
    world has it, with the same reward if there is one."""
    world = (stage.settings.get("judge") or {}).get("gold")
    model = stage.settings.get("model")
    start = stage.settings.get("reference") or (model.get("path") if isinstance(model, Mapping) else model)
    knows = [
        s
        for s in judged
        if s.settings.get("gold") == world and mean(s.result["models"].get(start) or {}, "gold") is not None
    ]
    if world is None or not knows:
        return None
    alike = [s for s in knows if s.settings.get("reward") == stage.settings.get("reward")]
    before = (alike or knows)[0].result["models"][start]
    gold, proxy = mean(before, "gold"), mean(before, "proxy") if alike else None
    assert gold is not None
    known = {
        name: dict(stage.metrics.get(f"eval/{name}", ()))
        for name in ("judge", "objective/kl", "objective/scores")
    }
    points: list[tuple[int, float, float, float | None]] = []
    for step, value in sorted(known["judge"].items()):
        kl, score = known["objective/kl"].get(step), known["objective/scores"].get(step)
        if value is None or kl is None:
            continue
        lift = None if proxy is None or score is None else score - proxy
        points.append((step, max(kl, 0.0), value - gold, _in_deviations(lift, before)))
    return _path(stage.name, "rl", points)


def _in_deviations(lift: float | None, start: Mapping[str, Any]) -> float | None:
    ends = {end: bound(start, "proxy", end) for end in ("mean", "low", "high", "n")}
    if lift is None or any(value is None for value in ends.values()):
        return None
    size = spread(ends)  # pyright: ignore[reportArgumentType]
    return lift / size if size > 0 else None


def _path(name: str, law: Law, points: Sequence[tuple[int, float, float, float | None]]) -> Path | None:
    if len(points) < 2:
        return None
    at, kl, gold, proxy = zip(*points, strict=True)
    whole = () if None in proxy else tuple(proxy)
    return Path(name, law, tuple(at), tuple(math.sqrt(value) for value in kl), tuple(gold), whole)


def _names_of(terms: object) -> list[str]:
    """Names of rewards as a resolved config has them."""
    listed = terms if isinstance(terms, list) else [terms]
    return [
        str(term.get("name") or term.get("model") or term.get("kind"))
        if isinstance(term, Mapping)
        else str(term)
        for term in listed
    ]


# ---------------------------------------------------------------- over seeds


def lines(groups: Mapping[str, Sequence[Path]]) -> list[Line]:
    """A row for each way; groups: its label → that way in each run (one a seed)."""
    return [_line(label, own) for label, own in groups.items()]


def _line(label: str, own: Sequence[Path]) -> Line:
    courses = [_course(path) for path in own]
    falls = [found.fall for found in courses]
    rises = [path.proxy[-1] - path.proxy[found.at] for path, found in zip(own, courses) if path.proxy]

    def over(values: Sequence[float]) -> float:
        return math.fsum(values) / len(values)

    return Line(
        label,
        WORDS[own[0].law],
        fitted(own),
        over([found.peak for found in courses]),
        over([path.d[found.at] ** 2 for path, found in zip(own, courses)]),
        over([found.end for found in courses]),
        across_runs(falls) if len(falls) > 1 else None,
        over(rises) if len(rises) == len(own) else None,
    )


def _course(path: Path) -> Course:
    """Neighbouring evaluations of a run are averaged; different n, which are few and all of one model, are
    not."""
    return course(path.gold, 3 if path.law == "rl" else 1)


def fitted(own: Sequence[Path]) -> LawFit | None:
    """The law of a way, fitted to the points of all its runs at once; None where they leave it open."""
    try:
        return fit(own[0].law, [d for path in own for d in path.d], [g for path in own for g in path.gold])
    except ValueError:
        return None


def by_name(runs: Sequence[Run]) -> dict[str, list[Path]]:
    """Runs that differ in their seed alone: way → that way in each of them."""
    groups: dict[str, list[Path]] = {}
    for run in runs:
        for path in paths(run):
            groups.setdefault(path.name, []).append(path)
    return groups


# ---------------------------------------------------------------- pictures


def drawn(groups: Mapping[str, Sequence[Path]]) -> list[Picture]:
    """Gold and proxy against √KL: a dot each evaluation of each run, and of gold the fitted law as a line."""
    if not groups:
        return []
    found = [_picture("overoptimization-gold", "Gold reward against √KL", "change", groups, "gold")]
    if any(path.proxy for own in groups.values() for path in own):
        found.append(
            _picture(
                "overoptimization-proxy",
                "Proxy reward against √KL",
                "change, in standard deviations",
                groups,
                "proxy",
            )
        )
    return found


def _picture(name: str, title: str, unit: str, groups: Mapping[str, Sequence[Path]], by: str) -> Picture:
    traces: list[dict[str, Any]] = []
    keys: list[Key] = []
    all_x, all_y = [0.0], [0.0]
    ordered: dict[Law, int] = {}
    for label, own in groups.items():
        ordered[own[0].law] = ordered.get(own[0].law, 0) + 1
        colour = pictures.model_colour(ordered[own[0].law])
        pairs = [(path.d[i], value, path.at[i]) for path in own for i, value in enumerate(getattr(path, by))]
        if not pairs:
            continue
        x, y, at = (list(column) for column in zip(*pairs, strict=True))
        traces.append(_dots(label, own[0].law, x, y, at, colour))
        all_x, all_y = [*all_x, *x], [*all_y, *y]
        keys.append(Key(label, colour, "dash" if own[0].law == "best_of_n" else "line"))
        law = fitted(own) if by == "gold" else None
        if law is not None:
            along = [max(x) * i / DRAWN for i in range(DRAWN + 1)]
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "x": along,
                    "y": [law.at(d) for d in along],
                    "hoverinfo": "skip",
                    "line": {
                        "color": colour,
                        "width": 2,
                        "dash": "dot" if law.law == "best_of_n" else "solid",
                    },
                }
            )
    layout = pictures._layout(x_title="√KL from the starting model, √nats", height=330)
    pictures._pad(layout, all_x, all_y)
    return Picture(name, title, unit, tuple(keys), {"data": traces, "layout": layout})


def _dots(label: str, law: Law, x: list[float], y: list[float], at: list[int], colour: str) -> dict[str, Any]:
    where = "n" if law == "best_of_n" else "update"
    marker: dict[str, Any] = {"color": colour, "size": 5, "opacity": 0.55}
    if law == "best_of_n":
        marker["symbol"] = "diamond"
    return {
        "type": "scatter",
        "mode": "markers",
        "x": x,
        "y": y,
        "marker": marker,
        "text": [f"{where} {one}" for one in at],
        "hovertemplate": f"{pictures.plain(label)}, %{{text}}<br>√KL %{{x:.2f}}<br>%{{y:.3f}}<extra></extra>",
    }


def facts(groups: Mapping[str, Sequence[Path]]) -> list[dict[str, Any]]:
    """The lines and their points, for JSON."""
    found = []
    for (label, own), line in zip(groups.items(), lines(groups), strict=True):
        law = line.fit
        found.append(
            {
                "way": label,
                "law": own[0].law,
                "runs": len(own),
                "fit": law
                and {"alpha": law.alpha, "beta": law.beta, "r2": law.r2, "points": law.n, "peak_d": law.peak},
                "peak": line.peak,
                "peak_kl": line.peak_kl,
                "end": line.end,
                "fall": line.fall or {"mean": line.peak - line.end},
                "proxy_peak_to_end": line.proxy_rise,
                "points": [{"at": p.at, "d": p.d, "gold": p.gold, "proxy": p.proxy} for p in own],
            }
        )
    return found
