"""The rewards that `reward:` of a config names: load their models and functions, make one reward of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from keel import plugins
from keel.config.rewards import (
    ClassifierTerm,
    CodeTerm,
    FunctionTerm,
    JudgeTerm,
    LearnedTerm,
    PluginTerm,
    RewardTerm,
    SimilarityTerm,
    VerdictTerm,
)
from keel.data.chat import prompt_tags
from keel.data.questions import Criterion, Rubric
from keel.distributed import group, sharded
from keel.errors import UsageError
from keel.models.offload import on_device
from keel.models.shared_base import Base
from keel.rewards import functions, gym, learned, loading, on_base, rules, sandbox
from keel.rewards.classifier import Classifier
from keel.rewards.code_reward import CodeColumns, code_reward
from keel.rewards.isolated import IsolatedFunction
from keel.rewards.mixture import (
    Answers,
    Batch,
    Mixture,
    Rated,
    Rewarder,
    WeightedReward,
    from_function,
)
from keel.rewards.rules import OWN_LENGTHS
from keel.rewards.similarity import Similarity
from keel.rewards.trainer import TrainingState
from keel.rollout.engine import text_of
from keel.rundir.stage_run import StageRun
from keel.stages import judges
from keel.types import Completion, Conversation, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class LoadedReward:
    """A term of the config with what it needs in memory: reward models, a function of TRL's signature, or a
    judge."""

    term: Any  # of keel.config.rewards
    models: tuple[learned.RewardModel, ...] = ()
    function: Callable[..., Any] | IsolatedFunction | None = None
    judge: Rewarder | None = None


@contextmanager
def whole_here(loaded: Sequence[LoadedReward]) -> Iterator[None]:
    """Within it each rank has the reward models whole that are cut over ranks, and asks them as often as it
    likes. Every rank has to enter, and to leave. Only those on a base that others share are cut."""
    with ExitStack() as stack:
        for one in loaded:
            for reward in one.models:
                stack.enter_context(sharded.whole_here(reward.model))
        yield


def function_of(term: FunctionTerm | PluginTerm, where: str) -> Callable[..., Any] | IsolatedFunction:
    """The function that a term names, in a process of its own unless the term says otherwise. where: the
    setting, for messages. UsageError for one that is not there; an isolated one is only looked for when it is
    first used."""
    plugin = isinstance(term, PluginTerm)
    if term.isolate:
        return IsolatedFunction(term.function, where, term.log_name, plugin=plugin, timeout=term.timeout)
    return loading.of_package(term.function, where) if plugin else loading.load(term.function, where)


def load_rewards(
    terms: Sequence[RewardTerm],
    stage_run: StageRun,
    *,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    base: Base | None = None,
) -> list[LoadedReward]:
    """Load the models and functions that the terms name; reward models that were trained as adapters on
    `base` as such. UsageError for one that cannot be used."""
    loaded: list[LoadedReward] = []
    where = f"{stage_run.name}: reward"
    for term in terms:
        match term:
            case LearnedTerm():
                models = _learned(term, stage_run, where, dtype, trust_remote_code, base)
                loaded.append(LoadedReward(term, models))
            case FunctionTerm() | PluginTerm():
                function = function_of(term, where)
                functions.signature_of(function)  # imported now, so that its memory is there from the start
                loaded.append(LoadedReward(term, function=function))
            case SimilarityTerm():
                similarity = Similarity(
                    stage_run.resolve(term.model),
                    term.to,
                    device=stage_run.device,
                    trust_remote_code=trust_remote_code,
                )
                loaded.append(LoadedReward(term, function=similarity))
            case ClassifierTerm():
                classifier = Classifier(
                    stage_run.resolve(term.model),
                    term.label,
                    output=term.output,
                    reads=term.reads,
                    device=stage_run.device,
                    trust_remote_code=trust_remote_code,
                )
                loaded.append(LoadedReward(term, function=classifier))
            case JudgeTerm():
                judge = judges.of_reward(term, stage_run, dtype=dtype, trust_remote_code=trust_remote_code)
                loaded.append(LoadedReward(term, judge=judge))
            case _:
                loaded.append(LoadedReward(term, function=_rule(term)))
    return loaded


def _learned(
    term: LearnedTerm, stage_run: StageRun, where: str, dtype: str, trust_remote_code: bool, base: Base | None
) -> tuple[learned.RewardModel, ...]:
    """The members of a reward model. UsageError where `combine` is given and there is one."""
    path = stage_run.resolve(term.model)
    if base is None:
        models = learned.load_members(
            path, device=stage_run.device, dtype=dtype, trust_remote_code=trust_remote_code,
            quantize=term.quantize,
        )  # fmt: skip
    else:
        models = on_base.load_members_on_base(
            path, base, dtype=dtype, trust_remote_code=trust_remote_code, quantize=term.quantize,
            say=lambda line: stage_run.say(f"{stage_run.name}: {line}"),
        )  # fmt: skip
    if term.combine is not None and len(models) == 1:
        raise UsageError(f"{where}: `combine` has no effect: {term.model!r} is a single reward model")
    return tuple(models)


def check(terms: Sequence[RewardTerm], where: str) -> None:
    """UsageError for rules that cannot be made and functions that are not there. No model is loaded, and no
    code of a config's is run: a function is looked for in its file."""
    for term in terms:
        if isinstance(term, FunctionTerm):
            loading.look(term.function, f"{where}: reward")
        elif isinstance(term, PluginTerm):
            try:
                plugins.point_of("keel.rewards", term.function)
            except UsageError as error:
                raise UsageError(f"{where}: reward: {error}") from None
        elif not isinstance(term, LearnedTerm | SimilarityTerm | ClassifierTerm | JudgeTerm):
            try:
                _rule(term)
            except UsageError as error:
                raise UsageError(f"{where}: reward {term.log_name!r}: {error}") from None


def _rule(term: RewardTerm) -> Callable[..., Any]:
    match term.kind:
        case "environment":
            return _of_environment
        case "answer":
            return rules.final_answer(term.column, term.where)
        case "verdict":
            if term.mode == "pairwise":
                return rules.verdict(term.column)
            return rules.score_verdict(rubric_of_scores(term), term.column)
        case "format":
            return rules.format_tags(term.tags, term.partial)
        case "regex":
            return rules.regex(term.pattern, term.full, term.timeout, term.log_name)
        case "length":
            return rules.length_band(term.low, term.high, term.unit, term.slack)
        case "repetition":
            return rules.repetition(term.n)
        case "keywords":
            return rules.keywords(term.words, term.mode, term.ignore_case)
        case "overlong":
            return rules.overlong(term.max_length, term.buffer)
        case "gym":
            return gym.gym_score(term.reads, term.partial, term.timeout)
        case "code":
            return _code(term)
    raise AssertionError(term.kind)


def rubric_of_scores(term: VerdictTerm) -> Rubric:
    """By which a score is read: the criteria and the scale."""
    criteria = tuple(Criterion(one.name, one.weight, one.description) for one in term.rubric or ())
    return Rubric("", criteria, *term.scale)


def _code(term: CodeTerm) -> Callable[..., Any]:
    return code_reward(
        CodeColumns(term.tests, term.setup, term.entry_point),
        partial(sandbox_of, term, f"reward {term.log_name!r}"),
        sandbox.Limits(term.timeout, term.memory, term.processes),
        score=term.score,
        unfenced=term.unfenced,
        at_once=term.at_once or min(sandbox.cores(), 8),
    )


def sandbox_of(term: CodeTerm, where: str) -> sandbox.Sandbox:
    """What a term's programs are run in. where: for messages. UsageError where there is none here."""
    return sandbox.find(term.sandbox, term.image, term.packages, where)


def _of_environment(
    prompts: Sequence[Any], completions: Sequence[Any], environment_reward: Sequence[float | None], **_: Any
) -> list[float | None]:
    """What the environments of episodes said of them."""
    return list(environment_reward)


def mixture(
    loaded: Sequence[LoadedReward],
    stage_run: StageRun,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    *,
    normalize: bool,
    batch_size: int,
) -> Mixture:
    """The terms as one reward of samples of a model with this tokenizer.

    longest: tokens that a prompt and its response take at most. normalize: each learned model's scores on the
    scale that its training gave them; an ensemble's members always are. UsageError for a reward model without
    a scale where one is needed, or with too short a context.
    """
    terms: list[WeightedReward] = []
    for one in loaded:
        term = one.term
        if not one.models:
            assert one.judge is not None or one.function is not None
            plain = one.judge or from_function(term.log_name, one.function)  # pyright: ignore[reportArgumentType]
            rewarder = _for_its_source(term, plain)
            silent = isinstance(term, JudgeTerm) and term.on_failure == "none"
            compares = isinstance(term, JudgeTerm) and term.compares
            terms.append(
                WeightedReward(term.log_name, term.weight, rewarder, neutral=silent, compares=compares)
            )
            continue
        if normalize or len(one.models) > 1:
            for model in one.models:
                _check_scale(stage_run, term, model)
        for model in one.models:
            if learned.reads_ids_of(model, tokenizer):
                learned.check_room(model, longest, stage_run.name)
        rewarder = _for_its_source(term, _ensemble(stage_run, one, tokenizer, batch_size))
        alone = one.models[0] if len(one.models) == 1 and normalize else None
        terms.append(
            WeightedReward(term.log_name, term.weight, rewarder, alone.mean, alone.std, learned=True)
            if alone
            else WeightedReward(term.log_name, term.weight, rewarder, learned=True)
        )
    return Mixture(terms)


def rated_by_all(rewards: Mixture, ask: Callable[[], Answers | None], numbers: Sequence[int]) -> Rated:
    """What rewards make of the samples of all ranks, in the order of their numbers. Each rank asks about its
    own, and all sum what all were told: what counts for a sample of which a judge said nothing does not
    depend on how samples are dealt out.

    ask: of this rank's samples; None where it has none. numbers: of these among all. Every rank has to call,
    and a RewardError of one is met by all."""
    told = group.gathered_or_error(lambda: (list(numbers), ask()))
    found = [(own, answers) for own, answers in told if answers is not None]
    order = [number for own, _ in found for number in own]
    with group.alike():
        return rewards.sum(Answers.joined([answers for _, answers in found], order))


def _for_its_source(term: RewardTerm, rewarder: Rewarder) -> Rewarder:
    """The reward where it is meant for every row; else None for rows of other sources."""
    if term.source_filter is None:
        return rewarder

    def chosen(batch: Batch) -> list[float | None]:
        sources = batch.columns["source"]  # every row that is read has one
        rows = [i for i, source in enumerate(sources) if source == term.source_filter]
        values: list[float | None] = [None] * len(sources)
        if rows:
            part = batch.rows(rows)
            for row, value in zip(rows, rewarder(part), strict=True):
                values[row] = value
            batch.logged.add(part.logged.dump(), rows, len(sources))
        return values

    return chosen


def read_text(loaded: Sequence[LoadedReward], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether any of the rewards reads words, not ids. Compares vocabularies: to be asked once, not once a
    batch."""
    return any(
        not one.models or not all(learned.reads_ids_of(model, tokenizer) for model in one.models)
        for one in loaded
    )


def check_episodes(loaded: Sequence[LoadedReward], tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """UsageError for a reward model that cannot read episodes with tools. where: the stage, for messages."""
    if not all(learned.reads_ids_of(model, tokenizer) for one in loaded for model in one.models):
        raise UsageError(
            f"{where}: a reward model with another tokenizer than the policy's cannot read episodes with "
            "tools; use one that was trained from the same model"
        )


def _check_scale(stage_run: StageRun, term: LearnedTerm, model: learned.RewardModel) -> None:
    if not model.scaled:
        raise UsageError(
            f"{stage_run.name}: the reward model {term.model!r} says nothing of the scale of its scores, so "
            "nothing can be normalised by it; train it with a reward stage, or set `shaping.normalize` to "
            "running or none"
        )


def _ensemble(
    stage_run: StageRun, one: LoadedReward, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> Rewarder:
    """Raw scores of a single reward model; of several, what `combine` makes of their normalised scores."""
    reads_ids = [learned.reads_ids_of(model, tokenizer) for model in one.models]

    def scores(model: learned.RewardModel, ids: bool, batch: Batch) -> Tensor:
        for conversational in {not isinstance(prompt, str) for prompt in batch.prompts}:
            if said := learned.other_form(model, conversational):
                stage_run.note(f"the reward model {one.term.model} {said}")
        rows, cut = _rows(model, ids, batch)
        earlier = stage_run.facts.get("responses_cut_for_reward", 0)
        if cut and not earlier:
            stage_run.say(
                f"{stage_run.name}: responses longer than the reward model reads are scored by their start"
            )
        if cut:
            stage_run.facts["responses_cut_for_reward"] = earlier + cut
        with on_device(model.model):
            prompts = [tuple(ids) for ids in batch.prompt_ids]
            return learned.score(model, rows, batch_size=batch_size, together=prompts)

    def rewarder(batch: Batch) -> list[float]:
        by_model = [scores(model, ids, batch) for model, ids in zip(one.models, reads_ids, strict=True)]
        if len(by_model) == 1:
            return by_model[0].tolist()
        members = torch.stack([(s - m.mean) / m.std for s, m in zip(by_model, one.models, strict=True)])
        penalty = 1.0 if one.term.std_penalty is None else one.term.std_penalty
        return learned.combined(members, one.term.combine or "mean", penalty).tolist()

    return rewarder


def _rows(model: learned.RewardModel, ids: bool, batch: Batch) -> tuple[list[learned.Inputs], int]:
    if ids:
        asked = zip(batch.prompt_ids, batch.prompts, batch.completion_ids, strict=True)
        return [{"input_ids": [*ids, *learned.whole(model, prompt, said)]} for ids, prompt, said in asked], 0
    texts = [y if isinstance(y, str) else y[0]["content"] for y in batch.completions]
    ended = [reason != "length" for reason in batch.stop_reasons]
    return learned.encode_samples(model, batch.prompts, texts, ended)


def columns_of(examples: Sequence[Any]) -> list[dict[str, Any]]:
    """Of each prompt the other columns of its row, and its environment where it has one."""
    environments = [getattr(example, "environment", None) for example in examples]
    some = any(environment is not None for environment in environments)
    return [
        {**example.columns, **({functions.OF_EPISODES: environment} if some else {})}
        for example, environment in zip(examples, environments, strict=True)
    ]


def batch_of(
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    columns: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    as_text: bool = True,
    state: TrainingState | None = None,
) -> Batch:
    """Samples as rewards see them; a column that some rows lack is None there. as_text False: no reward reads
    words, so nothing is decoded."""
    texts = [text_of(tokenizer, c) if as_text else "" for c in completions]
    names = dict.fromkeys(name for row in columns for name in row)
    tags = [prompt_tags(tokenizer, c.prompt_ids) if as_text else "" for c in completions]
    more: dict[str, Sequence[Any]] = {"prompt_tags": tags} if any(tags) else {}
    if any(c.dialogue is not None for c in completions):
        more |= _of_episodes(completions)
    return Batch(
        prompts,
        [_reply(*pair) for pair in zip(prompts, texts, completions, strict=True)],
        [c.ids for c in completions],
        [c.stop_reason for c in completions],
        [c.prompt_ids for c in completions],
        {name: [row.get(name) for row in columns] for name in names} | more,
        state or TrainingState(),
    )


def _of_episodes(completions: Sequence[Completion]) -> dict[str, Sequence[Any]]:
    """Columns of episodes with tools: what the environment said, and how many tokens are the model's own."""
    rewards = [None if c.dialogue is None else c.dialogue.reward for c in completions]
    asked = {"environment_reward": rewards} if any(reward is not None for reward in rewards) else {}
    return {OWN_LENGTHS: [len(c.own_ids) for c in completions], **asked}


def _reply(prompt: Prompt, text: str, completion: Completion) -> str | Conversation:
    if completion.dialogue is not None:
        return completion.dialogue.turns
    return text if isinstance(prompt, str) else ({"role": "assistant", "content": text.strip()},)
