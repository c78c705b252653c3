"""The reward model: Bradley–Terry on human comparisons (1706.03741, 2203.02155)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from keel.algorithms import reward_model
from keel.config import RewardConfig
from keel.data import chat
from keel.data.batches import derive_seed, rows_of_step
from keel.evaluation.measures import accuracy, mean_interval
from keel.models import optim
from keel.models.load import ModelSource, add_adapters, causal_lm, count_parameters, model_config, scorer
from keel.rewards import learned
from keel.rollout.engine import generate
from keel.runlog import StageRun
from keel.stages import inputs
from keel.stages.update import (
    EarlyStop,
    add_metrics,
    copy_state,
    due,
    lr_scale,
    micro_batches,
    optimizer_for,
    seed_step,
    total_steps,
)
from keel.types import PreferenceRecord, Record, UsageError


@dataclass(frozen=True, slots=True)
class Pair:
    """A comparison as the model reads it."""

    chosen: learned.Inputs
    rejected: learned.Inputs
    p_chosen: float  # share of the votes for `chosen`; 1 when nobody's votes are known
    margin: float


def run(config: RewardConfig, run: StageRun) -> dict[str, Any]:
    """1. comparisons  2. tokens  3. the loop  4. fix the scale  5. save, scale included."""
    dataset, records, held = inputs.train_and_eval(config, run, ("preference",))
    source = inputs.source_of(config.model, run)
    tokenizer = inputs.open_tokenizer(config.model, run, conversational=dataset.conversational)
    limit = inputs.limit_of(config, run, source)
    model = scorer(source, derive_seed(run.seed, "model"), vocab=tokenizer)
    model.config.pad_token_id = chat.ensure_pad(tokenizer)
    reward = learned.RewardModel(model, tokenizer)
    too_long = inputs.TooLong(run, config.too_long, limit)
    pairs: list[Pair] = inputs.encode_all(
        run, records, lambda record: _encode(reward, record, config, too_long)
    )
    held_pairs = inputs.encode_all(run, held, lambda record: _encode(reward, record, config, too_long))
    too_long.report()

    model.to(run.device)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if config.lora:
        model = add_adapters(
            model,
            inputs.adapters_of(config.lora),
            derive_seed(run.seed, "model"),
            train_head=not reward.is_encoder,
        )
        reward = learned.RewardModel(model, tokenizer)
    result = _fit(run, config, reward, pairs, held_pairs)

    scores = _scores_to_normalize(config, run, source, reward, records, pairs)
    mean, std = float(scores.mean()), float(scores.std())
    if not std > 0:
        raise UsageError(
            f"{run.name}: the reward model gives every sample the same score ({mean:.3g}); it has learned nothing to optimise"
        )
    learned.save_scale(model, mean, std)
    inputs.save_model(run, model, tokenizer, config, "A reward model (a sequence classifier with one output)")
    return {**result, "mean": mean, "std": std, "normalized_on": len(scores)}


def _fit(
    run: StageRun,
    config: RewardConfig,
    reward: learned.RewardModel,
    pairs: Sequence[Pair],
    held: Sequence[Pair],
) -> dict[str, Any]:
    model, steps = reward.model, total_steps(config, len(pairs))
    optimizer = optimizer_for(config, ([model], config.lr))
    stopping, best, first = EarlyStop(config.patience), None, 0
    run.facts |= {
        "rows": len(pairs),
        "held_out_rows": len(held),
        "parameters": count_parameters(model),
        "steps": steps,
    }
    run.facts["trained_parameters"] = count_parameters(model, trainable=True)
    if checkpoint := run.restore():
        model.load_state_dict(checkpoint.tensors["model"])
        optimizer.load_state_dict(checkpoint.tensors["optimizer"])
        stopping, best = stopping.restored(checkpoint.values["stopping"]), checkpoint.tensors["best"]
        first = checkpoint.step

    for step in range(first + 1, steps + 1):
        if stopping.stop:
            break
        # 1. the pairs of this step
        chosen = [pairs[i] for i in rows_of_step(len(pairs), config.batch_size, step - 1, run.seed)]
        # 2. the gradient: both sides of a pair in one forward
        model.train()
        seed_step(run.seed, step)
        metrics: dict[str, float] = {}
        with run.timed("train"):
            for part in micro_batches(chosen, config.micro_batch):
                value, measured = loss(reward, part, config.center, len(chosen))
                value.backward()
                add_metrics(metrics, {"loss": value.detach(), **measured})
            # 3. the optimiser's step
            stepped = optim.step(
                optimizer, lr_scale(config, step - 1, steps), config.max_grad_norm, f"{run.name}, step {step}"
            )
        metrics = _named(metrics)
        metrics |= {
            "grad_norm": stepped["grad_norm"],
            "learning_rate": stepped["lr"],
            "epoch": step * config.batch_size / len(pairs),
        }
        # 4. held-out pairs, and whether to go on
        if held and due(step, steps, config.eval_every):
            with run.timed("evaluate"):
                metrics |= evaluate(reward, held, config)[0]
            stopping = stopping.see(-metrics["eval_loss"])
            if config.patience is not None and stopping.waited == 0:
                best = copy_state(model)
        # 5. what happened, and where to go on from
        run.log(step, steps, metrics)
        if due(step, steps, config.save_every) or stopping.stop:
            tensors = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "best": best}
            run.save(step, tensors, {"stopping": stopping.values()})

    if best is not None:
        model.load_state_dict(best)
    return evaluate(reward, held, config)[1] if held else {}


def loss(
    reward: learned.RewardModel, pairs: Sequence[Pair], center: float, denominator: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The Bradley–Terry loss of these pairs as their part of a step of `denominator` pairs."""
    scores = learned.forward(reward, [p.chosen for p in pairs] + [p.rejected for p in pairs])
    scores = scores if scores.dtype == torch.float64 else scores.float()
    p_chosen = torch.tensor([p.p_chosen for p in pairs], dtype=scores.dtype, device=scores.device)
    margin = torch.tensor([p.margin for p in pairs], dtype=scores.dtype, device=scores.device)
    return reward_model.bradley_terry(
        scores[: len(pairs)],
        scores[len(pairs) :],
        margin=margin,
        p_chosen=p_chosen,
        center=center,
        denominator=denominator,
    )


def evaluate(
    reward: learned.RewardModel, pairs: Sequence[Pair], config: RewardConfig
) -> tuple[dict[str, float], dict[str, Any]]:
    """Held-out measures, as metrics and as the stage's result. Accuracy is over all pairs."""
    reward.model.eval()
    size = config.micro_batch or config.batch_size
    totals: dict[str, float] = {}
    with torch.no_grad():
        for part in micro_batches(pairs, size):
            add_metrics(totals, {"loss": loss(reward, part, config.center, len(pairs))[0]})
    chosen = learned.score(reward, [p.chosen for p in pairs], batch_size=size)
    rejected = learned.score(reward, [p.rejected for p in pairs], batch_size=size)
    decided = any(p.p_chosen != 0.5 for p in pairs)
    result: dict[str, Any] = {
        "eval_loss": totals["loss"],
        "margin": mean_interval((chosen - rejected).tolist()),
    }
    metrics = {"eval_loss": totals["loss"], "eval_margin": result["margin"]["mean"]}
    if decided:
        result = {
            "accuracy": accuracy(chosen.tolist(), rejected.tolist(), [p.p_chosen for p in pairs]),
            **result,
        }
        metrics["eval_accuracy"] = result["accuracy"]["mean"]
    return metrics, result


def _encode(
    reward: learned.RewardModel, record: Record, config: RewardConfig, too_long: inputs.TooLong
) -> Pair | None:
    assert isinstance(record, PreferenceRecord)
    whole = [learned.encode(reward, record.prompt, side, 10**9) for side in (record.chosen, record.rejected)]
    longest = max(len(side["input_ids"]) for side in whole)
    if not too_long.fits(record, longest):
        return None
    if too_long.limit is not None and longest > too_long.limit:
        try:
            whole = [
                learned.encode(reward, record.prompt, side, too_long.limit)
                for side in (record.chosen, record.rejected)
            ]
        except UsageError:  # the response alone is longer: cutting it would change what was judged
            too_long.fits(record, longest, truncatable=False)
            return None
    p = 1.0 if record.p_chosen is None else record.p_chosen
    if config.votes == "majority" and p != 0.5:
        p = float(p > 0.5)
    return Pair(whole[0], whole[1], p, record.margin or 0.0)


def _named(metrics: dict[str, float]) -> dict[str, float]:
    """The step's metrics, with the accuracy in place of the two counts that it is made of."""
    counts = ("correct", "decided")
    named = {name: value for name, value in metrics.items() if name not in counts}
    return {**named, "accuracy": metrics["correct"] / max(metrics["decided"], 1.0)}


def _scores_to_normalize(
    config: RewardConfig,
    run: StageRun,
    source: ModelSource,
    reward: learned.RewardModel,
    records: Sequence[Record],
    pairs: Sequence[Pair],
) -> torch.Tensor:
    """Scores whose mean and spread become the scale: of fresh samples of the model that reward training started
    from, where that is a language model; otherwise of the comparisons' own completions."""
    reward.model.eval()
    kinds = getattr(model_config(source), "architectures", None) or []
    count = config.normalize
    if (
        count == 0
        or source.init is not None
        or not any("CausalLM" in kind or "LMHead" in kind for kind in kinds)
    ):
        return learned.score(reward, [side for pair in pairs[:500] for side in (pair.chosen, pair.rejected)])
    sampler = causal_lm(source, 0).to(run.device).eval()
    sampling = config.sampling.plain()
    room = (inputs.limit_of(config, run, source) or 10**9) - sampling.max_new_tokens
    if room < 1:
        raise UsageError(
            f"{run.name}: sampling.max_new_tokens {sampling.max_new_tokens} leaves no room for a prompt"
        )
    asked = [record.prompt for record in records if isinstance(record, PreferenceRecord)]
    prompts = [chat.prompt_ids(reward.tokenizer, prompt)[-room:] for prompt in asked[:count]]
    prompts = [prompts[i % len(prompts)] for i in range(count)]
    completions = generate(
        sampler, prompts, sampling, stop_ids=chat.stop_ids(reward.tokenizer, sampling.stop),
        pad_id=chat.ensure_pad(reward.tokenizer), seed=derive_seed(run.seed, "normalize"),
    )  # fmt: skip
    return learned.score(reward, [{"input_ids": [*c.prompt_ids, *c.ids]} for c in completions])
