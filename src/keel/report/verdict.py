"""The verdict in words: did the model get better, by which measure, and at what distance from the
reference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from keel.config.rewards import BY_RULE
from keel.report.wording import bound, decimals, mean, number, signed

KL_LIMIT = 1.5  # a KL above this multiple of its target is said aloud
TRUNCATED_LIMIT = 0.05  # so is a larger share of replies that never ended

Level = Literal["better", "unclear", "worse", "unjudged"]
_WORDS: dict[Level, str] = {
    "better": "Better",
    "unclear": "No clear change",
    "worse": "Worse",
    "unjudged": "Not judged yet",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """One model judged against the reference."""

    level: Level
    model: str
    reference: str
    by: Literal["gold", "proxy"] | None  # the reward it was judged by
    prompts: int | None  # how many prompts the judgement rests on
    sentence: str
    notes: tuple[str, ...] = ()  # what a reader must know besides

    @property
    def word(self) -> str:
        return _WORDS[self.level]

    @property
    def text(self) -> str:
        return f"{self.word}: {self.sentence}"


@dataclass(frozen=True, slots=True)
class _Lift:
    """Difference to the reference with its 95 % interval."""

    mean: float
    low: float | None
    high: float | None
    paired: bool

    @property
    def level(self) -> Level:
        if self.low is not None and self.low > 0:
            return "better"
        return "worse" if self.high is not None and self.high < 0 else "unclear"


def verdict(
    result: Mapping[str, Any], config: Mapping[str, Any], health: Mapping[str, str] | None = None
) -> list[Verdict]:
    """One verdict for each model of an `evaluate` result but the reference, in the result's order. The best
    of the reference's own samples are judged where there is no other model; else the table below has them.

    Gold reward decides when it was measured, else the proxy. A change counts when the 95 % interval of the
    difference to the reference excludes 0. `config` is the run's: it holds the KL target of each PPO stage.
    `health`: what was found while a model trained, in words, "" for nothing; models of which nothing is known
    are not in it.
    """
    models: Mapping[str, Any] = result.get("models") or {}
    if not models:
        return [unjudged("run an evaluate stage")]
    reference = str(result.get("reference") or next(iter(models)))
    asked_often = [name for name in models if name.startswith(f"{reference} best of ")]
    others = [name for name in models if name != reference and name not in asked_often] or asked_often
    if not others:
        return [
            unjudged(f"only {reference} was evaluated; name a second model to compare it with", reference)
        ]
    return [_judge(name, reference, models, config, (health or {}).get(name)) for name in others]


def unjudged(what_to_do: str, reference: str = "") -> Verdict:
    return Verdict("unjudged", "", reference, None, None, what_to_do + ".")


def kl_target(config: Mapping[str, Any], model: str) -> float | None:
    """The KL target of the stage called `model`, nats per response; None when it has none."""
    stage = (config.get("stages") or {}).get(model)
    kl = stage.get("kl") if isinstance(stage, Mapping) else None
    return bound(kl, "target", "mean") if isinstance(kl, Mapping) else None


def _judge(
    name: str, reference: str, models: Mapping[str, Any], config: Mapping[str, Any], health: str | None
) -> Verdict:
    after, before = models[name], models.get(reference) or {}
    for by in ("gold", "proxy"):
        lift = _lift(after, before, by)
        if lift is None:
            continue
        sentence = _change(by, lift, mean(before, by), mean(after, by)) + _distance(
            after, kl_target(config, name)
        )
        if health is not None:
            sentence += f"; in training {health}" if health else ", no finding in training"
        notes = (*_by_the_proxy(by, config), *_notes(by, lift, after, before, kl_target(config, name)))
        count = bound(after, by, "n")
        return Verdict(
            lift.level, name, reference, by, None if count is None else int(count), sentence + ".", notes
        )
    return Verdict(
        "unjudged", name, reference, None, None, "neither gold nor proxy reward was measured for both models."
    )


def _lift(after: Mapping[str, Any], before: Mapping[str, Any], by: str) -> _Lift | None:
    """The paired lift where it was measured, else the difference of two independent means."""
    paired = mean(after, f"{by}_lift")
    if paired is not None:
        return _Lift(paired, bound(after, f"{by}_lift", "low"), bound(after, f"{by}_lift", "high"), True)
    new, old = mean(after, by), mean(before, by)
    if new is None or old is None:
        return None
    ends = [bound(measures, by, end) for measures in (after, before) for end in ("low", "high")]
    if None in ends:
        return _Lift(new - old, None, None, False)
    new_low, new_high, old_low, old_high = (end for end in ends if end is not None)
    # errors of independent means add in quadrature, each side with the other's opposite side
    return _Lift(
        new - old,
        new - old - math.hypot(new - new_low, old_high - old),
        new - old + math.hypot(new_high - new, old - old_low),
        False,
    )


def _change(by: str, lift: _Lift, before: float | None, after: float | None) -> str:
    places = _places(lift, before, after)
    moved = {"better": "rose", "worse": "fell"}.get(lift.level, "went")
    span = f" from {number(before, places)} to {number(after, places)}" if None not in (before, after) else ""
    if span == "" and moved == "went":
        moved = "moved"
    if lift.low is None or lift.high is None:
        interval = "interval unknown"
    else:
        interval = f"95 % interval {number(lift.low, places)} to {number(lift.high, places)}"
        interval += ", which includes 0" if lift.level == "unclear" else ""
    return f"{by} reward {moved}{span} ({signed(lift.mean, places)}, {interval})"


def _places(lift: _Lift, *means: float | None) -> int:
    """Decimals enough that an interval which excludes 0 is not rounded to it."""
    places = max(decimals([lift.mean, *means]), 2 if max(abs(m or 0) for m in means) < 10 else 1)
    nearest = min((abs(end) for end in (lift.low, lift.high) if end), default=1.0)
    while lift.level != "unclear" and places < 4 and round(nearest, places) == 0:
        places += 1
    return places


def _distance(after: Mapping[str, Any], target: float | None) -> str:
    kl = mean(after, "kl")
    if kl is None:
        return ""
    return f" at KL {number(kl, 1)} nats" + (f" (target {number(target, 1)})" if target else "")


def _by_the_proxy(by: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """What a verdict by the proxy is worth. Right answers are what is wanted; other rules measure what they
    ask for; anything else can be fooled."""
    if by != "proxy":
        return ()
    stages = (config.get("stages") or {}).values()
    judges = [stage for stage in stages if isinstance(stage, Mapping) and "models" in stage]  # it compares
    terms = [term for judge in judges for term in judge.get("reward") or [] if isinstance(term, Mapping)]
    kinds = {str(term.get("kind")) for term in terms if term.get("weight") != 0}
    if kinds == {"answer"}:
        return ()
    if kinds and kinds <= {*BY_RULE}:
        return (f"Judged by rules alone ({', '.join(sorted(kinds))}): they measure what they ask for.",)
    return (
        "Judged by the proxy alone: no gold reward was measured. The proxy is what was optimised, "
        "so its rise does not show that replies are better.",
    )


def _notes(
    by: str, lift: _Lift, after: Mapping[str, Any], before: Mapping[str, Any], target: float | None
) -> tuple[str, ...]:
    notes: list[str] = []
    kl = mean(after, "kl")
    if kl is not None and target and kl > KL_LIMIT * target:
        notes.append(
            f"KL is {number(kl / target, 1)} times its target, above the limit of {KL_LIMIT}: "
            "the policy left the reference further than it was told to."
        )
    proxy = _lift(after, before, "proxy") if by == "gold" else None
    if proxy is not None and proxy.level == "better" and lift.level == "worse":
        notes.append(
            "The proxy reward rose while the gold reward fell: the reward model was over-optimised "
            "(2210.10760). Stop earlier, or hold a lower KL target."
        )
    elif proxy is not None and proxy.level == "better" and lift.level == "unclear":
        notes.append("The proxy reward rose, but the gold reward did not clearly follow.")
    cut_off = mean(after, "truncated")
    if cut_off is not None and cut_off > TRUNCATED_LIMIT:
        notes.append(f"{cut_off:.0%} of replies were cut off by the length limit.".replace("%", " %"))
    if not lift.paired:
        notes.append(
            "The interval treats the two models as independent samples: no paired lift was measured."
        )
    return tuple(notes)
