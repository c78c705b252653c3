"""Critic-free policy optimisation: GRPO (2402.03300) and its kin, told apart by settings. The loop is
`keel.rl.loop`; here are their advantages and their loss.

`docs/papers.md` says which settings make which paper's method; `preset` sets them. What is done differently,
knowingly:
- the first gradient step takes π's own log-probabilities as π_old's, as PPO does here, so its ratio is
  exactly 1;
- with `kl.where: reward` the KL is part of a response's reward where rewards are compared within a group;
  without a baseline (REINFORCE++) it is paid token by token, and advantages are returns to go;
- replacing a group whose rewards are all equal (DAPO's dynamic sampling) samples as many new prompts as are
  missing, for at most `resample` rounds, so that an update always ends; what is left unequal is learned from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from keel.algorithms import advantages as advantage
from keel.algorithms import kl
from keel.algorithms.masked import masked_sum, whiten
from keel.config import GRPOConfig
from keel.data.batches import derive_seed, rows_of_step
from keel.rewards.mixture import Rated
from keel.rewards.shaping import token_rewards
from keel.rewards.trainer import Logged
from keel.rl import loop, rollout
from keel.rl.algorithm import (
    Collected,
    CriticLoss,
    LossOutput,
    MicroBatch,
    Surrogate,
    estimated,
    policy_forward,
    policy_output,
)
from keel.rl.rollout import Drawn, Experience, LoopState, PromptExample, Setup
from keel.rl.setup import make_optimizers, open_stage
from keel.rollout.score_responses import Scored
from keel.rundir.stage_run import StageRun
from keel.stages import prepare
from keel.types import Episodes


def run(config: GRPOConfig, stage: StageRun) -> dict[str, Any]:
    """1. prompts and models  2. updates: sample, score, advantages, learn  3. save the policy."""
    prompts, held_out, setup = open_stage(config, stage, sharing="none")
    # nobody else holds the optimisers: they, and the weights by them, would be kept while the policy is saved
    result = loop.OnPolicyLoop(
        GRPO(setup, prompts), prompts, held_out, make_optimizers(config, setup.roles)
    ).train()
    prepare.save_model(
        stage, setup.roles.policy, setup.tokenizer, config, "A policy trained without a critic"
    )
    return result


class GRPO:
    """An `Algorithm`: advantages by comparing the samples of one prompt, and a surrogate without a critic."""

    warmup = 0

    def __init__(self, setup: Setup[GRPOConfig], prompts: Sequence[PromptExample]) -> None:
        """prompts: all of the stage's, from which groups of equal rewards are replaced."""
        self.setup, self.config, self.prompts = setup, setup.config, prompts
        self.surrogate = Surrogate(self.config, setup.run.name)

    def collect(
        self, prompts: Sequence[PromptExample], state: LoopState, update: int, drawn: Drawn | None = None
    ) -> Collected:
        """Groups of responses; those of equal rewards are replaced first, where the config says so."""
        setup, size = self.setup, self.config.samples_per_prompt
        seed = rollout.seed_of(setup, update)
        experience, reward_scaler = rollout.collect(setup, prompts, state.reward_scaler, seed, update, drawn)
        rounds, replaced, first_score = 0, 0, experience.rated.raw.mean().item()
        for round_ in range(1, self.config.resample + 1):
            groups = _all_equal(_compared(self.config, experience), size).nonzero().flatten().tolist()
            if not groups:
                break
            seed = derive_seed(setup.run.seed, "resample", round_)
            rows = rows_of_step(len(self.prompts), len(prompts), update - 1, seed)[: len(groups)]
            again = [self.prompts[i] for i in rows]
            fresh, reward_scaler = rollout.collect(
                setup, again, reward_scaler, rollout.seed_of(setup, update, round_), update
            )
            experience = _with_groups(experience, fresh, groups, size)
            rounds, replaced = round_, replaced + len(groups)
        equal = _all_equal(experience.rewards, size).float().mean().item()
        metrics = {
            "frac_reward_zero_std": equal if size > 1 else 0.0,
            "rollout/resample_rounds": float(rounds),
            "rollout/groups_replaced": float(replaced),
            "objective/scores_sampled": first_score,  # before any group was replaced
        }
        return Collected(experience, reward_scaler, len(experience.completions) + replaced * size, metrics)

    def advantages(self, experience: Experience, kl_coef: float) -> tuple[Episodes, dict[str, float]]:
        """(B, T) advantages, the same at every token of a response unless the KL is paid token by token."""
        config, scored, early = self.config, experience.scored, experience.early
        rewards, advantages = self._advantages(experience, kl_coef)
        mask = scored.mask
        if config.mask_truncated:
            mask = mask & torch.tensor([c.ended for c in experience.completions])[:, None]
        zeros = torch.zeros_like(scored.logp)  # there is no critic
        episodes = Episodes(
            scored.ids, scored.prompt_lengths, mask, scored.logp, scored.ref_logp, zeros,
            token_rewards(rewards, scored.mask, None, 0.0, early), advantages, zeros,
            rollout.importance(self.setup, experience), experience.logp_from_sampler,
        )  # fmt: skip
        return episodes, {}

    def critic_loss(self, batch: MicroBatch) -> CriticLoss | None:
        """None: there is no critic."""
        return None

    def loss(self, batch: MicroBatch) -> LossOutput:
        """L_policy − c_H H, + β KL where the config has it in the loss."""
        return policy_output(self.config, self.surrogate, batch, policy_forward(self.setup, batch))

    def _advantages(self, experience: Experience, kl_coef: float) -> tuple[Tensor, Tensor]:
        """(B,) rewards of responses and (B, T) advantages: by the estimator that the config names, else by
        returns to go without a `baseline`, else by comparison with the group."""
        config, scored, rewards = self.config, experience.scored, experience.rewards
        penalty = kl_coef * kl.estimate(scored.logp, scored.ref_logp, config.kl.estimator, scored.mask)
        in_reward = config.kl.where == "reward" and kl_coef > 0
        paid = penalty if in_reward else None
        per_token = token_rewards(rewards, scored.mask, paid, 1.0, experience.early)
        if config.advantage is not None:
            made = estimated(self.setup, config.advantage, per_token, None, scored.mask)
            return rewards, made.advantages
        if config.baseline == "none":
            to_go, _ = advantage.gae(per_token, torch.zeros_like(per_token), scored.mask, gamma=1.0, lam=1.0)
            return rewards, whiten(to_go, scored.mask) if config.scale == "batch" else to_go
        if in_reward:
            rewards = rewards - masked_sum(penalty, scored.mask, dim=1)
        size = config.samples_per_prompt
        if config.baseline == "leave_one_out":
            of_response = advantage.leave_one_out(rewards, size)
        else:
            of_response = advantage.group_relative(rewards, size, config.scale)
        return rewards, torch.where(scored.mask, of_response[:, None], 0.0)


def _compared(config: GRPOConfig, experience: Experience) -> Tensor:
    """(B,) rewards by which groups count as equal: without DAPO's punishment of length, which says nothing of
    being right."""
    rewards = experience.rewards
    for term in config.reward:
        if term.kind == "overlong":
            values = torch.tensor([value or 0.0 for value in experience.rated.by_name[term.log_name]])
            rewards = rewards - term.weight * values
    return rewards


def _all_equal(rewards: Tensor, group_size: int) -> Tensor:
    """(B,) → (B / G,): True where all rewards of a group are the same, so that it teaches nothing."""
    groups = rewards.view(-1, group_size)
    return groups.amax(dim=1) == groups.amin(dim=1)


def _with_groups(experience: Experience, fresh: Experience, groups: Sequence[int], size: int) -> Experience:
    """`experience` with its groups number `groups` replaced by those of `fresh`, in order."""
    rows = [group * size + member for group in groups for member in range(size)]
    source = list(range(len(experience.completions)))
    for position, row in enumerate(rows):
        source[row] = len(experience.completions) + position
    index = torch.tensor(source)
    prompts = [*experience.prompts, *fresh.prompts]
    completions = [*experience.completions, *fresh.completions]
    by_name = {
        name: [[*values, *fresh.rated.by_name[name]][i] for i in source]
        for name, values in experience.rated.by_name.items()
    }
    sums = [
        torch.cat([getattr(experience.rated, part), getattr(fresh.rated, part)])[index]
        for part in ("total", "raw", "learned")
    ]
    old, new = experience.rated.logged, fresh.rated.logged
    logged = Logged(dict(old.metrics))
    for name, values in new.metrics.items():
        logged.metrics[name] = [*logged.metrics.get(name, ()), *values]
    for name in old.extra.keys() & new.extra.keys():
        both = [*old.extra[name], *new.extra[name]]
        if len(both) == len(completions):
            logged.extra[name] = [both[i] for i in source]
    rated = Rated(sums[0], sums[1], sums[2], by_name, logged)
    return replace(
        experience,
        prompts=tuple(prompts[i] for i in source),
        completions=tuple(completions[i] for i in source),
        scored=_joined(experience.scored, fresh.scored, index),
        rated=rated,
        rewards=torch.cat([experience.rewards, fresh.rewards])[index],
        logp_from_sampler=experience.logp_from_sampler and fresh.logp_from_sampler,
        early=None
        if experience.early is None or fresh.early is None
        else _join(experience.early, fresh.early, index),
    )


def _joined(one: Scored, other: Scored, index: Tensor) -> Scored:
    """Rows `index` of both."""
    return Scored(
        **{f.name: _join(getattr(one, f.name), getattr(other, f.name), index) for f in fields(Scored)}
    )


def _join(a: Tensor, b: Tensor, index: Tensor) -> Tensor:
    """Rows `index` of both, padded to one width."""
    width = max(a.shape[-1], b.shape[-1])
    a, b = (torch.nn.functional.pad(x, (0, width - x.shape[-1])) if x.dim() > 1 else x for x in (a, b))
    return torch.cat([a, b])[index]
