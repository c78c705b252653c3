"""`keel compare`: models of one run or several side by side, ranked, with a verdict that knows its intervals.

Every finished `evaluate` stage of every run is read. A model is the same in two runs where its name, its
settings (with those of all stages that it, its judge and its reference come from) and its evaluation's
settings are the same; such runs are pooled over their seeds. What has one name and different settings stands
side by side, with the run's name before it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from keel.errors import UsageError
from keel.evaluation.measures import Measure, across_runs, mean_interval
from keel.report import comparison, pooling
from keel.report.pooling import Entry
from keel.report.reading import readable
from keel.report.summary import table
from keel.report.wording import decimals, mean, number, signed

By = Literal["gold", "proxy"]
RANKED_BY: tuple[By, ...] = get_args(By)  # the first that any model has


@dataclass(frozen=True, slots=True)
class Difference:
    """Of two models' rewards, with its 95 % interval."""

    mean: float
    low: float
    high: float
    how: str  # "paired over 5 seeds", "paired over 256 prompts", "of independent means"

    @property
    def distinguishable(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, slots=True)
class Comparison:
    """All entries, best first, and what can be said of them."""

    by: By | None  # the reward that they are ranked by
    entries: tuple[Entry, ...]
    notes: tuple[str, ...]
    differences: Mapping[str, Difference]  # name → how much the best one is ahead of it


def compare(runs: Sequence[Path]) -> Comparison:
    """Read the runs and rank their models.

    UsageError for what is no run, and for a run without a finished evaluate stage.
    """
    with readable(runs[0]):
        return _compare(runs)


def _compare(runs: Sequence[Path]) -> Comparison:
    entries, notes = pooling.entries(runs)
    measured = {name for e in entries for name in e.measures}
    by: By | None = next((by for by in RANKED_BY if by in measured), None)
    if by is not None:
        lowest = -math.inf
        entries.sort(key=lambda e: lowest if (m := mean(e.measures, by)) is None else m, reverse=True)
    rated = [e for e in entries if by is not None and mean(e.measures, by) is not None]
    differences = {e.name: difference(rated[0], e, str(by)) for e in rated[1:]}
    return Comparison(by, tuple(entries), (*_warnings(by, entries), *notes), differences)


# ---------------------------------------------------------------- what can be told apart


def difference(a: Entry, b: Entry, by: str) -> Difference:
    """How much a is ahead of b: paired by seed where both were trained with the same ones, paired by prompt
    for two single evaluations of the same prompts, else the difference of two independent means, whose errors
    add in quadrature."""
    ours, theirs = ({j.seed: j for j in entry.judged} for entry in (a, b))
    if len(ours) > 1 and ours.keys() == theirs.keys():
        pairs = [(mean(j.measures, by), mean(theirs[seed].measures, by)) for seed, j in ours.items()]
        apart = [x - y for x, y in pairs if x is not None and y is not None]
        if len(apart) > 1:
            return _of(across_runs(apart), f"paired over {len(apart)} seeds")
    if len(ours) == len(theirs) == 1:
        one, other = (pooling.scores(entry.judged[0], by) for entry in (a, b))
        if one and one.keys() == other.keys():
            return _of(
                mean_interval([one[key] - other[key] for key in one]), f"paired over {len(one)} prompts"
            )
    x, y = a.measures[by], b.measures[by]
    middle = x["mean"] - y["mean"]
    below = math.hypot(x["mean"] - x["low"], y["high"] - y["mean"])
    above = math.hypot(x["high"] - x["mean"], y["mean"] - y["low"])
    return Difference(middle, middle - below, middle + above, "of independent means")


def _of(measure: Measure, how: str) -> Difference:
    return Difference(measure["mean"], measure["low"], measure["high"], how)


def _warnings(by: str | None, entries: Sequence[Entry]) -> list[str]:
    """What a reader must know before comparing numbers of different runs."""
    notes: list[str] = []
    ways = {json.dumps(pooling.evaluation(entry.judged[0]), sort_keys=True) for entry in entries}
    if len(ways) > 1:
        notes.append(
            "The evaluations differ in their settings, reference or reward model: numbers of different "
            "evaluations are not on one scale."
        )
    if by == "proxy":
        notes.append(
            "Ranked by the proxy alone: no gold reward was measured. The proxy is what was optimised, so a "
            "higher one does not show that replies are better."
        )
    lacking = [entry.name for entry in entries if by and mean(entry.measures, by) is None]
    if lacking:
        notes.append(f"No {by} reward was measured for {_listed(lacking)}: last in the table.")
    return notes


# ---------------------------------------------------------------- in words


def verdict(found: Comparison) -> tuple[str, str, str]:
    """(level, word, sentence): who is best, whether it can be told from the next, and at what KL."""
    rated = [entry for entry in found.entries if found.by and mean(entry.measures, found.by) is not None]
    if not rated:
        return "unjudged", "Not judged", "neither gold nor proxy reward was measured."
    best = rated[0]
    value = f"{found.by} reward {_value(best, str(found.by))}{_at(best)}"
    if len(rated) == 1:
        return "unjudged", "One model", f"{best.name} has {value}; there is no other to compare it with."
    ties = [entry.name for entry in rated[1:] if not found.differences[entry.name].distinguishable]
    second = rated[1]
    apart = found.differences[second.name]
    if apart.distinguishable:
        nor = f"; it cannot be told apart from {_listed(ties)}" if ties else ""
        sentence = (
            f"{best.name} is best, with {value}, ahead of {second.name}{_at(second)} by {_shown(apart)}{nor}."
        )
        return ("unclear" if ties else "better"), "Best", sentence
    more = f", nor {best.name} from {_listed(ties[1:])}" if ties[1:] else ""
    sentence = (
        f"{best.name} has the highest {value}, but it and {second.name}{_at(second)} cannot be told apart: "
        f"the difference is {_shown(apart)}, which includes 0{more}."
    )
    return "unclear", "No clear best", sentence


def at_equal_kl(found: Comparison) -> list[str]:
    """Who is best among models that went equally far: those whose KL intervals overlap the leader's. The
    leader is the highest in the table that is in no group yet; the reference, which went nowhere, is in
    none."""
    by = found.by
    waiting = [
        entry
        for entry in found.entries
        if by
        and not entry.model.reference
        and mean(entry.measures, by) is not None
        and "kl" in entry.measures
    ]
    best = [entry.name for entry in found.entries[:1]]
    sentences: list[str] = []
    for first in [*waiting]:
        if first not in waiting:
            continue
        waiting.remove(first)
        peers = [entry for entry in waiting if _overlap(first.measures["kl"], entry.measures["kl"])]
        waiting = [entry for entry in waiting if entry not in peers]
        if peers:
            told = [
                f"{peer.name} ({_nats(peer)}) by {_shown(difference(first, peer, str(by)))}" for peer in peers
            ]
            apart = [difference(first, peer, str(by)).distinguishable for peer in peers]
            clear = [text for text, yes in zip(told, apart) if yes]
            unclear = [peer.name for peer, yes in zip(peers, apart) if not yes]
            says = [f"is ahead of {_listed(clear)}"] if clear else []
            says += [f"cannot be told apart from {_listed(unclear)}"] if unclear else []
            sentences.append(
                f"At equal KL (intervals overlap) {first.name} ({_nats(first)}) {', and '.join(says)}."
            )
        elif [first.name] == best and len(found.entries) > 2:
            sentences.append(
                f"No other model's KL interval overlaps that of {first.name} ({_nats(first)}): at equal KL "
                "it has no rival here."
            )
    return sentences


def as_text(found: Comparison) -> str:
    """Verdict, sentences, table and notes for a terminal."""
    models = [entry.model for entry in found.entries]
    head, rows = comparison.table(models)
    lines = [[f"by {found.by}" if found.by else "", "model", *(label.lower() for label in head)]]
    for rank, (model, cells) in enumerate(zip(models, rows, strict=True), 1):
        runs = f" ({model.runs} runs)" if model.runs > 1 else ""
        name = f"{model.name}{' (reference)' if model.reference else ''}{runs}"
        lines.append(
            [str(rank), name, *(f"{c.value} ({c.interval})" if c.interval else c.value for c in cells)]
        )
    _, word, sentence = verdict(found)
    return "\n".join(
        [
            f"{word}: {sentence}",
            *at_equal_kl(found),
            "",
            *table(lines),
            *(["", *found.notes] if found.notes else []),
        ]
    )


def as_json(found: Comparison, page: Path) -> str:
    """The numbers. `runs` of a model are the directories that it is pooled over."""
    level, word, sentence = verdict(found)
    models = [
        {
            "name": entry.name, "model": entry.judged[0].model, "reference": entry.model.reference,
            "runs": [str(judged.path) for judged in entry.judged], "measures": dict(entry.measures),
            "seconds": entry.model.seconds, "peak_memory_mib": entry.model.peak_memory_mib,
        }
        for entry in found.entries
    ]  # fmt: skip
    ahead = {
        name: {
            "mean": d.mean,
            "low": d.low,
            "high": d.high,
            "how": d.how,
            "distinguishable": d.distinguishable,
        }
        for name, d in found.differences.items()
    }
    facts = {
        "ranked_by": found.by,
        "verdict": f"{word}: {sentence}",
        "level": level,
        "at_equal_kl": at_equal_kl(found),
        "notes": list(found.notes),
        "models": models,
        "best_ahead_of": ahead,
        "page": str(page),
    }
    return json.dumps(facts, ensure_ascii=False, indent=2)


def write(found: Comparison, path: Path) -> None:
    """The page at `path`. UsageError if its folder is not there."""
    if not path.parent.is_dir() or path.is_dir():
        raise UsageError(
            f"--out {path}: {'that is a folder' if path.is_dir() else f'there is no folder {path.parent}'}"
        )
    level, word, sentence = verdict(found)
    names = list(dict.fromkeys(judged.path.resolve().name for e in found.entries for judged in e.judged))
    shown = _listed(names) if len(names) <= 4 else f"{len(names)} runs"
    comparison.write(
        path, title=f"Comparison of {shown}", level=level, word=word, verdict=sentence,
        models=[entry.model for entry in found.entries], more=at_equal_kl(found), notes=found.notes,
    )  # fmt: skip


def _value(entry: Entry, by: str) -> str:
    measure = entry.measures[by]
    ends = [measure[end] for end in ("low", "high")]
    places = max(decimals([measure["mean"]]), 2)
    interval = (
        f" (95 % interval {number(ends[0], places)} to {number(ends[1], places)})"
        if ends[0] < ends[1]
        else ""
    )
    return number(measure["mean"], places) + interval


def _shown(apart: Difference) -> str:
    """Decimals enough that an interval which excludes 0 is not rounded to it."""
    places = max(2, decimals([apart.mean, apart.low, apart.high]))
    nearest = min(abs(apart.low), abs(apart.high))
    while apart.distinguishable and places < 5 and round(nearest, places) == 0:
        places += 1
    interval = f"{number(apart.low, places)} to {number(apart.high, places)}"
    return f"{signed(apart.mean, places)} (95 % interval {interval}, {apart.how})"


def _nats(entry: Entry) -> str:
    return f"{number(mean(entry.measures, 'kl'), 1)} nats"


def _at(entry: Entry) -> str:
    return f" at KL {_nats(entry)}" if mean(entry.measures, "kl") is not None else ""


def _overlap(a: Measure, b: Measure) -> bool:
    return a["low"] <= b["high"] and b["low"] <= a["high"]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
