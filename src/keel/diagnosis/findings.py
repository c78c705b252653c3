"""What a check is, what it finds, and the metrics it looks at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any, Literal

WINDOW = 10  # updates that a state must last before it counts: one odd batch is noise
SUSTAINED = 0.8  # share of a window that must be beyond a limit, besides its last value
SHORT = 3  # updates in a row that suffice where nothing healthy comes near
LARGEST = 1e150  # what is beyond it counts as infinite: sums of squares would be
START = 5  # first updates of a run, whose median is its own measure

Severity = Literal["note", "warn", "act"]
# note: worth knowing; warn: look at it; act: it is going wrong
SEVERITIES: tuple[Severity, ...] = ("note", "warn", "act")
Change = Literal["raise_kl", "cut_lr"]
Levels = Sequence[tuple[Severity, float]]  # limits, the worst first
Alarm = tuple[Severity, str]  # how bad, and the evidence in words


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found."""

    check: str
    severity: Severity
    step: int  # of the first alarm
    evidence: str  # the numbers, in words
    cause: str  # the likely one
    remedy: str

    def row(self) -> dict[str, Any]:
        """A line of events.jsonl."""
        return {
            "step": self.step,
            "event": "finding",
            **{k: v for k, v in asdict(self).items() if k != "step"},
        }


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a check must know of a stage's settings."""

    kl_target: float | None = None  # nats per response
    constrained: bool = True  # whether β is above 0
    learned: bool = False  # a model says what is good, which can be fooled
    warmup: int = 0  # updates at the start in which the policy stands still
    reward_bound: float | None = None  # mean raw reward that nobody would believe
    length_rewarded: bool = False  # a reward is about length, as the user wants it
    sequence_ratios: bool = False  # one ratio a response (GSPO), clipped within a much narrower range
    same_numbers: bool = False  # sampler and trainer compute alike, in float32
    near_numbers: bool = False  # … but for matrix products (`dtype: auto`), or kernels (a server in float32)
    imitates: bool = False  # a teacher, and no reward is optimised


def conditions(settings: Mapping[str, Any]) -> Conditions:
    """Those of a stage's resolved settings, as config.yaml has them; a short form says nothing."""
    kl, control, model = (_group(settings, name) for name in ("kl", "control", "model"))
    terms = settings.get("reward")
    kinds = (
        [term.get("kind") for term in terms if isinstance(term, Mapping)] if isinstance(terms, list) else []
    )
    of_keel = settings.get("engine", "keel") in ("keel", "reference")  # another's numbers are its own
    sampler = _group(settings, "rollout")
    server = sampler.get("engine", "keel") == "vllm"
    exact = model.get("dtype") == "float32" and model.get("quantize") is None
    auto = model.get("dtype") == "auto" and model.get("quantize") is None
    return Conditions(
        kl_target=kl.get("target"),
        constrained=kl.get("coef", 1.0) > 0,
        learned="learned" in kinds or "classifier" in kinds,
        warmup=settings.get("critic_warmup") or 0,
        reward_bound=control.get("reward_bound"),
        same_numbers=exact and of_keel and not server,
        near_numbers=(exact and sampler.get("dtype") in (None, "float32")) if server else auto and of_keel,
        length_rewarded="length" in kinds or "overlong" in kinds,
        sequence_ratios=settings.get("level") == "sequence",
        imitates=settings.get("teacher") is not None,
    )


def _group(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = settings.get(name)
    return value if isinstance(value, Mapping) else {}


@dataclass
class History:
    """The metrics of a run up to its last step, column by column. Values that are not finite are kept
    apart, and those whose squares would not be."""

    conditions: Conditions = field(default_factory=Conditions)
    step: int = 0
    since: int = 0  # windows begin after this step: the last action, before which the run was another one
    columns: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)  # largest value of each column
    broken: dict[str, float] = field(default_factory=dict)  # what was NaN or infinite at the last step

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """One more step's metrics."""
        self.step, self.broken = step, {}
        for name, value in metrics.items():
            if not abs(value) < LARGEST:
                self.broken[name] = value
            elif name != "step":
                self.columns.setdefault(name, []).append((step, value))
                self.peaks[name] = max(value, self.peaks.get(name, value))

    def recent(self, name: str, count: int = WINDOW) -> list[float]:
        """The last `count` values after warm-up and the last action, oldest first; empty where there are
        fewer."""
        after = max(self.since, self.conditions.warmup)
        values = [value for step, value in self.columns.get(name, ())[-count:] if step > after]
        return values if len(values) == count else []

    def start(self, name: str) -> float | None:
        """Median of the run's first values; None where there are too few."""
        first = [value for _, value in self.columns.get(name, ())[:START]]
        return median(first) if len(first) == START else None

    def now(self, name: str) -> float | None:
        """Median of the last window; None before there is one."""
        window = self.recent(name)
        return median(window) if window else None

    def sustained(self, name: str, limit: float, *, below: bool = False) -> bool:
        """Whether the last value and most of the last window are above the limit (or below it)."""
        window = self.recent(name)
        beyond = [value < limit if below else value > limit for value in window]
        return bool(beyond) and beyond[-1] and sum(beyond) >= SUSTAINED * len(beyond)

    def first_of(self, *names: str) -> str:
        """The first of these metrics that the run has; the last one if it has none."""
        return next((name for name in names if name in self.columns), names[-1])


@dataclass(frozen=True, slots=True)
class Check:
    """A question to a history. `look` is pure; its docstring says why its limits are what they are."""

    name: str
    look: Callable[[History], Alarm | None]
    cause: str
    remedy: str
    changes: frozenset[Change] = frozenset()  # what `control` may do about it
    of_reward: bool = False  # it is about a reward that is optimised
    imitating: str = ""  # the remedy where a teacher is imitated; "": the same

    def finding(self, history: History) -> Finding | None:
        """What the check finds at the history's last step; None where all is well, or nobody optimises what
        it is about."""
        imitates = history.conditions.imitates
        alarm = None if self.of_reward and imitates else self.look(history)
        if alarm is None:
            return None
        found = self.found(history.step, *alarm)
        return replace(found, remedy=self.imitating) if imitates and self.imitating else found

    def found(self, step: int, severity: Severity, evidence: str) -> Finding:
        """A finding of this check, with its cause and remedy."""
        return Finding(self.name, severity, step, evidence, self.cause, self.remedy)


def shown(value: float) -> str:
    """A number for a sentence."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
