"""Proximal policy optimisation (1707.06347) against a reward model under a KL constraint (1909.08593,
2203.02155). The loop is `keel.rl.loop`; here are PPO's advantages and its loss.

What this leaves out or does differently, knowingly:
- no top-p or top-k while sampling: a cut distribution is not the one whose ratio is taken;
- the first gradient step of an update takes π's own log-probabilities as π_old's (they are the same weights),
  so its ratio is exactly 1; how far the scored ones were off is logged as `policy/logp_mismatch`;
- the adaptive β is steered by the exact KL of each position's distribution, not by the noisier sampled one;
- scores are clipped before the KL penalty and before any baseline is subtracted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from keel.algorithms import kl, value
from keel.algorithms.masked import at_least_float32, whiten
from keel.config import PPOConfig
from keel.distributed import group, sharded
from keel.models.logprobs import scatter_to_mask, scores_at
from keel.models.lora import files_of
from keel.models.saved_check import save_checked
from keel.rewards.shaping import token_rewards
from keel.rl import loop, rollout
from keel.rl.algorithm import (
    Collected,
    CriticLoss,
    LossOutput,
    MicroBatch,
    Surrogate,
    collected,
    estimated,
    policy_forward,
    policy_output,
)
from keel.rl.rollout import Drawn, Experience, LoopState, PromptExample, Setup
from keel.rl.setup import make_optimizers, open_stage
from keel.rundir.stage_run import StageRun
from keel.stages import prepare
from keel.types import Episodes


def run(config: PPOConfig, stage: StageRun) -> dict[str, Any]:
    """1. prompts and models  2. updates: sample, score, advantages, learn  3. save the policy and what valued
    it."""
    prompts, held_out, setup = open_stage(config, stage, sharing=config.sharing)
    # nobody else holds the optimisers: they, and the weights by them, would be kept while models are saved
    result = loop.OnPolicyLoop(
        PPO(setup), prompts, held_out, make_optimizers(config, setup.roles, config.value_lr)
    ).train()
    values = [sharded.whole(module) for module in setup.roles.value_modules]
    group.only_first(lambda: _save_values(setup, values))
    prepare.save_model(
        stage, setup.roles.policy, setup.tokenizer, config, "A policy trained by PPO under a KL constraint"
    )
    return result


class PPO:
    """An `Algorithm`: advantages by a critic, and the clipped surrogate."""

    def __init__(self, setup: Setup[PPOConfig]) -> None:
        self.setup, self.config, self.warmup = setup, setup.config, setup.config.critic_warmup
        self.surrogate = Surrogate(self.config, setup.run.name)

    def collect(
        self, prompts: Sequence[PromptExample], state: LoopState, update: int, drawn: Drawn | None = None
    ) -> Collected:
        """Responses to the prompts, with what every model makes of them."""
        return collected(self.setup, prompts, state, update, drawn)

    def advantages(self, experience: Experience, kl_coef: float) -> tuple[Episodes, dict[str, float]]:
        """r_t = score at the last token − β KL_t;  Â, R by GAE (1506.02438), Â whitened over the batch."""
        config, scored = self.config, experience.scored
        penalty = kl.estimate(scored.logp, scored.ref_logp, config.kl.estimator)
        in_reward = config.kl.where == "reward"
        paid = penalty if in_reward else None
        rewards = token_rewards(experience.rewards, scored.mask, paid, kl_coef, experience.early)
        made = estimated(self.setup, config.advantage or "gae", rewards, scored.values, scored.mask)
        advantages, returns = made.advantages, made.returns
        if config.whiten_advantages:
            advantages = whiten(advantages, scored.mask)
        episodes = Episodes(
            scored.ids,
            scored.prompt_lengths,
            scored.mask,
            scored.logp,
            scored.ref_logp,
            scored.values,
            rewards,
            advantages,
            returns,
            rollout.importance(self.setup, experience),
            experience.logp_from_sampler,
        )
        total = returns[scored.mask].var(correction=0).item()
        unexplained = (returns - scored.values)[scored.mask].var(correction=0).item()
        return episodes, {"val/explained_variance": 1 - unexplained / total if total > 0 else 0.0}

    def critic_loss(self, batch: MicroBatch) -> CriticLoss | None:
        """c_V L_V of a critic with weights of its own."""
        if self.setup.roles.critic is None:
            return None
        return self._value_loss(batch, scores_at(self.setup.roles.critic, batch.ids, batch.index))

    def loss(self, batch: MicroBatch) -> LossOutput:
        """L_policy − c_H H, + β KL where the config has it in the loss, + c_V L_V of a head on the trunk."""
        now = policy_forward(self.setup, batch)
        output = policy_output(self.config, self.surrogate, batch, now)
        loss, critic = output.loss, None
        if not batch.policy_learns:
            loss = torch.zeros_like(output.loss.detach())
        if (head := self.setup.roles.value_head) is not None:
            assert now.inputs.hidden is not None
            critic = self._value_loss(batch, head(at_least_float32(now.inputs.hidden)).squeeze(-1))
            loss = loss + critic.loss
        return replace(output, loss=loss, critic=critic)

    def _value_loss(self, batch: MicroBatch, values: Tensor) -> CriticLoss:
        """Of (N,) values at the counted positions: c_V times the clipped value loss."""
        value_loss, measured = value.clipped(
            scatter_to_mask(values, batch.mask), batch.old_values, batch.returns, batch.mask,
            self.config.value_clip, denominator=batch.denominator,
        )  # fmt: skip
        return CriticLoss(self.config.value_coef * value_loss, value_loss.detach(), measured["clipfrac"])


def _save_values(setup: Setup[PPOConfig], values: Sequence[nn.Module]) -> None:
    """What valued the policy: users ask for the critic too. values: the value modules, with all of their
    weights."""
    config, run = setup.config, setup.run
    if setup.roles.critic is not None:
        (critic,) = values
        card = (
            f"The critic of stage {run.name}: a sequence classifier whose score at each position is V(s_t).\n"
        )
        adapter = files_of(critic, prepare.source_of(config.model, run))
        save_checked(
            critic, setup.tokenizer, run.directory / "critic", card, adapter=adapter,
            trust_remote_code=config.model.trust_remote_code, say=run.say,
        )  # fmt: skip
    else:
        (head,) = values
        target = run.directory / "value_head.safetensors"
        partial = target.with_name(f".{target.name}.partial")
        save_file({name: value.contiguous() for name, value in head.state_dict().items()}, partial)
        partial.replace(target)
