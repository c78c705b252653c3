"""Where a stage's time goes, and what could be set otherwise: the phase that is furthest above what this
machine needs for it at least (its roofline), in seconds, and a setting that exists and is not set so."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keel.diagnosis.findings import Finding

CHECK = "time_above_floor"
LEAST = 60.0  # seconds of a stage below which nobody waits for it
FILLED = 8  # rows of a forward and backward in float32 from which more of them win nothing
SHARE = 0.2  # of a stage's time that a phase must spend above its floor
# phase → the one whose seconds it is counted in
WITHIN = {"optimizer": "train"}
WORDS = {
    "train": "forward and backward",
    "optimizer": "the optimiser's steps",
    "rollout": "sampling",
    "forward": "log-probabilities and values of the responses",
    "score": "what the rewards say of the responses",
    "reference": "log-probabilities of the reference",
}

Settings = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of a stage, over all its steps."""

    name: str
    seconds: float  # of which no other phase has any
    floor: float  # seconds that the machine needs at least
    useful: float | None  # share of the tokens computed that somebody needs

    @property
    def above(self) -> float:
        """Seconds above the floor."""
        return max(0.0, self.seconds - self.floor)


@dataclass(frozen=True, slots=True)
class Setting:
    """What could be set otherwise."""

    phases: tuple[str, ...]  # that it makes faster
    helps: Callable[[Settings, Phase], bool]
    words: str


def _model(settings: Settings) -> Settings:
    model = settings.get("model")
    return model if isinstance(model, Mapping) else {}


def _rows(settings: Settings) -> int | None:
    """Examples of one optimiser step, where they are split at all."""
    rows, parts = settings.get("mini_batch") or settings.get("batch_size"), settings.get("micro_batch")
    return rows if isinstance(rows, int) and isinstance(parts, int) and parts < rows else None


def _fast_half() -> bool:
    """Whether the card or the processor, here and now, is faster in bfloat16."""
    import torch  # which those who are told nothing need not wait for

    from keel.models.precision import fast_in_bfloat16

    return fast_in_bfloat16(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _small_parts(settings: Settings) -> bool:
    """Whether parts of more rows would take less time: in float32 8 rows without padding fill the products,
    in bfloat16 more do (docs/notes.md)."""
    if _rows(settings) is None:
        return False
    dtype = _model(settings).get("dtype", "auto")
    return settings["micro_batch"] < FILLED or dtype == "bfloat16" or (dtype == "auto" and _fast_half())


MODEL_PHASES = ("train", "rollout", "forward", "score", "reference")
SETTINGS: tuple[Setting, ...] = (
    Setting(
        MODEL_PHASES,
        lambda settings, _: _model(settings).get("dtype") == "float32" and _fast_half(),
        "`dtype: auto` multiplies in bfloat16, which the processor or the card here is fast at (models of a "
        "few hundred channels gain little)",
    ),
    Setting(
        ("forward", "score"),
        lambda settings, _: settings.get("offload") is True,
        "`offload: false` leaves the frozen models on the card between uses, and takes more of its memory",
    ),
    Setting(
        ("train",),
        lambda settings, _: settings.get("gradient_checkpointing") is True,
        "`gradient_checkpointing: false` computes each forward once, and takes more memory",
    ),
    Setting(
        ("train", "forward"),
        lambda settings, _: settings.get("kind") == "ppo" and settings.get("sharing") == "separate",
        "`sharing: trunk` gives the critic the policy's own trunk: one model is read in place of two",
    ),
    Setting(
        ("forward",),
        lambda settings, _: settings.get("old_logp") == "trainer",
        "`old_logp: sampler` takes log π_old from the forwards that the tokens were drawn with",
    ),
    Setting(
        ("train",),
        lambda settings, phase: (
            settings.get("kind") == "sft"
            and settings.get("packing") is False
            and phase.useful is not None
            and phase.useful < 0.8
        ),
        "`packing: true` joins short examples to rows without padding",
    ),
    Setting(
        ("train",),
        lambda settings, _: _small_parts(settings),
        "a larger `micro_batch` (or `auto`) fills the products, and takes more memory",
    ),
    Setting(
        ("rollout",),
        lambda settings, _: isinstance(settings.get("batch_size"), int) and settings["batch_size"] < 64,
        "a larger `batch_size` samples more rows with each reading of the weights (and is another setting "
        "for learning, too)",
    ),
    Setting(
        ("optimizer",),
        lambda settings, _: settings.get("lora") is None,
        "`lora` trains a hundredth of the weights",
    ),
)


def phases(rows: Sequence[Mapping[str, Any]]) -> list[Phase]:
    """The phases of a stage by the lines of its times.jsonl; those without a floor are left out."""
    seconds: dict[str, float] = {}
    floors: dict[str, float] = {}
    shares: dict[str, list[float]] = {}
    for row in rows:
        for name in WORDS:
            spent, share = _number(row.get(name)), _number(row.get(f"{name}/roofline"))
            if spent is None or share is None:
                continue
            seconds[name] = seconds.get(name, 0.0) + spent
            floors[name] = floors.get(name, 0.0) + share * spent
            if (useful := _number(row.get(f"{name}/useful"))) is not None:
                shares.setdefault(name, []).append(useful)
    for part, whole in WITHIN.items():
        if part in seconds and whole in seconds:
            seconds[whole] -= seconds[part]
    return [
        Phase(
            name,
            seconds[name],
            floors[name],
            math.fsum(shares[name]) / len(shares[name]) if name in shares else None,
        )
        for name in seconds
    ]


def _seconds(rows: Sequence[Mapping[str, Any]]) -> float:
    """Of all phases, also of those without a floor."""
    spent = (_number(row.get(name)) for row in rows for name in WORDS if name not in WITHIN)
    return math.fsum(seconds for seconds in spent if seconds is not None)


def finding(rows: Sequence[Mapping[str, Any]], settings: Settings) -> Finding | None:
    """A note on the phase with most seconds above its floor; None where a stage was short, or nothing stands
    out, or its times hold no floors. rows: the lines of its times.jsonl. settings: the stage's resolved
    ones."""
    known, total = phases(rows), _seconds(rows)
    if total < LEAST or not known:
        return None
    worst = max(known, key=lambda phase: phase.above)
    if worst.above < SHARE * total:
        return None
    helping = [one.words for one in SETTINGS if worst.name in one.phases and one.helps(settings, worst)]
    share = round(100 * worst.floor / worst.seconds)
    idle = (
        "" if worst.useful is None else f"; {round(100 * worst.useful)} % of the tokens computed are useful"
    )
    return Finding(
        CHECK,
        "note",
        int(_number(rows[-1].get("step")) or 0),
        f"{worst.name} ({WORDS[worst.name]}) took {worst.seconds:.0f} of {total:.0f} s, and this machine "
        f"needs {worst.floor:.0f} s for it at least ({share} %){idle}",
        "small products, launching, casts, attention, norms: all that is neither arithmetic on weights nor "
        "reading them; or a machine that was busy",
        "; ".join(helping) or "no setting of this stage is known to help",
    )


def _number(value: Any) -> float | None:
    """A finite number, not negative; None for anything else."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good and value >= 0 else None
