"""Experience: what the policy says to prompts, and what every model makes of it. Nothing here takes a
gradient.

The stages that learn from their own samples share it; they differ in what they make of the rewards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
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
from keel.distributed import group
from keel.errors import UsageError
from keel.evaluation.measures import Measure, mean_interval
from keel.models.head import head_of
from keel.models.offload import on_device
from keel.models.roles import Roles
from keel.models.tokenizer import known_ids
from keel.rewards.mixture import Mixture, Rated
from keel.rewards.shaping import RunningScale, terminal_rewards
from keel.rewards.trainer import TrainingState
from keel.rl import heldout_judge
from keel.rl.sampled import Dealt, Sampled, deal, together
from keel.rl.tool_use import ToolUse
from keel.rollout.engine import text_of
from keel.rollout.protocol import Engine, GenerationRequest, Rows, TokenCount, check_completions
from keel.rollout.score_responses import Scored, sampled_logp, score
from keel.rundir.stage_run import StageRun
from keel.stages import build_rewards, language
from keel.stages.loop_utils import SAMPLES_KEPT, forward_rows, micro_batches
from keel.types import Completion, Prompt


@dataclass(frozen=True, slots=True)
class PromptExample:
    """A prompt, as tokens for the policy and as text for everybody else."""

    prompt: Prompt
    ids: tuple[int, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)  # the row's other columns, for reward functions
    environment: Any = None  # of the episode that begins with it, where there are tools


C = TypeVar("C", bound=OnPolicy, covariant=True)


@dataclass(frozen=True, slots=True)
class Setup(Generic[C]):
    """Everything an update needs that does not change: models, prompts, settings."""

    config: C
    roles: Roles
    engine: Engine  # samples from the policy
    rewards: Mixture
    opened: Sequence[build_rewards.LoadedReward]  # what the rewards hold in memory
    as_text: bool  # whether any of them reads words
    tokenizer: PreTrainedTokenizerBase
    run: StageRun
    ptx: tuple[language.LanguageRow, ...]
    judge: heldout_judge.Judge | None = None  # held out: nothing is trained on it
    tool_use: ToolUse | None = None  # what responses are episodes with

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

    @property
    def kl(self) -> float:
        """Mean over responses of the exact KL summed over their tokens, in nats."""
        return self.scored.exact_kl.sum(dim=1).mean().item()


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
    config, sampling = setup.config, setup.config.sampling.plain()
    if setup.tool_use is not None:
        completions = setup.tool_use.play(
            setup.engine, prompts, sampling, seed, keep_head_inputs=config.trusts_sampler, count=count,
            rows=rows,
        )  # fmt: skip
    else:
        request = GenerationRequest.of(
            setup.tokenizer, [prompt.ids for prompt in prompts], sampling, seed,
            keep_head_inputs=config.trusts_sampler, rows=rows,
        )  # fmt: skip
        completions = setup.engine.generate(request, count)
        check_completions(config.engine, request, completions)
    if config.importance_cap is not None and not all(c.logp for c in completions):
        raise UsageError(
            "`importance_cap` needs the log-probabilities of the sampler,"
            f" which engine {config.engine!r} does not give"
        )
    return completions


def score_tokens(setup: Setup[OnPolicy], completions: Sequence[Completion]) -> Scored:
    """What policy, reference and critic say of each token."""
    config, roles = setup.config, setup.roles
    with on_device(roles.reference):
        return score(
            completions,
            roles.policy,
            roles.reference,
            temperature=config.sampling.temperature,
            pad_id=setup.pad_id,
            device=setup.run.device,
            critic=roles.critic,
            value_head=roles.value_head,
            vocab=setup.vocab,
            **forward_rows(config),
        )


def rate(
    setup: Setup[OnPolicy],
    prompts: Sequence[PromptExample],
    completions: Sequence[Completion],
    update: int = 0,
) -> Rated:
    """What the rewards say of each response. update: the one that they are sampled for; 0: none."""
    batch = build_rewards.batch_of(
        [prompt.prompt for prompt in prompts], completions, build_rewards.columns_of(prompts),
        setup.tokenizer, as_text=setup.as_text, state=_state(setup, update),
    )  # fmt: skip
    return setup.rewards.score(batch)


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
) -> tuple[Experience, RunningScale]:
    """Sample `samples_per_prompt` responses to each prompt, score and shape them. The scaler that is returned
    has seen their rewards."""
    dealt = deal(len(prompts), setup.config.samples_per_prompt)
    own = _collected(setup, [prompts[i] for i in dealt.prompts], dealt, seed, update) if dealt.rows else None
    made = together(dealt, own, setup.pad_id)
    done, scored, rated = made.completions, made.scored, made.rated
    reward_scaler = reward_scaler.update(rated.total)
    rewards = shaped(setup, rated, done, reward_scaler)
    early = paid_early(setup, done, rated, scored.mask)
    found = Experience(made.prompts, done, scored, rated, rewards, made.from_sampler, early)
    return found, reward_scaler


def _collected(
    setup: Setup[OnPolicy], prompts: Sequence[PromptExample], dealt: Dealt, seed: int, update: int
) -> Sampled:
    """Responses to this rank's prompts, scored and rated."""
    config, run = setup.config, setup.run
    repeated = [prompt for prompt in prompts for _ in range(config.samples_per_prompt)]
    rows = None if len(dealt.rows) == dealt.of else Rows(dealt.rows, dealt.of)
    count = TokenCount()
    with run.timed("rollout"):
        repeated = begin(setup, repeated, seed, config.samples_per_prompt, rows)
        completions = sample(setup, repeated, seed, count, rows)
    if count.computed:  # an engine need not count
        run.count("rollout", count.useful, count.computed, passes=count.passes, pairs=count.pairs)
    with run.timed("forward"), batch_layout.counting() as read, cast_cache():
        scored = score_tokens(setup, completions)
    from_sampler = head_of(setup.roles.policy) is not None and all(c.hidden is not None for c in completions)
    done = tuple(replace(c, hidden=None) for c in completions)
    del completions  # with the states that they were drawn from
    with run.timed("score"), cast_cache():
        rated = rate(setup, repeated, done, update)
    sizes = [(c.prompt_ids, len(c.prompt_ids) + len(c.ids)) for c in done]
    useful, pairs = useful_tokens(sizes), useful_pairs(sizes)
    run.count("forward", useful, read(), passes=read.passes, pairs=pairs)
    if "score" in run.costs:
        run.count("score", useful, passes=1, pairs=pairs)
    asked = tuple(prompt.prompt for prompt in repeated)
    return Sampled(asked, done, scored, rated, from_sampler)


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
        clip = shaping.clip * setup.rewards.learned_weight if shaping.clip is not None and bounded else None
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
    return {
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
    }


def importance(setup: Setup[OnPolicy], experience: Experience) -> Tensor | None:
    """(B, T) truncated importance weights of trainer against sampler, where the config asks for them."""
    cap, mask = setup.config.importance_cap, experience.scored.mask
    if cap is None:
        return None
    sampled = sampled_logp(experience.completions, mask)
    return policy.importance_weights(experience.scored.logp, sampled, mask, cap)


def _sampler_mismatch(experience: Experience) -> dict[str, float]:
    """Mean |scored log π − log π of the sampler| per token; nothing where an engine does not give the
    latter."""
    if not all(c.logp for c in experience.completions):
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
            "completion": text_of(setup.tokenizer, c) if c.dialogue is None else list(c.dialogue.turns),
            "rewards": {name: values[i] for name, values in experience.rated.by_name.items()},
            **_extra_of(experience, i),
            "kl": kls[i],
            "length": len(c.own_ids),
            "stop_reason": c.stop_reason,
        }
        for i, c in enumerate(experience.completions[:SAMPLES_KEPT])
    ]


def evaluate(setup: Setup[OnPolicy], prompts: Sequence[PromptExample]) -> dict[str, float]:
    """Raw score and exact KL on held-out prompts, and what early stopping looks at: the normalised score
    minus the config's β times the KL (not the β of the moment, which would change what is compared)."""
    columns = _held_out(setup, prompts)
    reward = columns["normalised"] - setup.config.kl.coef * columns["kl"]
    judged = columns["judge"]
    of_judge = {"eval/judge": judged.mean().item(), "eval/judge_error": heldout_judge.error(judged)}
    return (of_judge if setup.judge else {}) | {
        "eval/objective/scores": columns["scores"].mean().item(),
        "eval/objective/kl": columns["kl"].mean().item(),
        "eval/objective/rlhf_reward": reward.mean().item(),
    }


def final_measures(setup: Setup[OnPolicy], prompts: Sequence[PromptExample]) -> dict[str, Measure]:
    """Measures of the finished policy on held-out prompts, or on the first of its own where none are held
    out."""
    columns = _held_out(setup, prompts[: 4 * setup.config.batch_size])
    names = ("scores", "kl", "length", *(["judge"] if setup.judge else []))
    return {name: mean_interval(columns[name].tolist()) for name in names}


@cast_cache()
def _held_out(setup: Setup[OnPolicy], prompts: Sequence[PromptExample]) -> dict[str, Tensor]:
    """(N,) raw and normalised scores, exact KLs, lengths and the judge's scores (0 without one); the same
    random draws at every call."""

    def of(numbered: tuple[int, Sequence[PromptExample]]) -> dict[str, Tensor]:
        number, some = numbered
        seed = derive_seed(setup.run.seed, "held-out", number)
        part = begin(setup, some, seed)
        completions = sample(setup, part, seed)
        scored = score_tokens(setup, completions)
        completions = [replace(c, hidden=None) for c in completions]
        rated = rate(setup, part, completions)
        return {
            "scores": rated.raw,
            "normalised": rated.total,
            "kl": scored.exact_kl.sum(dim=1),
            "length": scored.mask.sum(dim=1).float(),
            "judge": heldout_judge.scores(setup.judge, part, completions, setup.tokenizer),
        }

    parts = group.mapped(list(enumerate(micro_batches(prompts, setup.config.batch_size))), of)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
