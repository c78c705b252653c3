"""Numbers, times and measures in words, the same on the page and in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from keel.report.notes import is_number

LARGE = 1e15  # from here on numbers are written in powers of ten


class Measure(NamedTuple):
    """How a measure of `evaluate` is presented."""

    label: str
    explanation: str
    share: bool  # it lies between 0 and 1


MEASURES: dict[str, Measure] = {
    "gold": Measure("Gold reward", "judged by a reward that no stage trained on", True),
    "gold_lift": Measure("Gold lift", "paired difference to the reference, prompt by prompt", False),
    "proxy": Measure("Proxy reward", "score of the learned reward model", False),
    "proxy_lift": Measure("Proxy lift", "paired difference to the reference, prompt by prompt", False),
    "win_rate": Measure(
        "Win rate", "share of prompts on which it beats the reference; ties count half", True
    ),
    "kl": Measure("KL", "from the reference, nats per reply", False),
    "length": Measure("Length", "tokens per reply", False),
    "distinct_1": Measure("Distinct-1", "different words as a share of all words", True),
    "distinct_2": Measure("Distinct-2", "different word pairs as a share of all pairs", True),
    "truncated": Measure("Cut off", "share of replies that reached the length limit", True),
    "unanswered": Measure("Unanswered", "share of replies that a judge said nothing of", True),
    "out_of_turns": Measure("Out of turns", "share of episodes that max_turns ended", True),
    "no_room_for_answer": Measure(
        "No room for an answer", "share of episodes that a tool's answer left no tokens", True
    ),
    "accuracy": Measure("Accuracy", "share of comparisons ranked as people ranked them", True),
}


def short(name: str) -> str:
    """A model's name for a page: of a path what tells it apart, RUN/STAGE or its folder; any other as it
    is."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    if not parts or not (name.startswith(("/", ".", "~")) or len(parts) > 2):
        return name
    if parts[-1] == "model" and len(parts) > 1:
        parts.pop()
    if len(parts) > 2 and parts[-2] == "stages":
        return f"{parts[-3]}/{parts[-1]}"
    return parts[-1]


def measure(name: str) -> Measure:
    """How `name` is presented; a measure nobody described keeps its own name."""
    if name in MEASURES:
        return MEASURES[name]
    group, slash, part = name.partition("/")
    return Measure(part or name, "", bool(slash) and group in MEASURES and MEASURES[group].share)


def order(names: Iterable[str]) -> list[str]:
    """Measures in reading order: the parts of a measure follow it in the order given, unknown ones come
    last."""
    known = list(MEASURES)

    def place(name: str) -> tuple[int, bool]:
        group, slash, _ = name.partition("/")
        return (known.index(group) if group in known else len(known), bool(slash))

    return sorted(dict.fromkeys(names), key=place)


def decimals(values: Iterable[float | None]) -> int:
    """Decimals that suit the largest of `values`: about three significant digits."""
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    for limit, places in ((99.5, 0), (9.95, 1), (0.0995, 2), (0.00995, 3)):
        if largest >= limit:
            return places
    return 2 if largest == 0 else 4


def number(value: float | int | None, places: int | None = None) -> str:
    """`value` for reading: thousands separated, tiny ones in powers of ten, a dash when there is none."""
    if value is None or value != value:
        return "–"
    if abs(value) >= LARGE:
        return f"{float(value):.2e}" if is_number(value) else "–"
    if isinstance(value, int):
        return f"{value:,}"
    if places is None:
        if 0 < abs(value) < 1e-3:
            return f"{value:.1e}"
        places = decimals([value])
    text = f"{value:,.{places}f}"
    return text.removeprefix("-") if float(text.replace(",", "")) == 0 else text


def signed(value: float, places: int) -> str:
    text = number(value, places)
    return text if text.startswith("-") else f"+{text}"


def large(value: int | None) -> str:
    """A count in short: 940, 984 k, 1.3 M, 7.0 G."""
    if value is None:
        return "–"
    if value < 1e4:
        return f"{value:,}"
    for limit, unit in ((1e9, "G"), (1e6, "M")):
        if value >= limit:
            return f"{value / limit:.1f} {unit}"
    return f"{value / 1e3:.0f} k"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def mean(measures: Mapping[str, Any], name: str) -> float | None:
    """The mean of a measure `{"mean", "low", "high", "n"}`, or of a plain number; None when not measured."""
    return bound(measures, name, "mean")


def bound(measures: Mapping[str, Any], name: str, key: str) -> float | None:
    value = measures.get(name)
    if isinstance(value, Mapping):
        value = value.get(key)
    elif key != "mean":
        return None
    return float(value) if is_number(value) else None
