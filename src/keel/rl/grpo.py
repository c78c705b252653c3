"""Critic-free policy optimisation: GRPO (2402.03300) and its kin, one loop for all, told apart by settings.

`docs/papers.md` says which settings make which paper's method; `preset` sets them. What is done differently,
knowingly:
- the first gradient step takes π's own log-probabilities as π_old's, as PPO does here, so its ratio is
exactly 1;
- with `kl.where: reward` the KL is part of a response's reward where rewards are compared within a group;
without a
  baseline (REINFORCE++) it is paid token by token, and advantages are returns to go;
- replacing a group whose rewards are all equal (DAPO's dynamic sampling) samples as many new prompts as are
missing, for
  at most `resample` rounds, so that an update always ends; what is left unequal is learned from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from keel.algorithms import advantages as advantage
from keel.algorithms import kl, policy
from keel.algorithms.masked import count, masked_sum, reduced, whiten
from keel.config import GRPOConfig
from keel.data.batches import derive_seed, rows_of_step
from keel.models.logprobs import head_inputs, response_index, scatter_to_mask, token_logprobs
from keel.rewards.mixture import Rated
from keel.rewards.shaping import RunningScale, token_rewards
from keel.rl import epochs, loop, rollout
from keel.rl.epochs import LogprobMismatch, LossTerm
from keel.rl.rollout import Experience, LoopState, PromptExample, Setup
from keel.rl.setup import open_stage
from keel.rollout.score_responses import Scored
from keel.rundir.stage_run import StageRun
from keel.stages import prepare
from keel.types import Episodes


@dataclass(frozen=True, slots=True)
class Collected:
    """A batch of experience with its advantages, and what there is to say about it."""

    experience: Experience
    episodes: Episodes
    metrics: dict[str, float]


def settings_of(setup: Setup) -> GRPOConfig:
    assert isinstance(setup.config, GRPOConfig)
    return setup.config


def run(config: GRPOConfig, run: StageRun) -> dict[str, Any]:
    """1. prompts and models  2. updates: sample, score, advantages, learn  3. save the policy."""
    tasks, held, setup = open_stage(config, run, sharing="none")
    optimizers = loop.optimizers(config, setup.roles)

    def step(
        batch: list[PromptExample], steering: LoopState, update: int
    ) -> tuple[Experience, RunningScale, dict[str, float]]:
        collected, scale = collect(setup, tasks, batch, steering, update)
        with run.timed("train"):
            learned_metrics = learn(
                setup, optimizers, collected.episodes, update, steering.coef, steering.pace
            )
        return collected.experience, scale, collected.metrics | learned_metrics

    result = loop.loop(setup, tasks, held, optimizers, step)
    prepare.save_model(run, setup.roles.policy, setup.tokenizer, config, "A policy trained without a critic")
    return result


def collect(
    setup: Setup,
    tasks: Sequence[PromptExample],
    batch: Sequence[PromptExample],
    steering: LoopState,
    update: int,
) -> tuple[Collected, RunningScale]:
    """One batch of experience with advantages; groups of equal rewards are replaced first, where the config
    says so."""
    config = settings_of(setup)
    done, scale = rollout.collect(setup, batch, steering.scale, loop.rollout_seed(setup, update))
    rounds, replaced, sampled = 0, 0, done.rated.raw.mean().item()
    for round_ in range(1, config.resample + 1):
        groups = _equal(_compared(config, done), config.samples_per_prompt).nonzero().flatten().tolist()
        if not groups:
            break
        seed = derive_seed(setup.run.seed, "resample", round_)
        prompts = [tasks[i] for i in rows_of_step(len(tasks), len(batch), update - 1, seed)][: len(groups)]
        fresh, scale = rollout.collect(setup, prompts, scale, loop.rollout_seed(setup, update, round_))
        done = _replaced(done, fresh, groups, config.samples_per_prompt)
        rounds, replaced = round_, replaced + len(groups)
    metrics = rollout.measured(done, steering.coef)
    equal = _equal(done.rewards, config.samples_per_prompt)
    metrics["frac_reward_zero_std"] = equal.float().mean().item() if config.samples_per_prompt > 1 else 0.0
    metrics["rollout/resample_rounds"], metrics["rollout/groups_replaced"] = float(rounds), float(replaced)
    metrics["objective/scores_sampled"] = sampled  # before any group was replaced
    metrics["rollout/episodes"] += float(replaced * config.samples_per_prompt)
    return Collected(done, _episodes(setup, done, steering.coef), metrics), scale


def _episodes(setup: Setup, done: Experience, coef: float) -> Episodes:
    """Advantages: (B, T), the same at every token of a response unless the KL is paid token by token."""
    config, scored = settings_of(setup), done.scored
    rewards = done.rewards
    paid = coef * kl.estimate(scored.logp, scored.ref_logp, config.kl.estimator, scored.mask)
    in_reward = config.kl.where == "reward" and coef > 0
    if config.baseline == "none":
        per_token = token_rewards(rewards, scored.mask, paid if in_reward else None, 1.0)
        estimated, _ = advantage.gae(per_token, torch.zeros_like(per_token), scored.mask, gamma=1.0, lam=1.0)
        if config.scale == "batch":
            estimated = whiten(estimated, scored.mask)
    else:
        if in_reward:
            rewards = rewards - masked_sum(paid, scored.mask, dim=1)
        of_response = (
            advantage.leave_one_out(rewards, config.samples_per_prompt)
            if config.baseline == "leave_one_out"
            else advantage.group_relative(rewards, config.samples_per_prompt, config.scale)
        )
        estimated = torch.where(scored.mask, of_response[:, None], 0.0)
    mask = scored.mask
    if config.mask_truncated:
        ended = torch.tensor([c.ended for c in done.completions])
        mask = mask & ended[:, None]
    nothing = torch.zeros_like(scored.logp)
    return Episodes(
        scored.ids, scored.prompt_lengths, mask, scored.logp, scored.ref_logp, nothing,
        token_rewards(rewards, scored.mask, None, 0.0), estimated, nothing, rollout.importance(setup, done),
    )  # fmt: skip


def learn(
    setup: Setup,
    optimizers: Sequence[torch.optim.Optimizer],
    episodes: Episodes,
    update: int,
    coef: float,
    pace: float = 1.0,
) -> dict[str, float]:
    """Epochs of mini-batches over one batch of experience. Returns means over the gradient steps taken."""
    reduce = settings_of(setup).reduce

    def of_part(rows: list[int], mini_batch: list[int], fresh: bool) -> list[LossTerm]:
        denominator = int(count(episodes.mask[mini_batch], reduce))
        return [loss(setup, episodes, rows, denominator, coef, fresh=fresh)]

    return epochs.learn(setup, optimizers, episodes, update, of_part, pace=pace, first=update == 1)


def loss(
    setup: Setup, episodes: Episodes, rows: list[int], denominator: float, coef: float, *, fresh: bool
) -> LossTerm:
    """The part that `rows` have in the loss of a mini-batch whose `masked.count` is `denominator`.

    fresh: the weights are those that sampled, so π_old is π itself. Returns the loss, metrics that add up
    over the parts, and for a fresh part how far log π is from the scored log π_old.
    """
    config, device = settings_of(setup), setup.run.device
    mask = episodes.mask[rows].to(device)
    width = max(1, int(mask.sum(dim=1).max()))
    mask = mask[:, :width]
    ids, starts = episodes.ids[rows].to(device), episodes.prompt_lengths[rows].to(device)
    ids = ids[:, : int((starts + mask.sum(dim=1)).max()) + int(not mask.any())]
    old_logp, advantages, ref_logp = (
        part[rows, :width].to(device) for part in (episodes.logp, episodes.advantages, episodes.ref_logp)
    )
    weights = None if episodes.weights is None else episodes.weights[rows, :width].to(device)
    index = response_index(mask, starts, ids.shape[1])
    found = head_inputs(setup.roles.policy, ids, index)
    tokens = ids.flatten()[index + 1]
    logp, entropies, _ = token_logprobs(found, tokens, config.sampling.temperature, entropy=True)
    logp = scatter_to_mask(logp, mask)
    entropies = scatter_to_mask(entropies if config.entropy_coef > 0 else entropies.detach(), mask)
    drift = LogprobMismatch.between(logp, old_logp, mask) if fresh else LogprobMismatch()
    old_logp = logp.detach() if fresh else old_logp
    if config.objective == "cispo":
        policy_loss, measured = policy.cispo(
            logp, old_logp, advantages, mask, config.clip_low, config.clip_high, config.reduce, denominator, weights
        )  # fmt: skip
    else:
        policy_loss, measured = policy.clipped(
            logp, old_logp, advantages, mask, config.clip_low, config.clip_high, config.dual_clip, config.level,
            config.reduce, denominator, weights,
        )  # fmt: skip
    total = policy_loss - config.entropy_coef * reduced(entropies, mask, config.reduce, denominator)
    if config.kl.where == "loss" and coef > 0:
        estimate = kl.estimate(logp, ref_logp, config.kl.estimator, mask)
        total = total + coef * reduced(estimate, mask, config.reduce, denominator)
    own = "token" if config.reduce == "token" else "sequence"
    metrics = {
        "policy/approxkl_avg": measured["approxkl"],
        "policy/approxkl_k3": measured["approxkl_k3"],
        "policy/clipfrac_avg": measured["clipfrac"],
        "policy/entropy_avg": reduced(entropies.detach(), mask, own, denominator),
        "loss/policy_avg": policy_loss.detach(),
        "val/ratio": measured["ratio"],
        "val/ratio_var": measured["ratio_var"],
    }
    return total, metrics, drift


def _compared(config: GRPOConfig, done: Experience) -> Tensor:
    """(B,) rewards by which groups count as equal: without DAPO's punishment of length, which says nothing of
    being right."""
    rewards = done.rewards
    for term in config.reward:
        if term.kind == "overlong":
            values = torch.tensor([value or 0.0 for value in done.rated.by_name[term.log_name]])
            rewards = rewards - term.weight * values
    return rewards


def _equal(rewards: Tensor, group_size: int) -> Tensor:
    """(B,) → (B / G,): True where all rewards of a group are the same, so that it teaches nothing."""
    groups = rewards.view(-1, group_size)
    return groups.amax(dim=1) == groups.amin(dim=1)


def _replaced(done: Experience, fresh: Experience, groups: Sequence[int], size: int) -> Experience:
    """`done` with its groups number `groups` replaced by those of `fresh`, in order."""
    rows = [group * size + member for group in groups for member in range(size)]
    source = list(range(len(done.completions)))
    for position, row in enumerate(rows):
        source[row] = len(done.completions) + position
    index = torch.tensor(source)
    completions = [*done.completions, *fresh.completions]
    by_name = {
        name: [[*values, *fresh.rated.by_name[name]][i] for i in source]
        for name, values in done.rated.by_name.items()
    }
    sums = [
        torch.cat([getattr(done.rated, part), getattr(fresh.rated, part)])[index]
        for part in ("total", "raw", "learned")
    ]
    rated = Rated(sums[0], sums[1], sums[2], by_name)
    return replace(
        done,
        completions=tuple(completions[i] for i in source),
        scored=_joined(done.scored, fresh.scored, index),
        rated=rated,
        rewards=torch.cat([done.rewards, fresh.rewards])[index],
    )


def _joined(one: Scored, other: Scored, index: Tensor) -> Scored:
    """Rows `index` of both, padded to one width."""

    def join(a: Tensor, b: Tensor) -> Tensor:
        width = max(a.shape[-1], b.shape[-1])
        a, b = (torch.nn.functional.pad(x, (0, width - x.shape[-1])) if x.dim() > 1 else x for x in (a, b))
        return torch.cat([a, b])[index]

    return Scored(**{f.name: join(getattr(one, f.name), getattr(other, f.name)) for f in fields(Scored)})
