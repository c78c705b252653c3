"""Models side by side on the same prompts: proxy, gold, KL from the reference, length, win rate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from keel import worlds
from keel.accel.cpu_linear import cast_cache
from keel.config import EvaluateConfig, ModelConfig
from keel.data import chat
from keel.data.batches import derive_seed
from keel.data.load import Dataset
from keel.data.stored.records import picked, release
from keel.data.stored.tokens import each
from keel.distributed import group
from keel.errors import DataError, UsageError
from keel.evaluation import reward_models
from keel.evaluation.policies import JudgedCompletion, best_of_n_kl, measures, sample_row
from keel.models.load import ModelSource, causal_lm, context_length, disable_dropout, model_config
from keel.models.tokenizer import known_ids
from keel.rewards.mixture import Answers, Mixture, Rated
from keel.rollout import Engine
from keel.rollout.engine import text_of
from keel.rollout.protocol import Rows
from keel.rollout.score_responses import score
from keel.rollout.vllm.shared import idle
from keel.rundir.stage_run import StageRun
from keel.stages import build_rewards, prepare, scored_pairs, tool_use
from keel.stages.gold import gold_of, world_of
from keel.stages.lazy_rows import PromptExample
from keel.stages.loop_utils import micro_batches
from keel.stages.samplers import open_sampler
from keel.types import Completion, PromptRecord, Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AT_ONCE = 8_192  # prompts that are answered and scored together
EPISODES_AT_ONCE = 512  # each with an environment of its own


def run(config: EvaluateConfig, stage_run: StageRun) -> dict[str, Any]:
    """1. prompts  2. the reference's completions  3. each other model's, on the same random draws  4.
    measures."""
    dataset = prepare.read(stage_run, config.data, ("prompt",))
    readers = _readers(stage_run, config, dataset)
    records, room, longest = _that_fit(stage_run, config, dataset.records, readers)
    comparisons = (
        prepare.read(stage_run, config.comparisons, ("preference",)).records if config.comparisons else ()
    )
    reference_name = config.reference or config.models[0]
    reference = _open(stage_run, config, reference_name)
    loaded = build_rewards.load_rewards(
        config.reward or [], stage_run, dtype=config.dtype, trust_remote_code=config.trust_remote_code
    )
    bench = Bench(config, stage_run, records, room, longest, reference_name, reference, loaded, readers)
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
        _write_samples(bench, name, judged[name])
    result: dict[str, Any] = {"reference": reference_name, "models": {}}
    for name in names:
        against = None if name == reference_name else judged[reference_name]
        result["models"][name] = measures(judged[name], against)
    models = [one.models for one in loaded if one.models]
    if models and len(comparisons):
        compared = scored_pairs.compared(stage_run, config, models[0], comparisons)
        result["reward_model"] = reward_models.judge(compared)
    stage_run.facts |= {"rows": len(records)}
    return result


@dataclass(frozen=True, slots=True)
class Reader:
    """What a model reads prompts by."""

    tokenizer: PreTrainedTokenizerBase
    tools: tool_use.ToolUse | None  # those of all models run in one thread


@dataclass(frozen=True, slots=True)
class Bench:
    """What every model is put on: the same prompts, rewards and reference."""

    config: EvaluateConfig
    stage_run: StageRun
    records: Sequence[Record]  # prompts
    room: int | None  # tokens of the longest prompt that every model has room for
    longest: Mapping[str, int]  # model → tokens of its longest prompt
    reference_name: str
    reference: PreTrainedModel
    loaded: Sequence[build_rewards.LoadedReward]
    readers: Mapping[str, Reader]  # by model

    @property
    def at_once(self) -> int:
        """Prompts that are answered and scored together."""
        return EPISODES_AT_ONCE if self.config.uses_tools else AT_ONCE


def _readers(stage_run: StageRun, config: EvaluateConfig, dataset: Dataset) -> dict[str, Reader]:
    """Of each model. Tools and environment are opened once for all."""
    readers: dict[str, Reader] = {}
    tools: tool_use.ToolUse | None = None
    for name in config.models:
        tokenizer = _tokenizer(stage_run, config, name, dataset.conversational, dataset.records)
        if tools is None:
            tools = tool_use.open_tools(config, stage_run, tokenizer)
        readers[name] = Reader(tokenizer, tools.read_by(tokenizer) if tools else None)
    return readers


def _that_fit(
    stage_run: StageRun, config: EvaluateConfig, records: Sequence[Record], readers: Mapping[str, Reader]
) -> tuple[Sequence[Record], int | None, dict[str, int]]:
    """The prompts that every model has room for, that room in tokens, and the longest of them as each model
    reads it: all models answer the same ones."""
    contexts = [context_length(model_config(_source(stage_run, config, name))) for name in readers]
    context = min((c for c in contexts if c is not None), default=None)
    room = prepare.room_of(stage_run, context, config.sampling.max_new_tokens)
    too_long = prepare.TooLong(stage_run, config.too_long, room)
    for reader in readers.values():
        if reader.tools:
            reader.tools.too_long = too_long
    longest = dict.fromkeys(readers, 0)
    kept: list[int] = []
    read = (_as_ids(reader, records) for reader in readers.values())
    for number, rows in enumerate(zip(*read, strict=True)):
        lengths = [len(ids) for _, ids in rows]
        record = rows[0][0]
        if too_long.fits(record, max(lengths)):
            kept.append(number)
            for name, length in zip(readers, lengths, strict=True):
                longest[name] = max(longest[name], length if room is None else min(length, room))
    too_long.report()
    if not kept:
        raise DataError(f"stage {stage_run.name!r}: no usable row is left of {len(records)}")
    release(records)
    fitting = records if len(kept) == len(records) else picked(records, kept)
    return fitting, room, longest


def _as_ids(reader: Reader, records: Sequence[Record]) -> Iterator[tuple[PromptRecord, list[int]]]:
    """Each prompt with its tokens; with tools those of a prompt whose template is told of them."""
    tokenizer, tools = reader.tokenizer, reader.tools
    for _, record, tokens in each(tokenizer, records):
        assert isinstance(record, PromptRecord)
        yield record, chat.prompt_ids(tokenizer, tools.render(record.prompt)) if tools else tokens[0]


def _source(stage_run: StageRun, config: EvaluateConfig, name: str) -> ModelSource:
    return ModelSource(
        stage_run.resolve(name), dtype=config.dtype, trust_remote_code=config.trust_remote_code
    )


def _tokenizer(
    stage_run: StageRun,
    config: EvaluateConfig,
    name: str,
    conversational: bool,
    reads: Sequence[Record],
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
    config, stage_run, begun = bench.config, bench.stage_run, bench.stage_run.begun()
    tokenizer, tools = bench.readers[name].tokenizer, bench.readers[name].tools
    model = bench.reference if name == bench.reference_name else _open(stage_run, config, name)
    vocabularies = [one.config.get_text_config().vocab_size for one in (model, bench.reference)]
    if vocabularies[0] != vocabularies[1]:
        raise UsageError(
            f"{stage_run.name}: {name!r} has a vocabulary of {vocabularies[0]}, the reference "
            f"{vocabularies[1]}; their KL is not defined"
        )
    rewards = None
    if bench.loaded:
        several, longest = len(bench.loaded) > 1, bench.longest[name] + config.sampling.max_new_tokens
        rewards = build_rewards.mixture(
            bench.loaded, stage_run, tokenizer, longest, normalize=several, batch_size=config.batch_size
        )
    engine = open_sampler(
        config.rollout, model, stage_run, tokenizer, batch_size=config.batch_size,
        # what a `reset` puts behind a prompt is not known yet
        length=None if tools else bench.longest[name] + config.sampling.max_new_tokens,
        trust_remote_code=config.trust_remote_code,
    )  # fmt: skip
    if tools:
        stage_run.at_end(tools.close)
        build_rewards.check_episodes(bench.loaded, tokenizer, stage_run.name)
    on = Answering(model, engine, bench.readers[name], rewards)
    judged: dict[int, list[JudgedCompletion]] = {n: [] for n in sorted(best_of)}
    for start in range(0, len(bench.records), bench.at_once):
        part = _judge_part(bench, on, best_of, start)
        for n, completions in part.items():
            judged[n] += completions
        release(bench.records)
    stage_run.end(begun)  # a server of this model's makes room for the next one's
    return judged


@dataclass(frozen=True, slots=True)
class Answering:
    """One model that answers, and what judges it."""

    model: PreTrainedModel
    engine: Engine
    reader: Reader
    rewards: Mixture | None


def _judge_part(
    bench: Bench, on: Answering, best_of: Sequence[int], start: int
) -> dict[int, list[JudgedCompletion]]:
    """As `_judge`, of the prompts from number `start` on, as many as are answered at once. Several ranks
    share them."""
    config, stage_run = bench.config, bench.stage_run
    records, of = bench.records[start : start + bench.at_once], min(bench.at_once, len(bench.records) - start)
    mine = group.deal([1] * of, group.size())[group.rank()]
    if not mine:
        for _ in range(max(best_of)):
            idle(on.engine)
            _rated(on, [], [], mine)
        return _of_all_ranks({n: [] for n in best_of}, mine)
    rows = Rows(mine, of) if len(mine) < of else None
    records = records if rows is None else [records[i] for i in mine]
    sampling, tokenizer = config.sampling.plain(), on.reader.tokenizer
    prompts = [
        PromptExample(record.prompt, tuple(ids[-(bench.room or 0) :]), record.columns)
        for record, ids in _as_ids(on.reader, records)
    ]
    fixed = ["from", start] if start else []
    begin = derive_seed(stage_run.seed, "evaluate", *fixed)  # all samples of a prompt begin alike
    best: list[Completion] = []
    rated: Rated | None = None
    judged: dict[int, list[JudgedCompletion]] = {}
    for round_ in range(max(best_of)):
        seed = derive_seed(stage_run.seed, "evaluate", *([round_] if round_ else []), *fixed)
        begun, done = tool_use.sampled(
            on.reader.tools, on.engine, prompts, sampling, seed, tokenizer=tokenizer, begin=begin, rows=rows
        )
        new = _rated(on, begun, done, mine)
        if rated is None or new is None:
            best, rated = done, new
        else:
            better = (new.total > rated.total).tolist()
            best = [one if wins else old for one, old, wins in zip(done, best, better, strict=True)]
            rated = _chosen(new, rated, better)
        if (n := round_ + 1) in best_of:
            kls = (
                _kls(bench, on.model, best, chat.ensure_pad(tokenizer), known_ids(tokenizer))
                if n == 1
                else [best_of_n_kl(n)] * len(best)
            )
            judged[n] = _all_judged(bench, tokenizer, begun, best, rated, kls)
    return _of_all_ranks(judged, mine)


def _of_all_ranks(
    judged: Mapping[int, list[JudgedCompletion]], mine: Sequence[int]
) -> dict[int, list[JudgedCompletion]]:
    """n → the completions of all ranks, in the order of the prompts. mine: the numbers of this one's."""
    parts = group.gathered_late((list(mine), dict(judged)))
    return {
        n: [
            one
            for _, one in sorted(
                (pair for numbers, found in parts for pair in zip(numbers, found[n], strict=True)),
                key=lambda pair: pair[0],
            )
        ]
        for n in judged
    }


def _all_judged(
    bench: Bench,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[PromptExample],
    kept: Sequence[Completion],
    rated: Rated | None,
    kls: Sequence[float],
) -> list[JudgedCompletion]:
    """All measures of one completion of each prompt, the gold reward included."""
    config = bench.config
    gold = worlds.load(world_of(config.gold)) if config.gold else None
    judged: list[JudgedCompletion] = []
    for index, (one, completion) in enumerate(zip(asked, kept, strict=True)):
        parts = gold_of(gold, one.prompt, completion, one.columns, tokenizer) if gold else None
        silent = rated.silent[index] if rated is not None and rated.silent else None
        proxy = None if rated is None or silent else float(rated.total[index])
        terms = {} if rated is None else {term: values[index] for term, values in rated.by_name.items()}
        judged.append(
            JudgedCompletion(
                text_of(tokenizer, completion),
                kls[index],
                len(completion.own_ids),
                completion.stop_reason,
                proxy,
                parts,
                terms,
                completion.dialogue,
                one.prompt,
                silent,
            )
        )
    return judged


def _rated(
    on: Answering, asked: Sequence[PromptExample], done: Sequence[Completion], mine: Sequence[int]
) -> Rated | None:
    """What the rewards make of this rank's completions. Every rank has to ask. mine: the numbers of the
    prompts."""
    rewards = on.rewards
    if rewards is None:
        return None

    def ask() -> Answers | None:
        if not done:
            return None
        columns, prompts = build_rewards.columns_of(asked), [one.prompt for one in asked]
        return rewards.ask(build_rewards.batch_of(prompts, done, columns, on.reader.tokenizer))

    return build_rewards.rated_by_all(rewards, ask, mine).rows(mine)


def _chosen(new: Rated, old: Rated, better: Sequence[bool]) -> Rated:
    """Row by row the new rating where it is better."""
    wins = torch.tensor(better)
    by_name = {
        name: [n if w else o for n, o, w in zip(values, old.by_name[name], better, strict=True)]
        for name, values in new.by_name.items()
    }
    sums = [torch.where(wins, getattr(new, part), getattr(old, part)) for part in ("total", "raw", "learned")]
    silent = tuple(n if w else o for n, o, w in zip(new.silent, old.silent, better)) if new.silent else ()
    return Rated(sums[0], sums[1], sums[2], by_name, silent=silent)


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


def _write_samples(bench: Bench, name: str, judged: Sequence[JudgedCompletion]) -> None:
    """One model's completions, with what was said of them, to samples.jsonl."""
    for start in range(0, len(judged), AT_ONCE):
        part = enumerate(judged[start : start + AT_ONCE], start)
        bench.stage_run.samples([sample_row(name, number, one) for number, one in part])
