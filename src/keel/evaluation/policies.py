"""Measures of policies: each completion's rewards, KL, length; and what they come to, with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from keel.evaluation.measures import Measure, distinct, mean_interval, points_share, wilson
from keel.types import Dialogue, Prompt


@dataclass(frozen=True, slots=True)
class JudgedCompletion:
    """One completion and everything said about it."""

    completion: str
    kl: float  # Σ_t KL(π(·|s_t) ‖ π_ref(·|s_t)) over the response, in nats
    length: int  # tokens, the stop token included; of an episode with tools the model's own
    stop_reason: str
    proxy: float | None = None  # the reward model's score
    gold: Mapping[str, float] | None = None  # parts and `total`
    rewards: Mapping[str, float | None] = field(default_factory=dict)  # each reward by its name
    dialogue: Dialogue | None = None  # of an episode with tools
    prompt: Prompt = ""  # with what an environment said first
    unanswered: bool | None = (
        None  # a judge said nothing of it, so that it has no proxy; None: none may be silent
    )


def measures(
    judged: Sequence[JudgedCompletion], reference: Sequence[JudgedCompletion] | None
) -> dict[str, Measure]:
    """All measures of one model that apply. reference: the reference's completions of the same prompts, in
    order; None for the reference itself.

    `proxy` is of the completions that have one. `gold_lift`, `proxy_lift`: mean of the paired differences,
    where both have it. `win_rate`: by gold where there is one, else by proxy; a draw counts half.
    """
    result: dict[str, Measure] = {}
    if scores := [j.proxy for j in judged if j.proxy is not None]:
        result["proxy"] = mean_interval(scores)
    if silent := [j.unanswered for j in judged if j.unanswered is not None]:
        result["unanswered"] = wilson(sum(silent), len(silent))
    if (golds := _golds(judged)) is not None:
        result["gold"] = mean_interval([gold["total"] for gold in golds])
        result |= {
            f"gold/{part}": mean_interval([gold[part] for gold in golds])
            for part in golds[0]
            if part != "total"
        }
    names = list(judged[0].rewards)
    for name in names if len(names) > 1 else ():
        values = [v for j in judged if (v := j.rewards[name]) is not None]
        if values:
            result[f"reward/{name}"] = mean_interval(values)
    result["kl"] = mean_interval([j.kl for j in judged])
    result["length"] = mean_interval([float(j.length) for j in judged])
    result["truncated"] = wilson(sum(j.stop_reason in ("length", "turns") for j in judged), len(judged))
    if dialogues := [j.dialogue for j in judged if j.dialogue is not None]:
        result["turns"] = mean_interval([float(len(dialogue.ends)) for dialogue in dialogues])
        result["calls"] = mean_interval([float(dialogue.calls) for dialogue in dialogues])
        result["failed_calls"] = mean_interval([float(dialogue.failures) for dialogue in dialogues])
        result |= {
            "out_of_turns": wilson(sum(j.stop_reason == "turns" for j in judged), len(judged)),
            "no_room_for_answer": wilson(sum(bool(d.unheard) for d in dialogues), len(judged)),
        }
    texts = [j.completion for j in judged]
    for n in (1, 2):
        share = distinct(texts, n)
        result[f"distinct_{n}"] = {"mean": share, "low": share, "high": share, "n": len(texts)}
    if reference is not None:
        result |= _against(judged, reference)
    return result


def best_of_n_kl(n: int) -> float:
    """log n − (n − 1)/n: the KL from a policy to the best of its n samples, in nats (2009.01325, 2210.10760).

    Exact where no two samples are the same and equally good, an upper bound otherwise (2401.01879).
    """
    return math.log(n) - (n - 1) / n


def _against(judged: Sequence[JudgedCompletion], reference: Sequence[JudgedCompletion]) -> dict[str, Measure]:
    result: dict[str, Measure] = {}
    judges: list[tuple[str, list[float], list[float]]] = []
    if (mine := _golds(judged)) is not None and (theirs := _golds(reference)) is not None:
        judges.append(("gold", [g["total"] for g in mine], [g["total"] for g in theirs]))
    sides = [(mine.proxy, theirs.proxy) for mine, theirs in zip(judged, reference, strict=True)]
    if both := [(a, b) for a, b in sides if a is not None and b is not None]:
        judges.append(("proxy", [a for a, _ in both], [b for _, b in both]))
    for name, a, b in judges:
        result[f"{name}_lift"] = mean_interval([x - y for x, y in zip(a, b, strict=True)])
    if judges:
        _, a, b = judges[0]
        result["win_rate"] = points_share(
            [1.0 if x > y else 0.5 if x == y else 0.0 for x, y in zip(a, b, strict=True)]
        )
    return result


def _golds(judged: Sequence[JudgedCompletion]) -> list[Mapping[str, float]] | None:
    golds = [j.gold for j in judged if j.gold is not None]
    return golds if len(golds) == len(judged) else None


def sample_row(model: str, index: int, judged: JudgedCompletion) -> dict[str, Any]:
    """A completion as a line of samples.jsonl; the same index is the same prompt for every model."""
    row: dict[str, Any] = {
        "model": model,
        "index": index,
        "prompt": judged.prompt,
        "completion": judged.completion if judged.dialogue is None else list(judged.dialogue.happened),
    }
    if judged.proxy is not None:
        row["proxy"] = judged.proxy
    if len(judged.rewards) > 1:
        row["rewards"] = dict(judged.rewards)
    if judged.gold is not None:
        row["gold"] = dict(judged.gold)
    return row | {"kl": judged.kl, "length": judged.length, "stop_reason": judged.stop_reason}
