"""`keel plan --model NAME --method ppo`: the textbook's sum of what a method's models take, beside real
totals.

The textbook counts parameters alone: 16-bit weights, and as much again for the gradients of the models that
learn. For four models of 70 B that is 280 + 140 + 140 + 280 = 840 GB. What AdamW adds to it, and what one
shared base takes away, stand beside it. Activations, caches and logits come on top of all of them; a config
says how much.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from keel.errors import UsageError
from keel.models.load import ModelSource, model_config
from keel.plan import model_memory, model_shapes
from keel.plan.model_memory import Lora, Model
from keel.plan.model_shapes import Shape

GB = 10**9
CARD = 80  # GB, of the cards that are counted
ROOM = 10  # GB of each card that are left to activations, caches and logits
Use = Literal["trained", "frozen"]
METHODS: dict[str, dict[str, Use]] = {  # the models that a method holds at a time
    "sft": {"policy": "trained"},
    "reward": {"reward": "trained"},
    "dpo": {"policy": "trained", "reference": "frozen"},
    "grpo": {"policy": "trained", "reference": "frozen", "reward": "frozen"},
    "ppo": {"policy": "trained", "reference": "frozen", "reward": "frozen", "critic": "trained"},
}


@dataclass(frozen=True, slots=True)
class Column:
    """One way to hold the models: bytes by role."""

    name: str
    what: str
    roles: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.roles.values())

    @property
    def cards(self) -> int:
        """Of `CARD` GB, with `ROOM` of each left free."""
        return math.ceil(self.total / ((CARD - ROOM) * GB))


def columns(name: str, method: str) -> list[Column]:
    """The ways to hold `method`'s models, all of the size of `name`. UsageError for an unknown model or
    method."""
    if method not in METHODS:
        raise UsageError(f"no method {method!r}; there are {', '.join(METHODS)}")
    shape, uses = _shape(name), METHODS[method]
    exact, round_ = shape.parameters(), _by_name(name) or shape.parameters()

    def each(trained: float, frozen: float, parameters: float) -> dict[str, float]:
        return {role: parameters * (trained if use == "trained" else frozen) for role, use in uses.items()}

    separate = each(16, 4, exact)
    if "reference" in separate:
        separate["reference"] = 2 * exact

    found = [
        Column(
            "textbook",
            f"{_billions(round_)} parameters in 16 bit: weights, and gradients of what learns",
            each(4, 2, round_),
        ),
        Column(
            "AdamW",
            "16-bit weights and gradients, float32 master weights and two moments (1910.02054)",
            each(16, 2, exact),
        ),
        Column(
            "keel, all weights",
            "float32 weights, gradients and moments; the reference in 16 bit (reference_dtype: bfloat16)",
            separate,
        ),
    ]
    for dtype, how in (("bfloat16", "16-bit"), ("int4", "4-bit")):
        found.append(
            Column(
                f"adapters, {how} base",
                f"one frozen {how} base, LoRA of rank 16 and a head for each role "
                f"({'model.quantize: 4bit' if dtype == 'int4' else 'model.dtype: bfloat16'}, sharing: "
                "adapters)",
                _shared(shape, uses, dtype),
            )
        )
    return found


def _shared(shape: Shape, uses: dict[str, Use], dtype: str) -> dict[str, float]:
    """One base for all; the reference is it with no adapters on."""
    roles: dict[str, float] = {"base": model_memory.weights(Model(shape, dtype))}
    for role, use in uses.items():
        if role != "reference":
            head: model_shapes.Head = "score" if role in ("critic", "reward") else "lm"
            model = Model(shape, dtype, trained=use == "trained", lora=Lora(), head=head, base=False)
            roles[role] = (
                model_memory.weights(model) + model_memory.gradients(model) + model_memory.optimizer(model)
            )
    return roles


def _shape(name: str) -> Shape:
    place = Path(name)
    found = None
    if (place / "config.json").exists():
        found = model_shapes.of_config(model_config(ModelSource(str(place))))
    found = found or model_shapes.known(name)
    if found is None:
        raise UsageError(
            f"the shape of {name!r} is unknown: give a folder with its config.json, or one of "
            f"{', '.join(model_shapes.KNOWN)}"
        )
    return found


def _by_name(name: str) -> float | None:
    """The round number of parameters in a model's name, as a textbook has it: "Llama-2-70b" → 70e9."""
    number = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", name.lower())
    return float(number[1]) * {"b": 1e9, "m": 1e6}[number[2]] if number else None


def as_text(name: str, method: str) -> str:
    """A table: a row a role, a column a way to hold the models, in GB; then what the columns mean."""
    found = columns(name, method)
    roles = list(dict.fromkeys(role for column in found for role in column.roles))
    rows: list[tuple[str, Callable[[Column], str]]] = [
        *(
            (role, lambda column, role=role: _gb(column.roles[role]) if role in column.roles else "–")
            for role in roles
        ),
        ("together", lambda column: _gb(column.total)),
        (f"cards of {CARD} GB", lambda column: f"{column.cards}"),
    ]
    first = max(len(label) for label, _ in rows)
    lines = [f"{name}: {_billions(_shape(name).parameters())} parameters, {method}; GB", ""]
    lines.append(" " * first + "".join(f"  {column.name:>22}" for column in found))
    lines += [
        f"{label:<{first}}" + "".join(f"  {cell(column):>22}" for column in found) for label, cell in rows
    ]
    lines += ["", *(f"{column.name}: {column.what}" for column in found)]
    lines.append(f"cards: {CARD - ROOM} GB of each for these; the rest is for activations, caches and logits")
    return "\n".join(lines)


def as_json(name: str, method: str) -> str:
    tree: dict[str, Any] = {
        column.name: {
            "what": column.what,
            "bytes": {role: round(value) for role, value in column.roles.items()},
            "total": round(column.total),
            "cards": column.cards,
        }
        for column in columns(name, method)
    }
    facts = {
        "model": name,
        "method": method,
        "parameters": _shape(name).parameters(),
        "card_gb": CARD,
        "free_gb": ROOM,
    }
    return json.dumps({**facts, "columns": tree}, ensure_ascii=False, indent=2)


def _gb(value: float) -> str:
    return f"{value / GB:,.0f}" if value >= 100 * GB else f"{value / GB:.3g}"


def _billions(parameters: float) -> str:
    return f"{parameters / 1e9:.4g} B" if parameters >= 1e9 else f"{parameters / 1e6:.4g} M"
