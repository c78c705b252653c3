"""Online DPO (2402.04792): the policy's own replies are the pairs, and a reward says which of two is better.
The loop is `keel.rl.loop`; here is how replies become pairs, and the loss of a pair.

A pair's loss depends on the log-probabilities of both its replies, which may be in different micro-batches.
Its gradient does not: with the replies' log-probabilities s as they were sampled, ∂L/∂s are two numbers a
pair, known before the first forward, and

    ∇L = Σ_replies ∂L/∂s ∇s        s = Σ_t log π(a_t | s_t), for IPO their mean

So each token has a weight, as it has an advantage elsewhere, and any split of the step gives the same
gradient. It holds for one gradient step, of the weights that sampled: each batch is used for one.

What is done differently, knowingly:
- a pair is the best and the worst of `samples_per_prompt` replies, which are two in the paper;
- replies of equal rewards are no pair. TRL calls the first of them the better one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from keel.algorithms import preference
from keel.algorithms.masked import at_least_float32, count, masked_sum, reduced
from keel.config import OnlineDPOConfig
from keel.rl import loop
from keel.rl.algorithm import (
    Collected,
    CriticLoss,
    LogprobMismatch,
    LossOutput,
    MicroBatch,
    collected,
    policy_forward,
)  # fmt: skip
from keel.rl.rollout import Drawn, Experience, LoopState, PromptExample, Setup
from keel.rl.setup import make_optimizers, open_stage
from keel.rundir.stage_run import StageRun
from keel.stages import prepare
from keel.types import Episodes

LOSSES = {"sigmoid": preference.dpo, "ipo": preference.ipo}


def run(config: OnlineDPOConfig, stage: StageRun) -> dict[str, Any]:
    """1. prompts and models  2. updates: sample, score, pair, learn  3. save the policy."""
    prompts, held_out, setup = open_stage(config, stage, sharing="none")
    # nobody else holds the optimisers: they, and the weights by them, would be kept while the policy is saved
    result = loop.OnPolicyLoop(
        OnlineDPO(setup), prompts, held_out, make_optimizers(config, setup.roles)
    ).train()
    what = "A policy trained by DPO on its own pairs"
    prepare.save_model(stage, setup.roles.policy, setup.tokenizer, config, what)
    return result


class OnlineDPO:
    """An `Algorithm`: pairs by reward, and a loss of pairs whose gradient is dealt out to tokens."""

    warmup = 0

    def __init__(self, setup: Setup[OnlineDPOConfig]) -> None:
        self.setup, self.config = setup, setup.config

    def collect(
        self, prompts: Sequence[PromptExample], state: LoopState, update: int, drawn: Drawn | None = None
    ) -> Collected:
        """Replies to the prompts, with what every model makes of them."""
        return collected(self.setup, prompts, state, update, drawn)

    def advantages(self, experience: Experience, kl_coef: float) -> tuple[Episodes, dict[str, float]]:
        """(B, T) −∂L/∂ log π of each token, 0 in replies of no pair. `returns` holds the losses, half of a
        pair's at the first token of each of its replies."""
        scored, config = experience.scored, self.config
        chosen, rejected = paired(experience.rewards, config.samples_per_prompt)
        weights, losses, measured = slopes(
            scored.logp, scored.ref_logp, scored.mask, chosen, rejected, config.loss, config.beta
        )
        zeros = torch.zeros_like(scored.logp)
        returns = zeros.clone()
        for side in (chosen, rejected):
            returns[side, 0] = losses.to(returns) / (2 * max(1, len(losses)))
        episodes = Episodes(
            scored.ids, scored.prompt_lengths, scored.mask, scored.logp, scored.ref_logp, zeros, zeros,
            weights, returns, logp_from_sampler=experience.logp_from_sampler,
        )  # fmt: skip
        prompts = len(experience.rewards) // config.samples_per_prompt
        return episodes, {"frac_reward_zero_std": 1 - len(chosen) / prompts, **measured}

    def critic_loss(self, batch: MicroBatch) -> CriticLoss | None:
        """None: there is no critic."""
        return None

    def loss(self, batch: MicroBatch) -> LossOutput:
        """Σ_t ∂L/∂ log π(a_t) · log π(a_t), whose gradient is that of the pairs' mean loss."""
        now, mask = policy_forward(self.setup, batch), batch.mask
        surrogate = -masked_sum(batch.advantages * now.logp, mask)
        loss, of_experts = now.routed.added_to(surrogate, count(mask) / batch.denominator)
        entropy = reduced(now.entropy.detach(), mask, "token", batch.denominator)
        zero = torch.zeros((), device=entropy.device)
        ratio = count(mask) / batch.denominator  # of the weights that sampled: 1 at each token
        mismatch = LogprobMismatch.between(now.logp, batch.old_logp, mask)
        value = masked_sum(batch.returns, mask)
        return LossOutput(
            loss, value, zero, zero, entropy, ratio, zero, mismatch=mismatch, extra=of_experts
        )  # fmt: skip


def paired(rewards: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """(B,) rewards, `samples` of each prompt after the other → rows of the best and of the worst of each
    prompt whose rewards are not all equal; of equal ones the first."""
    groups = rewards.view(-1, samples)
    best, worst = groups.argmax(dim=1), groups.argmin(dim=1)
    first = torch.arange(len(groups)) * samples
    differ = groups.amax(dim=1) > groups.amin(dim=1)
    return (first + best)[differ], (first + worst)[differ]


def slopes(
    logp: Tensor, ref_logp: Tensor, mask: Tensor, chosen: Tensor, rejected: Tensor, loss: str, beta: float
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Of the mean loss of P pairs: (B, T) its slope downwards at each token, 0 where the mask is False and in
    rows of no pair; the P losses; and what they measure, means over the pairs.

    logp, ref_logp: (B, T) of policy and reference. chosen, rejected: (P,) rows. loss: a name of `LOSSES`.
    """
    if not len(chosen):
        return torch.zeros_like(logp), logp.new_zeros(0), {}
    average = loss == "ipo"  # of the tokens' log-probabilities; else their sum
    lengths = mask.sum(dim=1).clamp(min=1) if average else torch.ones(len(mask), dtype=torch.long)

    def of_reply(values: Tensor) -> Tensor:
        return masked_sum(at_least_float32(values), mask, dim=1) / lengths

    with torch.enable_grad():
        whole = of_reply(logp).detach().requires_grad_()
        reference = of_reply(ref_logp)
        sides = (whole[chosen], whole[rejected], reference[chosen], reference[rejected])
        losses, measured = LOSSES[loss](*sides, beta)
        (slope,) = torch.autograd.grad(losses.mean(), whole)
    weights = torch.where(mask, -(slope / lengths)[:, None], 0.0)
    names = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
    return weights, losses.detach(), {name: measured[name].mean().item() for name in names}
