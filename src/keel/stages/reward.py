"""The reward model: Bradley–Terry on human comparisons (1706.03741, 2203.02155)."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from keel.algorithms import reward_model
from keel.algorithms.masked import at_least_float32
from keel.config import RewardConfig
from keel.data import chat
from keel.data.batches import derive_seed
from keel.data.load import Dataset
from keel.data.stored.records import Rows, joined, numbers_of
from keel.distributed import group
from keel.errors import DataError, UsageError
from keel.evaluation import reliability
from keel.evaluation.annotators import agreement
from keel.evaluation.measures import accuracy, mean_interval
from keel.models.load import (
    ModelSource,
    causal_lm,
    model_config,
    scorer,
    scorer_without_weights,
)
from keel.models.shared_vocabulary import copied
from keel.models.tokenizer import with_own_pad
from keel.rewards import learned
from keel.rollout import GenerationRequest, KeelEngine
from keel.rundir.stage_run import StageRun
from keel.stages import prepare, reward_pairs, supervised_loop
from keel.stages.reward_pairs import RewardPair
from keel.types import PreferenceRecord, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Prepared:
    """What all members of an ensemble share."""

    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    pairs: Sequence[RewardPair]
    held_out: Sequence[RewardPair]
    samples: Sequence[learned.Inputs]  # to fix the scale on
    form: learned.Form  # of the comparisons


def run(config: RewardConfig, stage_run: StageRun) -> dict[str, Any]:
    """1. comparisons  2. tokens  3. samples to fix the scale on  4. each member: the loop, its scale, save.

    The samples are drawn before the loop, so that an error in drawing them comes before any training. One
    member is in memory at a time. The first is trained last, since the others are saved inside its folder.
    """
    dataset, records, held_out = prepare.train_and_eval(config, stage_run, ("preference",))
    voters = _voters(joined([records, held_out]))
    labels, held_out_labels = _labelled(config, stage_run, records, held_out)
    source = prepare.source_of(config.model, stage_run)
    sampled = _samples_a_language_model(config, stage_run, source)
    tokenizer = prepare.open_tokenizer(
        config.model, stage_run, conversational=dataset.conversational, reads=dataset.records
    )
    limit = prepare.limit_of(config, stage_run, source)
    language_model, replies = source, tokenizer  # that samples are drawn from
    source, tokenizer = with_own_pad(source, copied(tokenizer))
    reader = learned.RewardModel(scorer_without_weights(source), tokenizer)
    too_long = prepare.TooLong(stage_run, config.too_long, limit)
    equal = prepare.EqualPairs(stage_run)
    pairs = reward_pairs.encode(records, labels, reader, too_long, equal)
    held_out_pairs: Sequence[RewardPair] = ()
    if held_out:
        held_out_pairs = reward_pairs.encode(held_out, held_out_labels, reader, too_long, equal, needed=False)
    too_long.report()
    equal.report()
    samples = (
        group.from_first(lambda: _sample(config, stage_run, language_model, replies, limit, records))
        if sampled
        else []
    )
    prepared = Prepared(source, tokenizer, pairs, held_out_pairs, samples, _form(dataset))

    if config.members == 1:
        reward, result = _train(config, stage_run, prepared)
        what = "A reward model (a sequence classifier with one output)"
        prepare.save_model(stage_run, reward.model, tokenizer, config, what)
        return {**result, **voters}
    others = [_run_of_member(stage_run, number) for number in range(2, config.members + 1)]
    done = [
        _member(config, member_run, prepared, f"Member {number} of a reward ensemble")
        for number, member_run in enumerate(others, 2)
    ]
    folders = [member_run.directory / "model" for member_run in others]
    first = _member(config, stage_run, prepared, "The first member of a reward ensemble", folders)
    results, scores = zip(first, *done)
    return {**_of_ensemble(scores, held_out_pairs), "members": list(results), **voters}


def _form(dataset: Dataset) -> learned.Form:
    if len(dataset.forms) > 1:
        return "both"
    return "conversations" if dataset.conversational else "text"


def _voters(records: Sequence[Record]) -> dict[str, Any]:
    """`annotators`: how far they agree on all pairs, held-out ones included, and each one's reliability;
    empty where no pair has two votes."""
    if numbers_of(records, "votes").max(initial=0) < 2:
        return {}
    pairs = [record for record in records if isinstance(record, PreferenceRecord)]
    agreed = agreement(pairs)
    return (
        {} if agreed is None else {"annotators": {**agreed, "reliability": reliability.of_annotators(pairs)}}
    )


def _labelled(
    config: RewardConfig, stage_run: StageRun, records: Sequence[Record], held_out: Sequence[Record]
) -> tuple[list[float], list[float]]:
    """The label of each pair of both, P(chosen is better), as `labels` asks for it; 1 where nobody's votes
    are known.

    With `reliability` the held-out pairs keep the share of their votes: they have no part in what training
    learns from, and are judged as with `soft`. DataError if nobody's reliability can be estimated.
    """

    def label(rows: Sequence[Record], kind: Literal["soft", "majority", "reliability"]) -> list[float]:
        if isinstance(rows, Rows) and numbers_of(rows, "votes").max(initial=0) == 0 and kind == "soft":
            return np.nan_to_num(numbers_of(rows, "p_chosen"), nan=1.0).tolist()
        pairs = [
            replace(row, prompt="", chosen="", rejected="", columns={})
            for row in rows
            if isinstance(row, PreferenceRecord)
        ]
        return [1.0 if p is None else p for p in reliability.labels(pairs, kind)]

    try:
        chosen = label(records, config.labels)
    except ValueError as error:
        raise DataError(
            f"stage {stage_run.name!r}: labels: reliability cannot be estimated: {error}; give votes as a "
            f"list of {{annotator, choice}}, several a pair, or set labels: soft"
        ) from None
    return chosen, label(held_out, "soft" if config.labels == "reliability" else config.labels)


def _run_of_member(stage_run: StageRun, number: int) -> StageRun:
    """A member trains in a directory and from a seed of its own."""
    directory = stage_run.directory / "members" / str(number)
    directory.mkdir(parents=True, exist_ok=True)
    return replace(
        stage_run,
        name=f"{stage_run.name}, member {number}",
        directory=directory,
        seed=derive_seed(stage_run.seed, "member", number),
    )


def _scorer(source: ModelSource, stage_run: StageRun, tokenizer: PreTrainedTokenizerBase) -> Any:
    model = scorer(source, derive_seed(stage_run.seed, "model"), vocab=tokenizer)
    model.config.pad_token_id = chat.ensure_pad(tokenizer)
    return model


def _member(
    config: RewardConfig, stage_run: StageRun, prepared: Prepared, what: str, others: Sequence[Path] = ()
) -> tuple[dict[str, Any], torch.Tensor]:
    """Train one reward model and save it, the first with the `others` beside it: its result and its
    `_held_out_scores`. Its weights are freed."""
    reward, result = _train(config, stage_run, prepared, members=1 + len(others))
    scores = _held_out_scores(reward, prepared.held_out, config)
    prepare.save_model(stage_run, reward.model, prepared.tokenizer, config, what, members=others)
    del reward
    gc.collect()
    return result, scores


def _train(
    config: RewardConfig, stage_run: StageRun, prepared: Prepared, members: int = 1
) -> tuple[learned.RewardModel, dict[str, Any]]:
    """One reward model with its scale, and what its held-out pairs say of it."""
    model = prepare.opened(
        lambda: _scorer(prepared.source, stage_run, prepared.tokenizer), prepared.source, config
    )
    model = prepare.to_train(model, config, stage_run, train_head=True)
    reward = learned.RewardModel(model, prepared.tokenizer)
    result = _fit(stage_run, config, reward, prepared.pairs, prepared.held_out)
    model.eval()
    sides = [side for pair in prepared.pairs[:500] for side in (pair.chosen, pair.rejected)]
    scores = learned.score(reward, prepared.samples or sides, each=group.mapped)
    mean, std = float(scores.mean()), float(scores.std())
    if not std > 0:
        raise UsageError(
            f"{stage_run.name}: the reward model gives every sample the same score ({mean:.3g}); it has "
            "learned nothing to optimise"
        )
    learned.save_scale(model, mean, std, members, prepared.form)
    return replace(reward, mean=mean, std=std, scaled=True), {
        **result, "mean": mean, "std": std, "normalized_on": len(scores),
    }  # fmt: skip


def _held_out_scores(
    reward: learned.RewardModel, pairs: Sequence[RewardPair], config: RewardConfig
) -> torch.Tensor:
    """(2, N) normalised scores of chosen and rejected."""
    return (_scores(reward, pairs, config) - reward.mean) / reward.std


def _of_ensemble(scores: Sequence[torch.Tensor], pairs: Sequence[RewardPair]) -> dict[str, Any]:
    """Held-out accuracy and margin of the members' mean."""
    if not pairs:
        return {}
    chosen, rejected = torch.stack(list(scores)).mean(dim=0)
    result: dict[str, Any] = {"margin": mean_interval((chosen - rejected).tolist())}
    if any(p.p_chosen != 0.5 for p in pairs):
        shares = [p.p_chosen for p in pairs]
        result = {"accuracy": accuracy(chosen.tolist(), rejected.tolist(), shares), **result}
    return result


def _fit(
    stage_run: StageRun,
    config: RewardConfig,
    reward: learned.RewardModel,
    pairs: Sequence[RewardPair],
    held_out: Sequence[RewardPair],
) -> dict[str, Any]:
    """Train on the pairs and return the held-out measures; the model ends with the weights to keep."""
    objective: supervised_loop.Objective[RewardPair] = supervised_loop.Objective(
        loss=lambda part, denominator: loss(reward, part, config.center, denominator),
        weight=lambda pair: 1,
        size=_size,
        evaluate=lambda pairs: evaluate(reward, pairs, config)[0],
        named=_named,
        sequences=_sequences,
    )
    supervised_loop.fit(stage_run, config, reward.model, pairs, held_out, objective)
    return evaluate(reward, held_out, config)[1] if held_out else {}


def _size(pair: RewardPair) -> int:
    """Tokens of both sides, with the padding."""
    return 2 * max(len(side["input_ids"]) for side in (pair.chosen, pair.rejected))


def _sequences(pair: RewardPair) -> list[tuple[tuple[int, ...], int]]:
    """Both sides with what they begin with. One token more each: the score is read at the last one."""
    sides = [side["input_ids"] for side in (pair.chosen, pair.rejected)]
    differ = (i for i, tokens in enumerate(zip(*sides)) if tokens[0] != tokens[1])
    common = tuple(sides[0][: next(differ, min(map(len, sides)))])
    return [(common, len(side) + 1) for side in sides]


def loss(
    reward: learned.RewardModel, pairs: Sequence[RewardPair], center: float, denominator: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The Bradley–Terry loss of these pairs as their part of a step of `denominator` pairs."""
    sides = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    scores = learned.forward(reward, sides, together=2 * list(range(len(pairs))))
    return _loss_of(at_least_float32(scores).view(2, -1), pairs, center, denominator)


def _loss_of(
    scores: torch.Tensor, pairs: Sequence[RewardPair], center: float, denominator: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """As `loss`, of (2, B) scores of chosen and rejected."""
    p_chosen = torch.tensor([p.p_chosen for p in pairs], dtype=scores.dtype, device=scores.device)
    margin = torch.tensor([p.margin for p in pairs], dtype=scores.dtype, device=scores.device)
    return reward_model.bradley_terry(
        scores[0], scores[1], margin=margin, p_chosen=p_chosen, center=center, denominator=denominator
    )


def _scores(reward: learned.RewardModel, pairs: Sequence[RewardPair], config: RewardConfig) -> torch.Tensor:
    """(2, N) raw scores of chosen and rejected."""
    sides, pair_of_side = [p.chosen for p in pairs] + [p.rejected for p in pairs], 2 * list(range(len(pairs)))
    size = config.rows_at_once or config.batch_size
    scores = learned.score(reward, sides, batch_size=size, together=pair_of_side, each=group.mapped)
    return scores.view(2, -1)


def evaluate(
    reward: learned.RewardModel, pairs: Sequence[RewardPair], config: RewardConfig
) -> tuple[dict[str, float], dict[str, Any]]:
    """Held-out measures, as metrics and as the stage's result. Accuracy is over all pairs."""
    reward.model.eval()
    scores = _scores(reward, pairs, config)
    eval_loss, (chosen, rejected) = float(_loss_of(scores, pairs, config.center, len(pairs))[0]), scores
    decided = any(p.p_chosen != 0.5 for p in pairs)
    result: dict[str, Any] = {
        "eval_loss": eval_loss,
        "margin": mean_interval((chosen - rejected).tolist()),
    }
    metrics = {"eval_loss": eval_loss, "eval_margin": result["margin"]["mean"]}
    if decided:
        result = {
            "accuracy": accuracy(chosen.tolist(), rejected.tolist(), [p.p_chosen for p in pairs]),
            **result,
        }
        metrics["eval_accuracy"] = result["accuracy"]["mean"]
    return metrics, result


def _named(metrics: dict[str, float]) -> dict[str, float]:
    """The step's metrics, with the accuracy in place of the two counts that it is made of."""
    counts = ("correct", "decided")
    named = {name: value for name, value in metrics.items() if name not in counts}
    return {**named, "accuracy": metrics["correct"] / max(metrics["decided"], 1.0)}


def _samples_a_language_model(config: RewardConfig, stage_run: StageRun, source: ModelSource) -> bool:
    """Whether the scale is fixed on samples of the model that training starts from: it must be a language
    model. UsageError for settings of samples that are not drawn."""
    if config.normalize == 1:
        raise UsageError(
            f"{stage_run.name}: normalize 1: one score has no spread; give 2 samples or more, or 0 for the "
            "comparisons' completions"
        )
    kinds = [] if source.init is not None else getattr(model_config(source), "architectures", None) or []
    if any("CausalLM" in kind or "LMHead" in kind for kind in kinds):
        return config.normalize > 0
    idle = [name for name in ("normalize", "sampling") if config.changes(name) and config.normalize > 0]
    if idle:
        what = "a new model" if source.init is not None else f"{source.path!r} ({', '.join(kinds)})"
        raise UsageError(
            f"{stage_run.name}: `{idle[0]}` has no effect: {what} is no language model to draw samples from, "
            "so the scale is fixed on the comparisons' completions; leave it out, or set normalize: 0"
        )
    return False


def _sample(
    config: RewardConfig,
    stage_run: StageRun,
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
    records: Sequence[Record],
) -> list[learned.Inputs]:
    """Fresh samples of the model that training starts from, prompts included, whose scores are to fix the
    scale."""
    sampling, count = config.sampling.plain(), config.normalize
    room = prepare.room_of(stage_run, limit, sampling.max_new_tokens)
    asked = [record.prompt for record in records[:count] if isinstance(record, PreferenceRecord)]
    prompts = [chat.prompt_ids(tokenizer, prompt)[-(room or 0) :] for prompt in asked]
    sampler = causal_lm(source, 0).to(stage_run.device).eval()
    repeated, seed = (
        [prompts[i % len(prompts)] for i in range(count)],
        derive_seed(stage_run.seed, "normalize"),
    )
    completions = KeelEngine(sampler).generate(GenerationRequest.of(tokenizer, repeated, sampling, seed))
    return [{"input_ids": [*c.prompt_ids, *c.ids]} for c in completions]
