"""What fits on which card, and which settings would make it fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from keel.config import AnyStage, CollectConfig, EvaluateConfig, OnPolicy, PPOConfig, Training

# Sold as so many GB, which a card has in GiB. What is between the two, 7 %, is left to the CUDA context, to
# the workspaces of its libraries and to the gaps of the allocator.
CARDS = (8, 12, 16, 24, 40, 48, 80, 141)
GB = 10**9
SHORTEST = 128  # tokens; no `max_length` below is proposed

Peak = Callable[[AnyStage], float]  # the predicted peak of a stage with these settings, in bytes


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a stage fits a card of `gb`, and the settings, dotted, that would make it fit; None: none of
    them does."""

    gb: int
    fits: bool
    settings: Mapping[str, Any] | None = None


def fits(stage: AnyStage, peak: Peak, longest: int) -> list[Fit]:
    """One entry a card. longest: tokens of the longest sequence, which `max_length` would shorten."""
    needed = peak(stage)
    return [
        Fit(gb, True, {}) if needed <= gb * GB else Fit(gb, False, _settings(stage, peak, longest, gb * GB))
        for gb in CARDS
    ]


def _settings(stage: AnyStage, peak: Peak, longest: int, room: float) -> dict[str, Any] | None:
    """Settings are tried in the order of what they cost the user, each on top of those before it that helped;
    then those that the later ones make unnecessary are taken back."""
    taken: dict[str, Any] = {}
    best = peak(stage)
    for change in _changes(stage, longest):
        changed = _with(stage, taken | change)
        if changed is None or (now := peak(changed)) >= best:
            continue
        taken, best = taken | change, now
        if best <= room:
            return _without_idle(stage, peak, taken, room)
    return None


def _changes(stage: AnyStage, longest: int) -> Sequence[dict[str, Any]]:
    if isinstance(stage, EvaluateConfig | CollectConfig):
        return [*_halves("batch_size", stage.batch_size), {"dtype": "bfloat16"}]
    assert isinstance(stage, Training)
    whole = min(stage.rows_at_once or stage.whole_batch, stage.whole_batch)
    tokens = stage.micro_tokens
    fewer = _halves("micro_batch", whole) if tokens is None else _halves("micro_tokens", tokens)
    found: list[dict[str, Any]] = [*fewer, {"gradient_checkpointing": True}]
    if isinstance(stage, PPOConfig):
        found.append({"sharing": "trunk"})
    if stage.lora is None:
        found += [{"lora": {}}, {"lora": {}, "model.dtype": "bfloat16"}]
    else:
        found.append({"model.dtype": "bfloat16"})
    if isinstance(stage, OnPolicy):
        found.append({"reference_dtype": "bfloat16"})
    if isinstance(stage, PPOConfig):
        found.append({"sharing": "adapters"} | ({} if stage.lora else {"lora": {}}))
    if stage.model.init is None:
        needed = {} if stage.lora else {"lora": {}}
        needed |= {"model.dtype": "bfloat16"} if stage.model.dtype in ("auto", "float32") else {}
        found.append({**needed, "model.quantize": "4bit"})
    shorter = (change for change in _halves("max_length", longest) if change["max_length"] >= SHORTEST)
    return [*found, *({**change, "too_long": "truncate"} for change in shorter)]


def _halves(name: str, value: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while value > 1:
        value //= 2
        found.append({name: value})
    return found


def _with(stage: AnyStage, settings: Mapping[str, Any]) -> AnyStage | None:
    """The stage with other settings; None where the config refuses them."""
    tree = stage.model_dump()
    for name, value in settings.items():
        place, *path = tree, *name.split(".")
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
    try:
        return type(stage).model_validate(tree)
    except ValidationError:
        return None


def _without_idle(stage: AnyStage, peak: Peak, settings: dict[str, Any], room: float) -> dict[str, Any]:
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


def micro_batch(stage: AnyStage, peak: Peak, room: float) -> int:
    """The largest number of examples in one forward and backward, of whole, half, quarter …, with which a
    stage takes no more than `room` bytes; 1 if none does."""
    assert isinstance(stage, Training)
    rows = stage.whole_batch
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
        parts.append(f"{fit.gb} GB with {' '.join(f'{k}={_plain(v)}' for k, v in fit.settings.items())}")
    return "; ".join(parts)


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "{}" if value == {} else str(value)
