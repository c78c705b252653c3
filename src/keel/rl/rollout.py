"""Experience: what the policy says to prompts, and what every model makes of it. Nothing here takes a
gradient.

The stages that learn from their own samples share it; they differ in what they make of the rewards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from keel.accel import batch_layout
from keel.accel.cpu_linear import cast_cache
from keel.algorithms import policy
from keel.algorithms.masked import masked_mean
from keel.config import OnPolicy
from keel.data import chat
from keel.data.batches import derive_seed, useful_tokens
from keel.data.stops import stop_texts
from keel.evaluation.measures import Measure, mean_interval
from keel.models.offload import on_device
from keel.models.roles import Roles
from keel.rewards.mixture import Mixture, Rated
from keel.rewards.shaping import RunningScale, terminal_rewards
from keel.rl import heldout_judge
from keel.rollout.engine import TokenCount, generate, text_of
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


@dataclass(frozen=True, slots=True)
class Setup:
    """Everything an update needs that does not change: models, prompts, settings."""

    config: OnPolicy
    roles: Roles
    rewards: Mixture
    opened: Sequence[build_rewards.LoadedReward]  # what the rewards hold in memory
    as_text: bool  # whether any of them reads words
    tokenizer: Any
    run: StageRun
    ptx: tuple[language.LanguageRow, ...]
    judge: heldout_judge.Judge | None = None  # held out: nothing is trained on it

    @property
    def pad_id(self) -> int:
        return chat.ensure_pad(self.tokenizer)


@dataclass(frozen=True, slots=True)
class LoopState:
    """What changes between updates besides the weights."""

    coef: float  # β
    scale: RunningScale
    episodes: int = 0
    pace: float = 1.0  # share of the scheduled learning rate

    def values(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"coef": self.coef, "scale": asdict(self.scale), "episodes": self.episodes, "pace": self.pace}

    @staticmethod
    def restored(values: Mapping[str, Any]) -> LoopState:
        return LoopState(values["coef"], RunningScale(**values["scale"]), values["episodes"], values["pace"])


@dataclass(frozen=True, slots=True)
class Experience:
    """A batch of responses with what they earned."""

    completions: tuple[Completion, ...]
    scored: Scored
    rated: Rated  # what each reward says, and their weighted sum
    rewards: Tensor  # (B,) shaped rewards of whole responses, before any KL

    @property
    def kl(self) -> float:
        """Mean over responses of the exact KL summed over their tokens, in nats."""
        return self.scored.exact_kl.sum(dim=1).mean().item()


def sample(
    setup: Setup, tasks: Sequence[PromptExample], seed: int, work: TokenCount | None = None
) -> list[Completion]:
    """One response a task, with what `score_tokens` will need of the sampler's own forwards. work: counts its
    tokens."""
    sampling = setup.config.sampling.plain()
    return generate(
        setup.roles.policy, [task.ids for task in tasks], sampling, stop_ids=chat.stop_ids(setup.tokenizer, sampling.stop),
        stop_texts=stop_texts(setup.tokenizer, sampling.stop),
        pad_id=setup.pad_id, seed=seed, hidden=setup.config.trusts_sampler, work=work,
    )  # fmt: skip


def score_tokens(setup: Setup, completions: Sequence[Completion]) -> Scored:
    """What policy, reference and critic say of each token."""
    config, roles = setup.config, setup.roles
    with on_device(roles.reference):
        return score(
            completions, roles.policy, roles.reference, temperature=config.sampling.temperature, pad_id=setup.pad_id,
            device=setup.run.device, critic=roles.critic, value_head=roles.value_head, **forward_rows(config),
        )  # fmt: skip


def rate(setup: Setup, tasks: Sequence[PromptExample], completions: Sequence[Completion]) -> Rated:
    """What the rewards say of each response."""
    columns = [dict(task.columns) for task in tasks]
    batch = build_rewards.batch_of(
        [task.prompt for task in tasks], completions, columns, setup.tokenizer, as_text=setup.as_text
    )
    return setup.rewards.score(batch)


def collect(
    setup: Setup, batch: Sequence[PromptExample], scale: RunningScale, seed: int
) -> tuple[Experience, RunningScale]:
    """Sample `samples_per_prompt` responses to each prompt, score and shape them. The scale has seen their
    rewards."""
    config, run = setup.config, setup.run
    tasks = [task for task in batch for _ in range(config.samples_per_prompt)]
    work = TokenCount()
    with run.timed("rollout"):
        completions = sample(setup, tasks, seed, work)
    run.count("rollout", work.useful, work.computed)
    with run.timed("forward"), batch_layout.counting() as read, cast_cache():
        scored = score_tokens(setup, completions)
    done = tuple(replace(c, hidden=None) for c in completions)
    del completions  # with the states that they were drawn from
    with run.timed("score"), cast_cache():
        rated = rate(setup, tasks, done)
    sizes = [(c.prompt_ids, len(c.prompt_ids) + len(c.ids)) for c in done]
    run.count("forward", useful_tokens(sizes), read())
    scale = scale.update(rated.total)
    return Experience(done, scored, rated, shaped(setup, rated, done, scale)), scale


def shaped(setup: Setup, rated: Rated, completions: Sequence[Completion], scale: RunningScale) -> Tensor:
    """(B,) rewards of whole responses: normalised, clipped, penalised, centred, as the config says."""
    shaping = setup.config.shaping
    ended = torch.tensor([c.ended for c in completions])
    if shaping.normalize == "running":
        scores, rest, mean, std, clip = rated.total, None, scale.mean, scale.std, shaping.clip
    else:  # the clip is for learned rewards, in units of their scale, and not for what means what it says
        scores, rest, mean, std = rated.learned, rated.total - rated.learned, 0.0, 1.0
        bounded = shaping.normalize == "model" or shaping.changes("clip")
        clip = shaping.clip * setup.rewards.learned_weight if shaping.clip is not None and bounded else None
    return terminal_rewards(
        scores, ended, mean=mean, std=std, clip=clip, missing_stop_penalty=shaping.missing_stop_penalty,
        center=shaping.center, group_size=setup.config.samples_per_prompt, unclipped=rest,
    )  # fmt: skip


def measured(experience: Experience, coef: float) -> dict[str, float]:
    """The metrics of a batch that say what was sampled and what it earned."""
    scored, completions, scores = experience.scored, experience.completions, experience.rated.raw
    sampled_kl = (scored.logp - scored.ref_logp).sum(dim=1)
    non_score = -coef * sampled_kl
    return {
        "objective/kl": sampled_kl.mean().item(),
        "objective/kl_exact": experience.kl,
        "objective/kl_coef": coef,
        "objective/entropy": (-scored.logp).sum(dim=1).mean().item(),
        "objective/non_score_reward": non_score.mean().item(),
        "objective/rlhf_reward": (experience.rewards + non_score).mean().item(),
        "objective/scores": scores.mean().item(),
        "objective/scores_std": scores.std(correction=0).item(),
        "val/num_eos_tokens": float(sum(c.stop_reason == "eos" for c in completions)),
        "rollout/episodes": float(len(completions)),
        "rollout/response_length": scored.mask.sum(dim=1).float().mean().item(),
        "rollout/truncated": sum(not c.ended for c in completions) / len(completions),
        "rollout/sampler_drift": _sampler_drift(experience),
        **_shape(experience),
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
    return metrics


def _shape(experience: Experience) -> dict[str, float]:
    """How much responses repeat themselves, and how far their length tells their reward (0 where either is
    constant)."""
    repeated = []
    for ids in (c.ids for c in experience.completions):
        runs = list(zip(ids, ids[1:], ids[2:], strict=False))
        repeated.append(1 - len(set(runs)) / len(runs) if runs else 0.0)
    both = torch.stack([experience.rated.raw.double(), experience.scored.mask.sum(dim=1).double()])
    varied = len(repeated) > 1 and bool((both.amax(dim=1) > both.amin(dim=1)).all())
    return {
        "rollout/repetition": sum(repeated) / len(repeated),
        "rollout/length_correlation": torch.corrcoef(both)[0, 1].item() if varied else 0.0,
    }


def importance(setup: Setup, experience: Experience) -> Tensor | None:
    """(B, T) truncated importance weights of trainer against sampler, where the config asks for them."""
    cap, mask = setup.config.importance_cap, experience.scored.mask
    if cap is None:
        return None
    sampled = sampled_logp(experience.completions, mask)
    return policy.importance_weights(experience.scored.logp, sampled, mask, cap)


def _sampler_drift(experience: Experience) -> float:
    """Mean |scored log π − log π of the sampler| per token."""
    mask = experience.scored.mask
    gap = (experience.scored.logp - sampled_logp(experience.completions, mask)).abs()
    return masked_mean(gap, mask).item()


def sample_rows(setup: Setup, update: int, experience: Experience) -> list[dict[str, Any]]:
    """The first few responses of a batch, as lines of samples.jsonl."""
    scored = experience.scored
    kls = (scored.logp - scored.ref_logp).sum(dim=1).tolist()
    return [
        {
            "step": update,
            "prompt": setup.tokenizer.decode(list(c.prompt_ids), skip_special_tokens=True),
            "completion": text_of(setup.tokenizer, c),
            "rewards": {name: values[i] for name, values in experience.rated.by_name.items()},
            "kl": kls[i],
            "length": len(c.ids),
            "stop_reason": c.stop_reason,
        }
        for i, c in enumerate(experience.completions[:SAMPLES_KEPT])
    ]


def evaluate(setup: Setup, tasks: Sequence[PromptExample]) -> dict[str, float]:
    """Raw score and exact KL on held-out prompts, and what early stopping looks at: the normalised score
    minus the config's β times the KL (not the β of the moment, which would change what is compared)."""
    held = _held_out(setup, tasks)
    reward = held["normalised"] - setup.config.kl.coef * held["kl"]
    judged = held["judge"]
    said = {"eval/judge": judged.mean().item(), "eval/judge_error": heldout_judge.error(judged)}
    return (said if setup.judge else {}) | {
        "eval/objective/scores": held["scores"].mean().item(),
        "eval/objective/kl": held["kl"].mean().item(),
        "eval/objective/rlhf_reward": reward.mean().item(),
    }


def final_measures(setup: Setup, tasks: Sequence[PromptExample]) -> dict[str, Measure]:
    """Measures of the finished policy on held-out prompts, or on the first of its own where none are held
    out."""
    held = _held_out(setup, tasks[: 4 * setup.config.batch_size])
    names = ("scores", "kl", "length", *(["judge"] if setup.judge else []))
    return {name: mean_interval(held[name].tolist()) for name in names}


@cast_cache()
def _held_out(setup: Setup, tasks: Sequence[PromptExample]) -> dict[str, Tensor]:
    """(N,) raw and normalised scores, exact KLs, lengths and the judge's scores (0 without one); the same
    random draws at every call."""
    columns: dict[str, list[Tensor]] = {"scores": [], "normalised": [], "kl": [], "length": [], "judge": []}
    for number, part in enumerate(micro_batches(tasks, setup.config.batch_size)):
        completions = sample(setup, part, derive_seed(setup.run.seed, "held-out", number))
        scored = score_tokens(setup, completions)
        completions = [replace(c, hidden=None) for c in completions]
        rated = rate(setup, part, completions)
        columns["kl"].append(scored.exact_kl.sum(dim=1))
        columns["length"].append(scored.mask.sum(dim=1).float())
        columns["scores"].append(rated.raw)
        columns["normalised"].append(rated.total)
        columns["judge"].append(heldout_judge.scores(setup.judge, part, completions, setup.tokenizer))
    return {name: torch.cat(parts) for name, parts in columns.items()}
