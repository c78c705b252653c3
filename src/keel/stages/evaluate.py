"""Models side by side on the same prompts: proxy, gold, KL from the reference, length, win rate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from keel import worlds
from keel.accel.cpu_linear import cast_cache
from keel.config import EvaluateConfig, ModelConfig
from keel.data import chat
from keel.data.batches import derive_seed
from keel.data.load import Dataset
from keel.errors import DataError, UsageError
from keel.evaluation import reward_models
from keel.evaluation.policies import JudgedCompletion, best_of_n_kl, measures, sample_row
from keel.models.load import ModelSource, causal_lm, context_length, disable_dropout, model_config
from keel.models.tokenizer import known_ids
from keel.rewards import learned
from keel.rewards.mixture import Mixture, Rated
from keel.rollout import GenerationRequest, KeelEngine
from keel.rollout.engine import text_of
from keel.rollout.score_responses import score
from keel.rundir.stage_run import StageRun
from keel.stages import build_rewards, prepare
from keel.stages.loop_utils import micro_batches
from keel.types import Completion, PreferenceRecord, PromptRecord, Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MOST_SUBSETS = 50  # more kinds than this are not kinds: every row has its own


def run(config: EvaluateConfig, stage_run: StageRun) -> dict[str, Any]:
    """1. prompts  2. the reference's completions  3. each other model's, on the same random draws  4.
    measures."""
    dataset = prepare.read(stage_run, config.data, ("prompt",))
    records, room = _that_fit(stage_run, config, dataset)
    comparisons = (
        prepare.read(stage_run, config.comparisons, ("preference",)).records if config.comparisons else ()
    )
    reference_name = config.reference or config.models[0]
    reference = _open(stage_run, config, reference_name)
    loaded = build_rewards.load_rewards(
        config.reward or [], stage_run, dtype=config.dtype, trust_remote_code=config.trust_remote_code
    )
    bench = Bench(config, stage_run, records, room, reference, loaded, dataset.conversational)
    judged: dict[str, list[JudgedCompletion]] = {}
    stage_run.restore()
    for name in [reference_name, *(m for m in config.models if m != reference_name)]:
        stage_run.say(f"{stage_run.name}: {name} answers {len(records)} prompts")
        judged[name] = _judge(bench, name)[1]
    if config.best_of:
        stage_run.say(
            f"{stage_run.name}: {reference_name} answers {len(records)} prompts {max(config.best_of)} times"
        )
        best = _judge(bench, reference_name, config.best_of)
        judged |= {f"{reference_name} best of {n}": best[n] for n in config.best_of}
    names = [*config.models, *(name for name in judged if name not in config.models)]
    for name in names:
        stage_run.samples([sample_row(name, index, row) for index, row in enumerate(judged[name])])
    result: dict[str, Any] = {"reference": reference_name, "models": {}}
    for name in names:
        against = None if name == reference_name else judged[reference_name]
        result["models"][name] = measures(judged[name], against)
    models = [one.models for one in loaded if one.models]
    if models and comparisons:
        result["reward_model"] = reward_models.judge(_compared(stage_run, config, models[0], comparisons))
    stage_run.facts |= {"rows": len(records)}
    return result


@dataclass(frozen=True, slots=True)
class Bench:
    """What every model is put on: the same prompts, rewards and reference."""

    config: EvaluateConfig
    stage_run: StageRun
    records: Sequence[PromptRecord]
    room: int | None  # tokens of the longest prompt that every model has room for
    reference: PreTrainedModel
    loaded: Sequence[build_rewards.LoadedReward]
    conversational: bool


def _that_fit(
    stage_run: StageRun, config: EvaluateConfig, dataset: Dataset
) -> tuple[list[PromptRecord], int | None]:
    """The prompts that every model has room for, and that room in tokens: all models answer the same ones."""
    contexts = [context_length(model_config(_source(stage_run, config, name))) for name in config.models]
    context = min((c for c in contexts if c is not None), default=None)
    room = prepare.room_of(stage_run, context, config.sampling.max_new_tokens)
    tokenizers = [
        _tokenizer(stage_run, config, name, dataset.conversational, dataset.records) for name in config.models
    ]
    too_long = prepare.TooLong(stage_run, config.too_long, room)

    def fitting(record: Record) -> PromptRecord | None:
        assert isinstance(record, PromptRecord)
        length = max(len(chat.prompt_ids(tokenizer, record.prompt)) for tokenizer in tokenizers)
        return record if too_long.fits(record, length) else None

    records = prepare.encode_all(stage_run, dataset.records, fitting)
    too_long.report()
    return records, room


def _source(stage_run: StageRun, config: EvaluateConfig, name: str) -> ModelSource:
    return ModelSource(
        stage_run.resolve(name), dtype=config.dtype, trust_remote_code=config.trust_remote_code
    )


def _tokenizer(
    stage_run: StageRun,
    config: EvaluateConfig,
    name: str,
    conversational: bool,
    reads: Sequence[Record] = (),
) -> Any:
    model = ModelConfig.model_validate({"path": name, "trust_remote_code": config.trust_remote_code})
    return prepare.open_tokenizer(model, stage_run, conversational=conversational, reads=reads)


def _open(stage_run: StageRun, config: EvaluateConfig, name: str) -> Any:
    model = causal_lm(_source(stage_run, config, name), 0).to(stage_run.device).eval().requires_grad_(False)
    disable_dropout(model)
    return model


def _judge(bench: Bench, name: str, best_of: Sequence[int] = (1,)) -> dict[int, list[JudgedCompletion]]:
    """n → one model's completions of all prompts, in order: for each prompt the best of its first n samples
    by the rewards. The samples are shared: the best of 4 is chosen among those that the best of 2 had, and 2
    more."""
    config, stage_run, records = bench.config, bench.stage_run, bench.records
    tokenizer = _tokenizer(stage_run, config, name, bench.conversational)
    model = _open(stage_run, config, name)
    sampling, pad_id = config.sampling.plain(), chat.ensure_pad(tokenizer)
    vocabularies = [one.config.get_text_config().vocab_size for one in (model, bench.reference)]
    if vocabularies[0] != vocabularies[1]:
        raise UsageError(
            f"{stage_run.name}: {name!r} has a vocabulary of {vocabularies[0]}, the reference "
            f"{vocabularies[1]}; their KL is not defined"
        )
    prompts = [chat.prompt_ids(tokenizer, record.prompt)[-(bench.room or 0) :] for record in records]
    longest = max(map(len, prompts)) + sampling.max_new_tokens
    rewards = None
    if bench.loaded:
        several = len(bench.loaded) > 1
        rewards = build_rewards.mixture(
            bench.loaded, stage_run, tokenizer, longest, normalize=several, batch_size=config.batch_size
        )
    engine = KeelEngine(model, config.batch_size)
    best: list[Completion] = []
    rated: Rated | None = None
    judged: dict[int, list[JudgedCompletion]] = {}
    for round_ in range(max(best_of)):
        seed = derive_seed(stage_run.seed, "evaluate", *([round_] if round_ else []))
        done = engine.generate(GenerationRequest.of(tokenizer, prompts, sampling, seed))
        new = _rated(rewards, records, done, tokenizer)
        if rated is None or new is None:
            best, rated = done, new
        else:
            better = (new.total > rated.total).tolist()
            best = [one if wins else old for one, old, wins in zip(done, best, better, strict=True)]
            rated = _chosen(new, rated, better)
        if (n := round_ + 1) in best_of:
            kls = (
                _kls(bench, model, best, pad_id, known_ids(tokenizer))
                if n == 1
                else [best_of_n_kl(n)] * len(best)
            )
            judged[n] = _all_judged(bench, tokenizer, best, rated, kls)
    return judged


def _all_judged(
    bench: Bench,
    tokenizer: PreTrainedTokenizerBase,
    kept: Sequence[Completion],
    rated: Rated | None,
    kls: Sequence[float],
) -> list[JudgedCompletion]:
    """All measures of one completion of each prompt, the gold reward included."""
    config, records = bench.config, bench.records
    gold = worlds.load(config.gold.removeprefix("world:").partition("/")[0]) if config.gold else None
    judged: list[JudgedCompletion] = []
    for index, (record, completion) in enumerate(zip(records, kept, strict=True)):
        prompt, text = chat.user_text(record.prompt), text_of(tokenizer, completion)
        parts = gold.gold(prompt, text, record.columns) if gold else None
        proxy = None if rated is None else float(rated.total[index])
        terms = {} if rated is None else {term: values[index] for term, values in rated.by_name.items()}
        judged.append(
            JudgedCompletion(
                prompt,
                text,
                kls[index],
                len(completion.ids),
                completion.stop_reason,
                proxy,
                parts,
                terms,
            )
        )
    return judged


def _rated(
    rewards: Mixture | None,
    records: Sequence[PromptRecord],
    done: Sequence[Completion],
    tokenizer: PreTrainedTokenizerBase,
) -> Rated | None:
    if rewards is None:
        return None
    columns = [dict(record.columns) for record in records]
    return rewards.score(build_rewards.batch_of([r.prompt for r in records], done, columns, tokenizer))


def _chosen(new: Rated, old: Rated, better: Sequence[bool]) -> Rated:
    """Row by row the new rating where it is better."""
    wins = torch.tensor(better)
    by_name = {
        name: [n if w else o for n, o, w in zip(values, old.by_name[name], better, strict=True)]
        for name, values in new.by_name.items()
    }
    sums = [torch.where(wins, getattr(new, part), getattr(old, part)) for part in ("total", "raw", "learned")]
    return Rated(sums[0], sums[1], sums[2], by_name)


@cast_cache()
def _kls(
    bench: Bench, model: PreTrainedModel, done: Sequence[Completion], pad_id: int, vocab: int
) -> list[float]:
    """Each response's exact KL from the reference, summed over its tokens, in nats."""
    kls: list[float] = []
    for part in micro_batches(done, bench.config.batch_size):
        scored = score(
            part, model, bench.reference, temperature=bench.config.sampling.temperature or 1.0, pad_id=pad_id,
            device=bench.stage_run.device, micro_batch=bench.config.batch_size, vocab=vocab,
        )  # fmt: skip
        kls += scored.exact_kl.sum(dim=1).tolist()
    return kls


def _compared(
    stage_run: StageRun,
    config: EvaluateConfig,
    members: Sequence[learned.RewardModel],
    records: Sequence[Any],
) -> reward_models.Compared:
    """The comparisons with the scores of the reward model, or of all members of an ensemble. All pairs that
    the reward model can read; others are an error, or left out and counted (`too_long`)."""
    pairs, sides, left_out = [], [], 0
    for pair in (record for record in records if isinstance(record, PreferenceRecord)):
        try:
            encoded = [learned.encode(members[0], pair.prompt, side) for side in (pair.chosen, pair.rejected)]
        except UsageError as error:
            if config.too_long == "error":
                raise UsageError(f"{pair.origin}: {error}; set too_long: skip") from None
            left_out += 1
            continue
        pairs.append(pair)
        sides += encoded
    if left_out:
        stage_run.say(
            f"{stage_run.name}: {left_out} comparisons left out, longer than the reward model reads"
        )
    if not pairs:
        raise UsageError(f"{stage_run.name}: the reward model can read none of {len(records)} comparisons")
    pair_of_side = [i // 2 for i in range(len(sides))]
    scores = torch.stack(
        [
            learned.score(m, sides, batch_size=config.batch_size, together=pair_of_side).double()
            for m in members
        ]
    )
    lengths = [[len(chat.completion_text(side)) for side in (p.chosen, p.rejected)] for p in pairs]
    return reward_models.Compared(
        chosen=scores[:, 0::2].numpy(),
        rejected=scores[:, 1::2].numpy(),
        means=np.array([member.mean for member in members]),
        stds=np.array([member.std for member in members]),
        p_chosen=[pair.p_chosen for pair in pairs],
        votes=[len(pair.votes) for pair in pairs],
        prompts=[json.dumps(pair.prompt) for pair in pairs],
        lengths=np.array(lengths, dtype=np.float64).T,
        subsets=_column(stage_run, "subset", config.subset, pairs),
        chosen_first=[
            _is_first(stage_run, config, pair, value)
            for pair, value in zip(pairs, _column(stage_run, "position", config.position, pairs))
        ],
    )


def _column(
    stage_run: StageRun, setting: str, name: str | None, pairs: Sequence[PreferenceRecord]
) -> list[str | None]:
    """A column of the pairs as text, None where a pair lacks it; empty without a `name`. UsageError if all
    lack it."""
    if name is None:
        return []
    values = [None if (value := pair.columns.get(name)) is None else str(value) for pair in pairs]
    if not any(value is not None for value in values):
        known = sorted({column for pair in pairs for column in pair.columns})
        raise UsageError(
            f"{stage_run.name}: {setting}: no comparison has a column {name!r}; they have "
            f"{', '.join(known) or 'none besides the pair'}"
        )
    if setting == "subset" and len(set(values)) > MOST_SUBSETS:
        raise UsageError(
            f"{stage_run.name}: subset: {name!r} has {len(set(values))} values in {len(pairs)} comparisons; "
            f"name a column of at most {MOST_SUBSETS} kinds"
        )
    return values


def _is_first(
    stage_run: StageRun, config: EvaluateConfig, pair: PreferenceRecord, value: str | None
) -> bool | None:
    if value not in (None, "chosen", "rejected"):
        raise DataError(
            f"{pair.origin}: {config.position!r} is {value!r}; stage {stage_run.name!r} takes it for "
            "`position`, chosen or rejected"
        )
    return None if value is None else value == "chosen"
