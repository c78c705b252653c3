"""Preference optimisation: a policy straight from comparisons, without a reward model (DPO and its kin).

The reference is never trained. So its log-probabilities are computed once, before the first step; while
training, only the policy is in memory. The reference is the model that the policy starts from, with adapters
as without, unless the config names another one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from keel.accel.cpu_linear import cast_cache
from keel.algorithms import preference
from keel.algorithms.masked import masked_sum
from keel.config import DPOConfig
from keel.data import chat
from keel.distributed import group
from keel.evaluation.measures import Measure, accuracy, mean_interval, wilson
from keel.models import experts
from keel.models.load import causal_lm, disable_dropout
from keel.rundir.stage_run import StageRun
from keel.stages import language, preference_rows, prepare, supervised_loop
from keel.stages.lazy_rows import LazyRows
from keel.stages.loop_utils import add_metrics, forward_parts, forward_rows
from keel.stages.preference_rows import Example, Pair, Response, lengths, logps, scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class PreferenceSetup:
    """What the losses need besides their rows."""

    config: DPOConfig
    model: PreTrainedModel
    pad_id: int
    device: torch.device
    reference: Mapping[Response, float]  # log π_ref of all that will be asked for; empty without one
    limit: int | None  # longest sequence in tokens


EVALUATED = {  # a metric of the training rows → the same on the held-out ones
    "loss": "eval_loss",
    "rewards/chosen": "eval_rewards/chosen",
    "rewards/rejected": "eval_rewards/rejected",
    "rewards/margins": "eval_rewards/margins",
    "rewards/accuracies": "eval_rewards/accuracies",
    "logps/chosen": "eval_logps/chosen",
    "logps/rejected": "eval_logps/rejected",
    "nll_loss": "eval_nll_loss",
    "log_odds_ratio": "eval_log_odds_ratio",
    "kl": "eval_kl",
}


def run(config: DPOConfig, stage_run: StageRun) -> dict[str, Any]:
    """1. comparisons  2. tokens  3. the reference's log-probabilities  4. the loop  5. save."""
    dataset, records, held_out = prepare.train_and_eval(config, stage_run, config.record_types)
    source = prepare.source_of(config.model, stage_run)
    limit = prepare.limit_of(config, stage_run, source)
    other = preference_rows.reference_source(config, stage_run, source, limit)
    tokenizer = prepare.open_tokenizer(
        config.model, stage_run, conversational=dataset.conversational, reads=dataset.records
    )
    prepare.look_for_marks(stage_run, tokenizer, dataset.records)
    pad_id = chat.ensure_pad(tokenizer)
    rows, held_out_rows = preference_rows.encode(config, stage_run, tokenizer, limit, records, held_out)

    model = prepare.opened(lambda: causal_lm(source, language.model_seed(stage_run)), source, config)
    disable_dropout(model)
    if group.is_sharded():  # before it reads, so that no rank has it whole for that
        model = prepare.to_train(model, config, stage_run)
        supervised_loop.among_ranks(model)
    asked = preference_rows.to_score(config, stage_run, rows, held_out_rows, limit)
    reference = preference_rows.reference_logps(
        config, stage_run, model, other, asked, pad_id, compact=isinstance(rows, LazyRows)
    )
    if not group.is_sharded():
        model = prepare.to_train(model, config, stage_run)
    setup = PreferenceSetup(config, model, pad_id, stage_run.device, reference, limit)
    supervised_loop.fit(stage_run, config, model, rows, held_out_rows, _objective(setup))
    result = _result(setup, held_out_rows, paired=dataset.kind == "preference") if held_out_rows else {}
    what = f"A language model tuned on preferences (loss: {config.loss})"
    prepare.save_model(stage_run, model, tokenizer, config, what)
    preference_rows.forget_reference(stage_run)
    return result


# ---------------------------------------------------------------- losses of pairs


def _references(setup: PreferenceSetup, responses: Sequence[Response], like: Tensor) -> Tensor:
    """(B,) log π_ref of the responses."""
    logps_of = [setup.reference[response] for response in responses]
    return torch.tensor(logps_of, dtype=like.dtype, device=like.device)


def losses(setup: PreferenceSetup, pairs: Sequence[Pair]) -> tuple[Tensor, dict[str, Tensor]]:
    """(B,) losses and metrics, pair by pair; both sides are read together."""
    config, better, worse = setup.config, [p.chosen for p in pairs], [p.rejected for p in pairs]
    chosen, rejected = logps(setup.model, [*better, *worse], setup.pad_id, setup.device).chunk(2)
    seen = {"logps/chosen": chosen.detach(), "logps/rejected": rejected.detach()}
    n_chosen, n_rejected = lengths(better, setup.device), lengths(worse, setup.device)
    beta, smoothing, gamma = config.beta, config.label_smoothing, config.gamma
    if config.loss == "simpo":
        value, metrics = preference.simpo(chosen / n_chosen, rejected / n_rejected, beta, gamma)
        return value, seen | metrics
    if config.loss == "orpo":
        value, metrics = preference.orpo(chosen / n_chosen, rejected / n_rejected, beta)
        metrics["nll_loss"] = metrics.pop("nll")
        return value, seen | metrics
    ref_chosen, ref_rejected = (_references(setup, side, chosen) for side in (better, worse))
    if config.loss == "ipo":
        value, metrics = preference.ipo(
            chosen / n_chosen, rejected / n_rejected, ref_chosen / n_chosen, ref_rejected / n_rejected, beta
        )
        return value, seen | metrics
    form = preference.robust_dpo if config.loss == "robust" else preference.dpo
    value, metrics = form(chosen, rejected, ref_chosen, ref_rejected, beta, smoothing)
    if config.votes == "soft":
        flipped, _ = form(rejected, chosen, ref_rejected, ref_chosen, beta, smoothing)
        p = torch.tensor([pair.p_chosen for pair in pairs], dtype=value.dtype, device=value.device)
        value = p * value + (1 - p) * flipped
    return value, seen | metrics


def loss(
    setup: PreferenceSetup, pairs: Sequence[Pair], denominator: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of these pairs as their part of a step of `denominator` pairs, and metrics likewise."""
    with experts.collecting(setup.model) as routed:
        value, metrics = losses(setup, pairs)
    whole, of_experts = routed.added_to(value.sum() / denominator, len(pairs) / denominator)
    return whole, {name: x.sum() / denominator for name, x in metrics.items()} | of_experts


def evaluate(setup: PreferenceSetup, pairs: Sequence[Pair]) -> dict[str, float]:
    """Held-out metrics: means over all pairs."""
    by_metric = _measured(setup, pairs)
    return {EVALUATED[name]: math.fsum(values) / len(pairs) for name, values in by_metric.items()}


@cast_cache()
def _measured(setup: PreferenceSetup, pairs: Sequence[Pair]) -> dict[str, list[float]]:
    """Every metric, and `loss`, of every pair."""
    setup.model.eval()
    by_metric: dict[str, list[float]] = {}
    parts = forward_parts(setup.config, [preference_rows.size(pair) for pair in pairs])

    def of(part: Sequence[int]) -> dict[str, list[float]]:
        value, metrics = losses(setup, [pairs[i] for i in part])
        return {name: x.tolist() for name, x in {"loss": value, **metrics}.items()}

    with torch.no_grad():
        for part, found in zip(parts, group.mapped(parts, of), strict=True):
            for name, values in found.items():
                column = by_metric.setdefault(name, [0.0] * len(pairs))
                for i, measured in zip(part, values, strict=True):
                    column[i] = measured
    return by_metric


# ---------------------------------------------------------------- KTO


class UnpairedStep:
    """The optimiser step that is being taken.

    KTO's loss needs an estimate of the KL over all rows of the step, but each call of the loss gets one
    micro-batch only. So `begin` makes the estimate, and `loss` reads it.
    """

    def __init__(self, setup: PreferenceSetup) -> None:
        self.setup = setup
        self.kl = 0.0  # nats, by the weights before this step

    def begin(self, rows: Sequence[Example]) -> None:
        """Estimate the KL over all rows of the step."""
        self.kl = mismatched_kl(self.setup, rows)

    def loss(self, part: Sequence[Example], denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
        """`unpaired_loss` of a micro-batch, with the step's KL."""
        return unpaired_loss(self.setup, part, self.kl, denominator)


def mismatched_kl(setup: PreferenceSetup, rows: Sequence[Example]) -> float:
    """z₀ = max(0, mean of log π − log π_ref over mismatched responses), in nats; 0 where there are none."""
    asked = preference_rows.mismatched(rows, setup.limit)
    if not asked:
        return 0.0
    policy_logps = scores(setup.model, asked, setup.pad_id, setup.device, **forward_rows(setup.config))
    gaps = [logp - setup.reference[response] for logp, response in zip(policy_logps, asked)]
    return max(0.0, math.fsum(gaps) / len(gaps))


def unpaired_loss(
    setup: PreferenceSetup, rows: Sequence[Example], kl: float, denominator: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """KTO's loss of these rows as their part of a step of `denominator` rows, and sums for
    `_unpaired_metrics`."""
    config, asked = setup.config, [row.response for row in rows]
    with experts.collecting(setup.model) as routed:
        logp = logps(setup.model, asked, setup.pad_id, setup.device)
    label = torch.tensor([row.label for row in rows], device=logp.device)
    weights = (config.beta, config.desirable_weight, config.undesirable_weight)
    value, metrics = preference.kto(logp, _references(setup, asked, logp), label, kl, *weights)
    rewards, detached = metrics["rewards"], logp.detach()
    side = torch.sign(rewards - config.beta * kl)
    right = (torch.where(label, side, -side) + 1) / 2
    whole, of_experts = routed.added_to(value.sum() / denominator, len(rows) / denominator)
    return whole, {
        **of_experts,
        "rewards/chosen": masked_sum(rewards, label),
        "rewards/rejected": masked_sum(rewards, ~label),
        "logps/chosen": masked_sum(detached, label),
        "logps/rejected": masked_sum(detached, ~label),
        "rewards/accuracies": right.sum() / denominator,
        "kl": torch.tensor(kl * len(rows) / denominator, dtype=torch.float64),
        "up": label.sum(),
        "down": (~label).sum(),
    }


def _unpaired_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Means over the rows with a thumb up (chosen) and down (rejected); what has no rows is left out."""
    of_all = ("loss", "rewards/accuracies", "kl", "router_aux_loss")
    means = {name: sums[name] for name in of_all if name in sums}
    for label, names in (
        ("up", ("rewards/chosen", "logps/chosen")), ("down", ("rewards/rejected", "logps/rejected")),
    ):  # fmt: skip
        means |= {name: sums[name] / sums[label] for name in names if sums[label]}
    if sums["up"] and sums["down"]:
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    return means


def evaluate_unpaired(setup: PreferenceSetup, rows: Sequence[Example]) -> dict[str, float]:
    """Held-out metrics, with the KL of all held-out rows."""
    setup.model.eval()
    kl, sums = mismatched_kl(setup, rows), dict[str, float]()

    def of(part: Sequence[int]) -> dict[str, float]:
        value, measured = unpaired_loss(setup, [rows[i] for i in part], kl, len(rows))
        return {name: float(x) for name, x in {"loss": value, **measured}.items()}

    with torch.no_grad():
        parts = forward_parts(setup.config, [preference_rows.size(row) for row in rows])
        for found in group.mapped(parts, of):
            add_metrics(sums, found)
    return {EVALUATED[name]: value for name, value in _unpaired_metrics(sums).items()}


# ---------------------------------------------------------------- the loop's view, and the result


def _objective(setup: PreferenceSetup) -> supervised_loop.Objective[Any]:
    if setup.config.loss == "kto":
        step = UnpairedStep(setup)
        return supervised_loop.Objective(
            loss=step.loss,
            weight=lambda row: 1,
            size=preference_rows.size,
            evaluate=lambda rows: evaluate_unpaired(setup, rows),
            named=_unpaired_metrics,
            begin=step.begin,
            sequences=preference_rows.sequences,
        )
    return supervised_loop.Objective(
        loss=lambda part, denominator: loss(setup, part, denominator),
        weight=lambda pair: 1,
        size=preference_rows.size,
        evaluate=lambda pairs: evaluate(setup, pairs),
        sequences=preference_rows.sequences,
    )


def _result(setup: PreferenceSetup, rows: Sequence[Any], paired: bool) -> dict[str, Any]:
    """The stage's final measures, on the held-out rows; for KTO too on pairs where the data are pairs."""
    if setup.config.loss != "kto":
        found = _measured(setup, rows)
        result = _of_pairs(
            found["rewards/chosen"], found["rewards/rejected"], [pair.p_chosen for pair in rows]
        )
        return {**result, "eval_loss": math.fsum(found["loss"]) / len(rows)}
    metrics = evaluate_unpaired(setup, rows)
    asked = [row.response for row in rows]
    found = scores(setup.model, asked, setup.pad_id, setup.device, **forward_rows(setup.config))
    rewards = [setup.config.beta * (logp - setup.reference[r]) for logp, r in zip(found, asked)]
    if paired:
        half = len(rows) // 2  # all chosen ones come first
        result = _of_pairs(rewards[:half], rewards[half:], [1.0] * half)
    else:
        result = {"accuracy": wilson(metrics["eval_rewards/accuracies"] * len(rows), len(rows))}
        sides = [[x for x, row in zip(rewards, rows) if row.label == label] for label in (True, False)]
        if all(sides):
            result["margin"] = _difference(*map(mean_interval, sides))
    return {**result, "eval_loss": metrics["eval_loss"]}


def _of_pairs(
    chosen: Sequence[float], rejected: Sequence[float], p_chosen: Sequence[float]
) -> dict[str, Measure]:
    """Accuracy (absent when every vote is undecided) and margin of the implicit rewards."""
    margin = {"margin": mean_interval([c - r for c, r in zip(chosen, rejected, strict=True)])}
    decided = any(p != 0.5 for p in p_chosen)
    return {"accuracy": accuracy(chosen, rejected, p_chosen), **margin} if decided else margin


def _difference(one: Measure, other: Measure) -> Measure:
    """Of two independent means, with its interval."""
    mean = one["mean"] - other["mean"]
    half = math.hypot(one["high"] - one["mean"], other["high"] - other["mean"])
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": one["n"] + other["n"]}
