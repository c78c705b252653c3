"""Experience: what the policy says to prompts, and what every model makes of it. Nothing here takes a
gradient.

The stages that learn from their own samples share it; they differ in what they make of the rewards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from keel.accel import batch_layout
from keel.accel.cpu_linear import cast_cache
from keel.algorithms import policy
from keel.algorithms.masked import masked_mean
from keel.config import OnPolicy
from keel.data import chat
from keel.data.batches import derive_seed, useful_pairs, useful_tokens
from keel.distributed import group, sharded
from keel.errors import UsageError
from keel.evaluation.measures import Measure, mean_interval
from keel.models.head import head_of
from keel.models.offload import on_device
from keel.models.roles import Roles
from keel.models.tokenizer import known_ids
from keel.rewards.mixture import Answers, Mixture, Rated
from keel.rewards.shaping import RunningScale, terminal_rewards
from keel.rewards.trainer import TrainingState
from keel.rl import heldout_judge, through_text
from keel.rl.sampled import Dealt, Sampled, deal, together
from keel.rl.through_text import Gaps
from keel.rollout.engine import text_of
from keel.rollout.protocol import (
    Engine,
    GenerationRequest,
    HoldsWeights,
    Rows,
    TokenCount,
    check_completions,
)
from keel.rollout.score_responses import Scored, sampled_logp, score
from keel.rollout.vllm.shared import idle
from keel.rundir.stage_run import StageRun
from keel.stages import build_rewards, language
from keel.stages.lazy_rows import PromptExample
from keel.stages.loop_utils import SAMPLES_KEPT, forward_rows, micro_batches
from keel.stages.tool_use import ToolUse
from keel.types import Completion, Prompt

# metrics that say nothing where the samples are not compared with a reference, or nothing is rewarded
OF_REFERENCE = (
    "objective/kl", "objective/kl_exact", "objective/kl_coef", "objective/non_score_reward",
    "objective/rlhf_reward",
)  # fmt: skip
OF_SCORES = (
    "objective/scores", "objective/scores_std", "objective/rlhf_reward", "rollout/length_correlation",
    "eval/objective/scores", "scores",
)  # fmt: skip


C = TypeVar("C", bound=OnPolicy, covariant=True)


@dataclass(frozen=True, slots=True)
class Setup(Generic[C]):
    """Everything an update needs that does not change: models, prompts, settings."""

    config: C
    roles: Roles
    engine: Engine  # samples from the policy
    rewards: Mixture | None  # None: nothing is rewarded, a teacher is imitated
    opened: Sequence[build_rewards.LoadedReward]  # what the rewards hold in memory
    as_text: bool  # whether any of them reads words
    tokenizer: PreTrainedTokenizerBase
    run: StageRun
    ptx: tuple[language.LanguageRow, ...]
    judge: heldout_judge.Judge | None = None  # held out: nothing is trained on it
    tool_use: ToolUse | None = None  # what responses are episodes with
    teacher_tokenizer: PreTrainedTokenizerBase | None = None  # of a teacher that is asked through text

    @property
    def pad_id(self) -> int:
        return chat.ensure_pad(self.tokenizer)

    @property
    def vocab(self) -> int:
        """Ids that are drawn; ratios and KL are of the distribution over these alone."""
        return known_ids(self.tokenizer)


@dataclass(frozen=True, slots=True)
class LoopState:
    """What changes between updates besides the weights."""

    kl_coef: float  # β
    reward_scaler: RunningScale
    episodes: int = 0  # sampled so far
    lr_factor: float = 1.0  # share of the scheduled learning rate that `desired_kl` leaves

    def values(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    @staticmethod
    def restored(values: Mapping[str, Any]) -> LoopState:
        """From what `values` gave."""
        scaler = RunningScale(**values["reward_scaler"])
        return LoopState(values["kl_coef"], scaler, values["episodes"], values["lr_factor"])


@dataclass(frozen=True, slots=True)
class Experience:
    """A batch of responses with what they earned."""

    prompts: tuple[Prompt, ...]  # of each response
    completions: tuple[Completion, ...]
    scored: Scored
    rated: Rated  # what each reward says, and their weighted sum
    rewards: Tensor  # (B,) shaped rewards of whole responses, before any KL
    logp_from_sampler: bool = False  # whether `scored.logp` are the numbers that the tokens were drawn with
    early: Tensor | None = None  # (B, T) the part of `rewards` that is paid before a response ends
    staleness: float = 0  # updates that the weights have learned from since they sampled; mean over tokens
    compared: bool = True  # with the reference; else `scored` takes the policy itself for it

    @property
    def kl(self) -> float:
        """Mean over responses of the exact KL summed over their tokens, in nats."""
        return self.scored.exact_kl.sum(dim=1).mean().item()


@dataclass(frozen=True, slots=True)
class Drawn:
    """This rank's responses to the prompts of an update, as they were sampled."""

    prompts: Sequence[PromptExample]  # of each response
    completions: Sequence[Completion]
    staleness: float = 0  # see `Experience`


def take_weights(setup: Setup[OnPolicy]) -> None:
    """What samples next does so by the weights as they are now."""
    if isinstance(setup.engine, HoldsWeights):
        setup.engine.take_weights()


def seed_of(setup: Setup[OnPolicy], update: int, *more: object) -> int:
    """The seed of an update's samples."""
    return derive_seed(setup.run.seed, "rollout", update, *more)


def begin(
    setup: Setup[OnPolicy],
    prompts: Sequence[PromptExample],
    seed: int,
    samples: int = 1,
    rows: Rows | None = None,
) -> Sequence[PromptExample]:
    """The prompts as responses to them begin: with tools, each with an environment that was reset. samples:
    of one prompt, which stand side by side. rows: which of all rows of the seed these are."""
    return prompts if setup.tool_use is None else setup.tool_use.begin(prompts, seed, samples, rows)


def sample(
    setup: Setup[OnPolicy],
    prompts: Sequence[PromptExample],
    seed: int,
    count: TokenCount | None = None,
    rows: Rows | None = None,
) -> list[Completion]:
    """One response a prompt, with what `score_tokens` will need of the sampler's own forwards; with tools an
    episode on each of the prompts of `begin`. count: counts its tokens. rows: which of all rows of the seed
    these are. UsageError where the engine returns something else."""
    if setup.tool_use is None:
        return completed(setup, request_of(setup, prompts, seed, rows), count)
    config = setup.config
    completions = setup.tool_use.play(
        setup.engine, prompts, config.sampling.plain(), seed, keep_head_inputs=config.trusts_sampler,
        count=count, rows=rows,
    )  # fmt: skip
    return _usable(config, completions)


def request_of(
    setup: Setup[OnPolicy], prompts: Sequence[PromptExample], seed: int, rows: Rows | None
) -> GenerationRequest:
    """What an engine is asked for whole responses. rows: which of all rows of the seed these are."""
    config = setup.config
    return GenerationRequest.of(
        setup.tokenizer, [prompt.ids for prompt in prompts], config.sampling.plain(), seed,
        keep_head_inputs=config.trusts_sampler, rows=rows,
    )  # fmt: skip


def completed(
    setup: Setup[OnPolicy], request: GenerationRequest, count: TokenCount | None = None
) -> list[Completion]:
    """What the engine makes of a request. UsageError where it returns something else than was asked for."""
    return checked(setup, request, setup.engine.generate(request, count))


def checked(
    setup: Setup[OnPolicy], request: GenerationRequest, completions: list[Completion]
) -> list[Completion]:
    """What an engine returned. UsageError where it is something else than was asked for."""
    check_completions(setup.config.engine_name, request, completions)
    return _usable(setup.config, completions)


def _usable(config: OnPolicy, completions: list[Completion]) -> list[Completion]:
    """UsageError for completions without log-probabilities, where the loss needs those of the sampler."""
    if config.importance_cap is not None and not all(c.logp for c in completions):
        raise UsageError(
            "`importance_cap` needs the log-probabilities of the sampler,"
            f" which engine {config.engine_name!r} does not give"
        )
    if not config.trusts_sampler:  # an engine may keep what it was not asked for, and of older weights
        completions = [replace(c, hidden=None) for c in completions]
    return completions


def score_tokens(
    setup: Setup[OnPolicy], completions: Sequence[Completion], *, compared: bool = True
) -> Scored:
    """What policy, reference and critic say of each token. compared: with the reference; else the policy
    stands for it, which costs no forward, and every KL is 0."""
    config, roles = setup.config, setup.roles
    reference = roles.reference if compared else roles.policy
    with on_device(reference):
        return score(
            completions,
            roles.policy,
            reference,
            temperature=config.sampling.temperature,
            pad_id=setup.pad_id,
            device=setup.run.device,
            critic=roles.critic,
            value_head=roles.value_head,
            vocab=setup.vocab,
            **forward_rows(config),
        )


def asked(
    setup: Setup[OnPolicy],
    prompts: Sequence[Prompt | PromptExample],
    completions: Sequence[Completion],
    scored: Scored,
) -> Gaps:
    """What a teacher that is asked through text makes of replies."""
    assert setup.teacher_tokenizer is not None
    config = setup.config
    plain = [prompt.prompt if isinstance(prompt, PromptExample) else prompt for prompt in prompts]
    return through_text.gaps(
        setup.roles.reference, (setup.tokenizer, setup.teacher_tokenizer), plain, completions, scored.logp,
        temperature=config.sampling.temperature, device=setup.run.device, **forward_rows(config),
    )  # fmt: skip


def rate(
    setup: Setup[OnPolicy],
    prompts: Sequence[PromptExample],
    completions: Sequence[Completion],
    update: int = 0,
    dealt: Dealt | None = None,
) -> Rated:
    """What the rewards say of each response. update: the one that they are sampled for; 0: none. dealt: the
    responses are this rank's share, and what is returned is of all ranks'; all have to call."""
    rewards = setup.rewards
    if rewards is None:
        nothing = torch.zeros(len(completions) if dealt is None else dealt.of)
        return Rated(nothing, nothing, nothing, {})

    def ask() -> Answers:
        batch = build_rewards.batch_of(
            [prompt.prompt for prompt in prompts], completions, build_rewards.columns_of(prompts),
            setup.tokenizer, as_text=setup.as_text, state=_state(setup, update),
        )  # fmt: skip
        return rewards.ask(batch)

    def ask_in_time() -> Answers | None:
        with setup.run.timed("score"), cast_cache():
            return ask() if completions else None

    with build_rewards.whole_here(setup.opened):
        if dealt is None:
            return rewards.sum(ask())
        return build_rewards.rated_by_all(rewards, ask_in_time, dealt.rows)


def _state(setup: Setup[OnPolicy], update: int) -> TrainingState:
    """Where training stands, for reward functions that ask."""
    config, rows = setup.config, setup.run.facts.get("rows") or 1
    done = max(update - 1, 0)
    return TrainingState(done, config.updates, done * config.batch_size / config.samples_per_prompt / rows)


def collect(
    setup: Setup[OnPolicy],
    prompts: Sequence[PromptExample],
    reward_scaler: RunningScale,
    seed: int,
    update: int = 0,
    drawn: Drawn | None = None,
) -> tuple[Experience, RunningScale]:
    """Sample `samples_per_prompt` responses to each prompt, score and shape them. The scaler that is returned
    has seen their rewards. drawn: the responses, where they were sampled an update ago."""
    dealt = deal_out(setup, prompts)
    if drawn is None:
        take_weights(setup)
    asked, own = _collected(setup, prompts, dealt, seed, drawn) if dealt.rows else ((), None)
    if own is None:
        _lend(setup, prompts[0], sampled=drawn is not None)
    rated = rate(setup, asked, own.completions if own else (), update, dealt)
    made = together(dealt, own, setup.pad_id)
    done, scored = made.completions, made.scored
    reward_scaler = reward_scaler.update(rated.total)
    rewards = shaped(setup, rated, done, reward_scaler)
    early = paid_early(setup, done, rated, scored.mask)
    found = Experience(
        made.prompts, done, scored, rated, rewards, made.from_sampler, early,
        staleness=0 if drawn is None else drawn.staleness, compared=not setup.config.imitates,
    )  # fmt: skip
    return found, reward_scaler


def deal_out(setup: Setup[OnPolicy], prompts: Sequence[PromptExample]) -> Dealt:
    """This rank's share of an update's prompts. Where a judge compares the replies to one prompt, those to
    equal prompts are compared, too: one rank has all of them."""
    compared = setup.rewards is not None and setup.rewards.compares
    numbered = [prompt.ids for prompt in prompts] if compared else range(len(prompts))
    return deal(numbered, setup.config.samples_per_prompt)


def draw(setup: Setup[OnPolicy], prompts: Sequence[PromptExample], dealt: Dealt, seed: int) -> Drawn:
    """Sample the responses to those of the prompts that are this rank's."""
    run, samples = setup.run, setup.config.samples_per_prompt
    repeated, rows, count = dealt.repeated(prompts), rows_of(dealt), TokenCount()
    if not repeated:
        with sampling(setup):
            idle(setup.engine)
        return Drawn((), ())
    with run.timed("rollout"), sampling(setup):
        begun = begin(setup, repeated, seed, samples, rows)
        completions = sample(setup, begun, seed, count, rows)
    if count.computed:  # an engine need not count
        run.count("rollout", count.useful, count.computed, passes=count.passes, pairs=count.pairs)
    return Drawn(begun, completions)


def rows_of(dealt: Dealt) -> Rows | None:
    """Which of all rows of a seed a rank's are; None: all of them."""
    return None if len(dealt.rows) == dealt.of else Rows(dealt.rows, dealt.of)


def sampling(setup: Setup[OnPolicy]) -> AbstractContextManager[None]:
    """Within it the policy may be sampled from: it is whole on each rank, but for an engine that holds
    weights of its own."""
    away = isinstance(setup.engine, HoldsWeights)
    return nullcontext() if away else sharded.whole_here(setup.roles.policy)


def _collected(
    setup: Setup[OnPolicy],
    prompts: Sequence[PromptExample],
    dealt: Dealt,
    seed: int,
    drawn: Drawn | None,
) -> tuple[Sequence[PromptExample], Sampled]:
    """Responses to this rank's prompts, scored; with the prompt of each."""
    run = setup.run
    drawn = drawn or draw(setup, prompts, dealt, seed)
    repeated, completions = drawn.prompts, drawn.completions
    del drawn
    with run.timed("forward"), batch_layout.counting() as read, cast_cache():
        scored = score_tokens(setup, completions, compared=not setup.config.imitates)
    from_sampler = head_of(setup.roles.policy) is not None and all(c.hidden is not None for c in completions)
    done = tuple(replace(c, hidden=None) for c in completions)
    del completions  # with the states that they were drawn from
    sizes = [(c.prompt_ids, len(c.prompt_ids) + len(c.ids)) for c in done]
    useful, pairs = useful_tokens(sizes), useful_pairs(sizes)
    run.count("forward", useful, read(), passes=read.passes, pairs=pairs)
    if "score" in run.costs:
        run.count("score", useful, passes=1, pairs=pairs)
    asked = tuple(prompt.prompt for prompt in repeated)
    return repeated, Sampled(asked, done, scored, from_sampler)


def _lend(
    setup: Setup[OnPolicy], row: PromptExample, *, sampled: bool = False, held_out: bool = False
) -> None:
    """What a rank without prompts does: its part in the others' sampling, where they share a server, and in
    their forwards, where weights are cut over ranks, on a row that is nobody's. sampled: whether what they
    score was sampled before. held_out: whether they evaluate."""
    if not sampled:
        with sampling(setup):
            idle(setup.engine)
    if not group.is_sharded():
        return
    compared = setup.teacher_tokenizer is None if held_out else not setup.config.imitates
    score_tokens(setup, [Completion(row.ids, (setup.pad_id,), "length", (0.0,))], compared=compared)
    if not held_out:
        return
    if not compared:
        through_text.lend(setup.roles.reference, setup.run.device)
    with build_rewards.whole_here(setup.opened):
        pass
    if setup.judge is not None:
        with build_rewards.whole_here(setup.judge.opened):
            pass


def shaped(
    setup: Setup[OnPolicy], rated: Rated, completions: Sequence[Completion], reward_scaler: RunningScale
) -> Tensor:
    """(B,) rewards of whole responses: normalised, clipped, penalised, centred, as the config says."""
    shaping = setup.config.shaping
    ended = torch.tensor([c.ended for c in completions])
    if shaping.normalize == "running":
        scores, rest, clip = rated.total, None, shaping.clip
        mean, std = reward_scaler.mean, reward_scaler.std
    else:  # the clip is for learned rewards, in units of their scale, and not for what means what it says
        scores, rest, mean, std = rated.learned, rated.total - rated.learned, 0.0, 1.0
        bounded = shaping.normalize == "model" or shaping.changes("clip")
        weight = setup.rewards.learned_weight if setup.rewards else 0.0
        clip = shaping.clip * weight if shaping.clip is not None and bounded else None
    return terminal_rewards(
        scores, ended, mean=mean, std=std, clip=clip, missing_stop_penalty=shaping.missing_stop_penalty,
        center=shaping.center, group_size=setup.config.samples_per_prompt, unclipped=rest,
    )  # fmt: skip


def paid_early(
    setup: Setup[OnPolicy], completions: Sequence[Completion], rated: Rated, mask: Tensor
) -> Tensor | None:
    """(B, T) what the environment's rewards `at: turn` pay for each turn but the last, at its last token;
    nothing to a row that they are not for. None where there is no such reward."""
    terms = [t for t in setup.config.reward if t.kind == "environment" and t.at == "turn" and t.weight]
    if not terms:
        return None
    early = torch.zeros(mask.shape)
    for row, completion in enumerate(completions):
        assert completion.dialogue is not None
        weight = sum(t.weight for t in terms if rated.by_name[t.log_name][row] is not None)
        before = 0.0
        for end, said in list(zip(completion.dialogue.ends, completion.dialogue.turn_rewards))[:-1]:
            early[row, end], before = weight * (said - before), said
    return early


def measured(experience: Experience, kl_coef: float) -> dict[str, float]:
    """The metrics of a batch that say what was sampled and what it earned."""
    scored, completions, scores = experience.scored, experience.completions, experience.rated.raw
    sampled_kl = (scored.logp - scored.ref_logp).sum(dim=1)
    non_score = -kl_coef * sampled_kl
    found = {
        "objective/kl": sampled_kl.mean().item(),
        "objective/kl_exact": experience.kl,
        "objective/kl_coef": kl_coef,
        "objective/entropy": (-scored.logp).sum(dim=1).mean().item(),
        "objective/non_score_reward": non_score.mean().item(),
        "objective/rlhf_reward": (experience.rewards + non_score).mean().item(),
        "objective/scores": scores.mean().item(),
        "objective/scores_std": scores.std(correction=0).item(),
        "val/num_eos_tokens": float(sum(c.stop_reason == "eos" for c in completions)),
        "rollout/episodes": float(len(completions)),
        "rollout/response_length": scored.mask.sum(dim=1).float().mean().item(),
        "rollout/truncated": sum(not c.ended for c in completions) / len(completions),
        **_sampler_mismatch(experience),
        **_shape(experience),
        **_of_tools(experience),
    } | _by_name(experience.rated)
    left_out = (
        *(() if experience.compared else OF_REFERENCE),
        *(() if experience.rated.by_name else OF_SCORES),
    )
    return {name: value for name, value in found.items() if name not in left_out}


def _by_name(rated: Rated) -> dict[str, float]:
    """Mean and spread of each reward over the samples to which it applies, and the share of those."""
    metrics: dict[str, float] = {}
    for name, values in rated.by_name.items():
        applies = torch.tensor([value for value in values if value is not None], dtype=torch.float64)
        metrics[f"rewards/{name}/applies"] = len(applies) / len(values)
        if len(applies):
            metrics[f"rewards/{name}/mean"] = applies.mean().item()
            metrics[f"rewards/{name}/std"] = applies.std(correction=0).item()
    for name, logged in rated.logged.metrics.items():
        metrics[f"rewards/logged/{name}"] = sum(logged) / len(logged)
    return metrics


def _shape(experience: Experience) -> dict[str, float]:
    """How much responses repeat themselves, and how far their length tells their reward (0 where either is
    constant)."""
    repeated = []
    for ids in (c.own_ids for c in experience.completions):
        runs = list(zip(ids, ids[1:], ids[2:], strict=False))
        repeated.append(1 - len(set(runs)) / len(runs) if runs else 0.0)
    both = torch.stack([experience.rated.raw.double(), experience.scored.mask.sum(dim=1).double()])
    varied = len(repeated) > 1 and bool((both.amax(dim=1) > both.amin(dim=1)).all())
    return {
        "rollout/repetition": sum(repeated) / len(repeated),
        "rollout/length_correlation": torch.corrcoef(both)[0, 1].item() if varied else 0.0,
    }


def _of_tools(experience: Experience) -> dict[str, float]:
    """What episodes with tools did; nothing for responses without."""
    found = [(c, c.dialogue) for c in experience.completions if c.dialogue is not None]
    if not found:
        return {}
    calls = sum(dialogue.calls for _, dialogue in found)
    return {
        "tools/call_frequency": calls / len(found),
        "tools/failure_frequency": sum(dialogue.failures for _, dialogue in found) / max(calls, 1),
        "rollout/turns": sum(len(dialogue.ends) for _, dialogue in found) / len(found),
        "rollout/context_length": sum(len(c.ids) - len(c.own_ids) for c, _ in found) / len(found),
        "rollout/out_of_turns": sum(c.stop_reason == "turns" for c, _ in found) / len(found),
        "rollout/no_room_for_answer": sum(bool(dialogue.unheard) for _, dialogue in found) / len(found),
    }


def importance(setup: Setup[OnPolicy], experience: Experience) -> Tensor | None:
    """(B, T) truncated importance weights of trainer against sampler, where the config asks for them."""
    config, mask = setup.config, experience.scored.mask
    cap, mode = config.importance_cap, config.importance_mode
    if cap is None:
        return None
    sampled = sampled_logp(experience.completions, mask)
    return policy.importance_weights(experience.scored.logp, sampled, mask, cap, mode)


def of_staleness(setup: Setup[OnPolicy], experience: Experience) -> dict[str, float]:
    """How far the weights that sampled are from those that learn; nothing without `rollout.ahead` or
    `rollout.partial`."""
    cap, mask = setup.config.importance_cap, experience.scored.mask
    if not (setup.config.rollout.ahead or setup.config.rollout.partial) or cap is None:
        return {}
    now, then = experience.scored.logp, sampled_logp(experience.completions, mask)
    far = policy.divergence(now, then, mask, "token", float(mask.sum()))
    return {
        "rollout/staleness": float(experience.staleness),
        "rollout/staleness_kl": far["approxkl_k3"].item(),
        "rollout/importance_capped": masked_mean((now - then > math.log(cap)).float(), mask).item(),
    }


def _sampler_mismatch(experience: Experience) -> dict[str, float]:
    """Mean |scored log π − log π of the sampler| per token; nothing where an engine does not give the latter,
    or has sampled by other weights."""
    if experience.staleness or not all(c.logp for c in experience.completions):
        return {}
    mask = experience.scored.mask
    gap = (experience.scored.logp - sampled_logp(experience.completions, mask)).abs()
    return {"rollout/sampler_drift": masked_mean(gap, mask).item()}


def _extra_of(experience: Experience, row: int) -> dict[str, Any]:
    """What reward functions logged of one response; nothing where they logged nothing."""
    size, extra = len(experience.completions), experience.rated.logged.extra
    found = {name: values[row] for name, values in extra.items() if len(values) == size}
    return {"extra": found} if found else {}


def sample_rows(setup: Setup[OnPolicy], update: int, experience: Experience) -> list[dict[str, Any]]:
    """The first few responses of a batch, as lines of samples.jsonl."""
    scored = experience.scored
    kls = (scored.logp - scored.ref_logp).sum(dim=1).tolist()
    return [
        {
            "step": update,
            "prompt": experience.prompts[i],
            "completion": text_of(setup.tokenizer, c) if c.dialogue is None else list(c.dialogue.happened),
            "rewards": {name: values[i] for name, values in experience.rated.by_name.items()},
            **_extra_of(experience, i),
            **({"kl": kls[i]} if experience.compared else {}),
            "length": len(c.own_ids),
            "stop_reason": c.stop_reason,
        }
        for i, c in enumerate(experience.completions[:SAMPLES_KEPT])
    ]


def evaluate(setup: Setup[OnPolicy], prompts: Sequence[PromptExample]) -> dict[str, float]:
    """Raw score and exact KL on held-out prompts, and what early stopping looks at: the normalised score
    minus the config's β times the KL (not the β of the moment, which would change what is compared)."""
    columns = _held_out(setup, prompts)
    worth = 0.0 if setup.config.imitates else columns["normalised"]  # what a stage is there for
    reward = worth - setup.config.kl.coef * columns["kl"]
    judged = columns["judge"][~columns["judge"].isnan()]
    heard = setup.judge is not None and len(judged) > 0
    of_judge = {"eval/judge": judged.mean().item(), "eval/judge_error": heldout_judge.error(judged)}
    found = (of_judge if heard else {}) | {
        "eval/objective/scores": columns["scores"].mean().item(),
        "eval/objective/kl": columns["kl"].mean().item(),
        "eval/objective/rlhf_reward": reward.mean().item(),
    }
    return found if setup.rewards else {name: v for name, v in found.items() if name not in OF_SCORES}


def final_measures(setup: Setup[OnPolicy], prompts: Sequence[PromptExample]) -> dict[str, Measure]:
    """Measures of the finished policy on held-out prompts, or on the first of its own where none are held
    out."""
    columns = _held_out(setup, prompts[: 4 * setup.config.batch_size])
    columns["scores"] = columns["scores"][columns["spoke"]]
    columns["judge"] = columns["judge"][~columns["judge"].isnan()]
    names = (*(["scores"] if setup.rewards else []), "kl", "length", *(["judge"] if setup.judge else []))
    return {name: mean_interval(columns[name].tolist()) for name in names if len(columns[name])}


@cast_cache()
def _held_out(setup: Setup[OnPolicy], prompts: Sequence[PromptExample]) -> dict[str, Tensor]:
    """(N,) raw and normalised scores, whether all rewards spoke, exact KLs, lengths and the judge's scores
    (0 without one, nan where it is silent); the same random draws at every call."""
    take_weights(setup)

    def of(numbered: tuple[int, Sequence[PromptExample]]) -> dict[str, Tensor]:
        number, some = numbered
        seed = derive_seed(setup.run.seed, "held-out", number)
        with sampling(setup):
            part = begin(setup, some, seed)
            completions = sample(setup, part, seed)
        in_ids = setup.teacher_tokenizer is None
        scored = score_tokens(setup, completions, compared=in_ids)
        kls = scored.exact_kl.sum(dim=1) if in_ids else asked(setup, part, completions, scored).sampled_kl
        completions = [replace(c, hidden=None) for c in completions]
        rated = rate(setup, part, completions)
        return {
            "scores": rated.raw,
            "normalised": rated.total,
            "spoke": heldout_judge.spoken_of(rated),
            "kl": kls,
            "length": scored.mask.sum(dim=1).float(),
            "judge": heldout_judge.scores(setup.judge, part, completions, setup.tokenizer),
        }

    several = list(enumerate(micro_batches(prompts, setup.config.batch_size)))
    parts = group.mapped(several, of, lambda: _lend(setup, prompts[0], held_out=True))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
