"""What fits on which card, and which settings would make it fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from keel.config import Stage, Training
from keel.pipeline import stage_kinds

# Sold as so many GB, which a card has in GiB. What is between the two, 7 %, is left to the CUDA context, to
# the workspaces of its libraries and to the gaps of the allocator.
CARDS = (8, 12, 16, 24, 40, 48, 80, 141)
GB = 10**9
SHORTEST = 128  # tokens; no `max_length` below is proposed

Peak = Callable[[Stage], float]  # the predicted peak of a stage with these settings, in bytes


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a stage fits a card of `gb`, and the settings, dotted, that would make it fit; None: none of
    them does."""

    gb: int
    fits: bool
    settings: Mapping[str, Any] | None = None


def fits(stage: Stage, peak: Peak, longest: int) -> list[Fit]:
    """One entry a card. longest: tokens of the longest sequence, which `max_length` would shorten."""
    return [fit(stage, peak, longest, gb) for gb in CARDS]


def fit(stage: Stage, peak: Peak, longest: int, gb: int) -> Fit:
    """Of one card."""
    if peak(stage) <= gb * GB:
        return Fit(gb, True, {})
    return Fit(gb, False, _settings(stage, peak, longest, gb * GB))


def _settings(stage: Stage, peak: Peak, longest: int, room: float) -> dict[str, Any] | None:
    """Settings are tried in the order of what they cost the user, each on top of those before it that helped;
    then those that the later ones make unnecessary are taken back."""
    adopted: dict[str, Any] = {}
    best = peak(stage)
    for change in _changes(stage, longest):
        changed = _with(stage, adopted | change)
        if changed is None or (now := peak(changed)) >= best:
            continue
        adopted, best = adopted | change, now
        if best <= room:
            return _without_idle(stage, peak, adopted, room)
    return None


def _changes(stage: Stage, longest: int) -> Sequence[dict[str, Any]]:
    """Settings that save memory, the cheapest to the user first."""
    if stage.starts_from is None:
        rows = getattr(stage, "batch_size", 1)
        return [*_halves("batch_size", rows), {"dtype": "bfloat16"}]
    training = _training(stage)
    whole = min(training.rows_at_once or training.whole_batch, training.whole_batch)
    tokens = training.micro_tokens
    fewer = _halves("micro_batch", whole) if tokens is None else _halves("micro_tokens", tokens)
    changes: list[dict[str, Any]] = [*fewer, {"gradient_checkpointing": True}, *_own(stage, "first")]
    lora = {} if training.lora else {"lora": {}}
    changes += (
        [{"lora": {}}, {"lora": {}, "model.dtype": "bfloat16"}] if lora else [{"model.dtype": "bfloat16"}]
    )
    changes += [{**change, **lora} if "sharing" in change else change for change in _own(stage, "last")]
    if training.model.init is None:
        coarser = {"model.dtype": "bfloat16"} if training.model.dtype in ("auto", "float32") else {}
        changes.append({**lora, **coarser, "model.quantize": "4bit"})
    shorter = (change for change in _halves("max_length", longest) if change["max_length"] >= SHORTEST)
    return [*changes, *({**change, "too_long": "truncate"} for change in shorter)]


def _own(stage: Stage, when: str) -> list[dict[str, Any]]:
    """What saves memory in this kind of stage alone, to be tried before all adapters ("first") or after."""
    return [dict(change) for place, change in stage_kinds.kind_of(stage.kind).savings if place == when]


def _training(stage: Stage) -> Training:
    """A stage that trains a model, as the type that says so."""
    assert isinstance(stage, Training), (
        f"a stage of kind {stage.kind!r} with `starts_from` must derive from Training"
    )
    return stage


def _halves(name: str, value: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while value > 1:
        value //= 2
        found.append({name: value})
    return found


def _with(stage: Stage, settings: Mapping[str, Any]) -> Stage | None:
    """The stage with other settings; None where the config refuses them."""
    tree = stage.model_dump()
    for name, value in settings.items():
        group, *path = tree, *name.split(".")
        for key in path[:-1]:
            group = group[key]
        group[path[-1]] = value
    try:
        return type(stage).model_validate(tree)
    except ValidationError:
        return None


def _without_idle(stage: Stage, peak: Peak, settings: dict[str, Any], room: float) -> dict[str, Any]:
    """The settings without those that are not needed, the most expensive ones last, and the micro-batch as
    large as fits."""

    def fitting(settings: Mapping[str, Any]) -> bool:
        changed = _with(stage, settings)
        return changed is not None and peak(changed) <= room

    for name in [name for name in settings if name != "too_long"]:
        gone = {name, "too_long"} if name == "max_length" else {name}
        fewer = {key: value for key, value in settings.items() if key not in gone}
        if fitting(fewer):
            settings = fewer
    while (size := settings.get("micro_batch")) and fitting(settings | {"micro_batch": 2 * size}):
        settings["micro_batch"] = 2 * size
    return settings


def micro_batch(stage: Stage, peak: Peak, room: float) -> int:
    """The largest number of examples in one forward and backward, of whole, half, quarter …, with which a
    stage takes no more than `room` bytes; 1 if none does."""
    rows = _training(stage).whole_batch
    while rows > 1 and peak(stage.model_copy(update={"micro_batch": rows})) > room:
        rows = math.ceil(rows / 2)
    return rows


def as_text(found: Sequence[Fit]) -> str:
    """ "fits 24 GB and more; 16 GB with micro_batch=4; 8 GB with none of keel's settings"."""
    smallest = next((fit.gb for fit in found if fit.fits), None)
    parts = (
        [f"fits {smallest} GB" + (" and more" if smallest != CARDS[-1] else "")]
        if smallest
        else ["fits no card"]
    )
    for fit in reversed([fit for fit in found if not fit.fits]):
        if fit.settings is None:
            parts.append(f"{fit.gb} GB: not by any setting")
            break  # nor does it fit a smaller one
        parts.append(f"{fit.gb} GB with {settings_text(fit.settings)}")
    return "; ".join(parts)


def settings_text(settings: Mapping[str, Any]) -> str:
    """As overrides on a command line."""
    return " ".join(f"{key}={_plain(value)}" for key, value in settings.items())


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else "{}" if value == {} else str(value)
