"""Experience: what the policy says to prompts, and what every model makes of it. Nothing here takes a gradient.

The stages that learn from their own samples share it; they differ in what they make of the rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keel.config import PPOConfig
from keel.data import chat
from keel.data.batches import derive_seed
from keel.evaluation.measures import Measure, mean_interval
from keel.models.load import ModelSource
from keel.models.roles import Roles
from keel.rewards import learned
from keel.rewards.shaping import RunningScale, terminal_rewards
from keel.rollout.engine import generate, text_of
from keel.rollout.score import Scored, score
from keel.runlog import StageRun
from keel.stages import inputs, language
from keel.stages.update import micro_batches
from keel.types import Completion, Prompt, PromptRecord, Record, TextRecord, UsageError

SAMPLES_KEPT = 4  # episodes written to samples.jsonl when an update is sampled


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt, as tokens for the policy and as text for everybody else."""

    prompt: Prompt
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Setup:
    """Everything an update needs that does not change: models, prompts, settings."""

    config: PPOConfig
    roles: Roles
    reward: learned.RewardModel
    tokenizer: Any
    run: StageRun
    ptx: tuple[language.Row, ...]
    same_ids: bool  # the reward model reads the policy's token ids

    @property
    def pad_id(self) -> int:
        return chat.ensure_pad(self.tokenizer)


@dataclass(frozen=True, slots=True)
class Steering:
    """What changes between updates besides the weights."""

    coef: float  # β
    scale: RunningScale
    episodes: int = 0


@dataclass(frozen=True, slots=True)
class Experience:
    """A batch of responses with what they earned."""

    completions: tuple[Completion, ...]
    scored: Scored
    scores: Tensor  # (B,) raw scores of the reward model
    rewards: Tensor  # (B,) shaped rewards of whole responses, before any KL

    @property
    def kl(self) -> float:
        """Mean over responses of the exact KL summed over their tokens, in nats."""
        return self.scored.exact_kl.sum(dim=1).mean().item()


def read_tasks(
    config: PPOConfig, run: StageRun, source: ModelSource
) -> tuple[list[Task], list[Task], tuple[language.Row, ...], Any]:
    """Prompts to learn on, held-out prompts, rows of the pretraining mix, and the tokenizer; no weights are read."""
    dataset = inputs.read(run, config.data, ("prompt",))
    held_out = inputs.read(run, config.eval_data, ("prompt",)) if config.eval_data else None
    mix = inputs.read(run, config.ptx.data, ("text",)) if config.ptx else None
    conversational = any(rows.conversational for rows in (dataset, held_out, mix) if rows)
    tokenizer = inputs.open_tokenizer(config.model, run, conversational=conversational)
    limit = inputs.limit_of(config, run, source)
    room = None if limit is None else limit - config.sampling.max_new_tokens
    if room is not None and room < 1:
        raise UsageError(
            f"{run.name}: sampling.max_new_tokens {config.sampling.max_new_tokens} leaves no room for a prompt within {limit} tokens"
        )
    chat.stop_ids(tokenizer, config.sampling.stop)
    too_long = inputs.TooLong(run, config.too_long, room)

    def task(record: Record) -> Task | None:
        assert isinstance(record, PromptRecord)
        ids = chat.prompt_ids(tokenizer, record.prompt)
        if not too_long.fits(record, len(ids)):
            return None
        return Task(record.prompt, tuple(ids[-too_long.limit :] if too_long.limit else ids))

    tasks: list[Task] = inputs.encode_all(run, dataset.records, task)
    held: list[Task] = inputs.encode_all(run, held_out.records, task) if held_out else []
    ptx: list[language.Row] = []
    if mix:
        text_limit = inputs.TooLong(run, config.too_long, limit)

        def row(record: Record) -> language.Row | None:
            assert isinstance(record, TextRecord)
            ids, counts = chat.text_ids(tokenizer, record)
            if not text_limit.fits(record, len(ids)):
                return None
            cut = language.Row(ids[:limit], counts[:limit])
            return cut if cut.counted else None

        ptx = inputs.encode_all(run, mix.records, row)
        too_long.cut, too_long.left_out = (
            too_long.cut + text_limit.cut,
            too_long.left_out + text_limit.left_out,
        )
    too_long.report()
    return tasks, held, tuple(ptx), tokenizer


def sample(setup: Setup, tasks: Sequence[Task], seed: int) -> list[Completion]:
    """One response a task."""
    sampling = setup.config.sampling.plain()
    return generate(
        setup.roles.policy, [task.ids for task in tasks], sampling,
        stop_ids=chat.stop_ids(setup.tokenizer, sampling.stop), pad_id=setup.pad_id, seed=seed,
    )  # fmt: skip


def score_tokens(setup: Setup, completions: Sequence[Completion]) -> Scored:
    """What policy, reference and critic say of each token."""
    config, roles = setup.config, setup.roles
    return score(
        completions, roles.policy, roles.reference, temperature=config.sampling.temperature, pad_id=setup.pad_id,
        device=setup.run.device, micro_batch=config.micro_batch or config.batch_size, critic=roles.critic, value_head=roles.value_head,
    )  # fmt: skip


def score_completions(setup: Setup, tasks: Sequence[Task], completions: Sequence[Completion]) -> Tensor:
    """(B,) raw scores of the reward model: from ids where it reads the policy's, otherwise from text."""
    if setup.same_ids:
        rows: list[learned.Inputs] = [{"input_ids": [*c.prompt_ids, *c.ids]} for c in completions]
    else:
        texts, ended = (
            [text_of(setup.tokenizer, c) for c in completions],
            [c.stop_reason != "length" for c in completions],
        )
        rows, cut = learned.encode_samples(setup.reward, [task.prompt for task in tasks], texts, ended)
        if cut and not setup.run.facts.get("responses_cut_for_reward"):
            setup.run.say(
                f"{setup.run.name}: responses longer than the reward model reads are scored by their start"
            )
        setup.run.facts["responses_cut_for_reward"] = setup.run.facts.get("responses_cut_for_reward", 0) + cut
    return learned.score(setup.reward, rows, batch_size=setup.config.micro_batch or setup.config.batch_size)


def collect(
    setup: Setup, batch: Sequence[Task], scale: RunningScale, seed: int
) -> tuple[Experience, RunningScale]:
    """Sample `samples_per_prompt` responses to each prompt, score and shape them. The scale has seen their scores."""
    config, run = setup.config, setup.run
    tasks = [task for task in batch for _ in range(config.samples_per_prompt)]
    with run.timed("rollout"):
        completions = sample(setup, tasks, seed)
    with run.timed("score"):
        scored = score_tokens(setup, completions)
        scores = score_completions(setup, tasks, completions)
    scale = scale.update(scores)
    mean, std = scale_of(setup, scale)
    rewards = terminal_rewards(
        scores, torch.tensor([c.stop_reason != "length" for c in completions]), mean=mean, std=std,
        clip=config.shaping.clip, missing_stop_penalty=config.shaping.missing_stop_penalty,
        center=config.shaping.center, group_size=config.samples_per_prompt,
    )  # fmt: skip
    return Experience(tuple(completions), scored, scores, rewards), scale


def scale_of(setup: Setup, scale: RunningScale) -> tuple[float, float]:
    """Mean and standard deviation that raw scores are normalised with."""
    match setup.config.shaping.normalize:
        case "none":
            return 0.0, 1.0
        case "model":
            return setup.reward.mean, setup.reward.std
        case "running":
            return scale.mean, scale.std


def measured(experience: Experience, coef: float) -> dict[str, float]:
    """The metrics of a batch that say what was sampled and what it earned."""
    scored, completions, scores = experience.scored, experience.completions, experience.scores
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
        "rollout/response_length": scored.mask.sum(dim=1).float().mean().item(),
        "rollout/truncated": sum(c.stop_reason == "length" for c in completions) / len(completions),
    }


def sample_rows(setup: Setup, update: int, experience: Experience) -> list[dict[str, Any]]:
    """The first few responses of a batch, as lines of samples.jsonl."""
    scored = experience.scored
    kls = (scored.logp - scored.ref_logp).sum(dim=1).tolist()
    return [
        {
            "step": update,
            "prompt": setup.tokenizer.decode(list(c.prompt_ids), skip_special_tokens=True),
            "completion": text_of(setup.tokenizer, c),
            "rewards": {"reward": experience.scores[i].item()},
            "kl": kls[i],
            "length": len(c.ids),
            "stop_reason": c.stop_reason,
        }
        for i, c in enumerate(experience.completions[:SAMPLES_KEPT])
    ]


def evaluate(setup: Setup, tasks: Sequence[Task]) -> dict[str, float]:
    """Raw score and exact KL on held-out prompts, and what early stopping looks at: the normalised score minus the
    config's β times the KL (not the β of the moment, which would change what is compared)."""
    scores, kls, _ = _held_out(setup, tasks)
    mean, std = (setup.reward.mean, setup.reward.std) if setup.reward.scaled else (0.0, 1.0)
    reward = (scores - mean) / std - setup.config.kl.coef * kls
    return {
        "eval/objective/scores": scores.mean().item(),
        "eval/objective/kl": kls.mean().item(),
        "eval/objective/rlhf_reward": reward.mean().item(),
    }


def final_measures(setup: Setup, tasks: Sequence[Task]) -> dict[str, Measure]:
    """Measures of the finished policy on held-out prompts, or on the first of its own where none are held out."""
    scores, kls, lengths = _held_out(setup, tasks[: 4 * setup.config.batch_size])
    columns = {"scores": scores, "kl": kls, "length": lengths}
    return {name: mean_interval(column.tolist()) for name, column in columns.items()}


def _held_out(setup: Setup, tasks: Sequence[Task]) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) raw scores, exact KLs and lengths; the same random draws at every call."""
    scores, kls, lengths = [], [], []
    for number, part in enumerate(micro_batches(tasks, setup.config.batch_size)):
        completions = sample(setup, part, derive_seed(setup.run.seed, "held-out", number))
        scored = score_tokens(setup, completions)
        kls.append(scored.exact_kl.sum(dim=1))
        lengths.append(scored.mask.sum(dim=1).float())
        scores.append(score_completions(setup, part, completions))
    return torch.cat(scores), torch.cat(kls), torch.cat(lengths)
