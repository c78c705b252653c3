"""Proximal policy optimisation (1707.06347) against a reward model under a KL constraint (1909.08593,
2203.02155).

What this leaves out or does differently, knowingly:
- no top-p or top-k while sampling: a cut distribution is not the one whose ratio is taken;
- the first gradient step of an update takes π's own log-probabilities as π_old's (they are the same weights),
so its
  ratio is exactly 1; how far the scored ones were off is logged as `policy/logp_drift`;
- the adaptive β is steered by the exact KL of each position's distribution, not by the noisier sampled one;
- scores are clipped before the KL penalty and before any baseline is subtracted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from keel.algorithms import advantages as advantage
from keel.algorithms import kl, policy, value
from keel.algorithms.masked import at_least_float32, masked_mean, whiten
from keel.config import PPOConfig
from keel.models.logprobs import (
    HeadInputs,
    head_inputs,
    response_index,
    scatter_to_mask,
    scores_at,
    token_logprobs,
)
from keel.models.lora import files_of, merged
from keel.models.save import save
from keel.rewards.shaping import RunningScale, token_rewards
from keel.rl import epochs, loop, rollout
from keel.rl.epochs import LogprobMismatch, LossTerm
from keel.rl.rollout import Experience, LoopState, PromptExample, Setup
from keel.rl.setup import open_stage
from keel.rundir.stage_run import StageRun
from keel.stages import prepare
from keel.types import Episodes


def settings_of(setup: Setup) -> PPOConfig:
    assert isinstance(setup.config, PPOConfig)
    return setup.config


@dataclass(frozen=True, slots=True)
class Collected:
    """A batch of experience with its advantages, and what there is to say about it."""

    experience: Experience
    episodes: Episodes
    metrics: dict[str, float]


def run(config: PPOConfig, run: StageRun) -> dict[str, Any]:
    """1. prompts and models  2. updates: sample, score, advantages, learn  3. save the policy and what valued
    it."""
    tasks, held, setup = open_stage(config, run, sharing=config.sharing)
    optimizers = loop.optimizers(config, setup.roles, config.value_lr)

    def step(
        batch: list[PromptExample], steering: LoopState, update: int
    ) -> tuple[Experience, RunningScale, dict[str, float]]:
        collected, scale = collect(setup, batch, steering, loop.rollout_seed(setup, update))
        with run.timed("train"):
            learned_metrics = learn(
                setup, optimizers, collected.episodes, update, steering.coef, steering.pace
            )
        return collected.experience, scale, collected.metrics | learned_metrics

    result = loop.loop(setup, tasks, held, optimizers, step, warmup=config.critic_warmup)
    _save(setup, config)
    return result


def collect(
    setup: Setup, batch: Sequence[PromptExample], steering: LoopState, seed: int
) -> tuple[Collected, RunningScale]:
    """One batch of experience with advantages."""
    config = settings_of(setup)
    done, scale = rollout.collect(setup, batch, steering.scale, seed)
    scored = done.scored
    estimate = kl.estimate(scored.logp, scored.ref_logp, config.kl.estimator)
    in_reward = config.kl.where == "reward"
    rewards = token_rewards(done.rewards, scored.mask, estimate if in_reward else None, steering.coef)
    estimated, returns = advantage.gae(rewards, scored.values, scored.mask, config.gamma, config.lam)
    if config.whiten_advantages:
        estimated = whiten(estimated, scored.mask)
    episodes = Episodes(
        scored.ids, scored.prompt_lengths, scored.mask, scored.logp, scored.ref_logp, scored.values, rewards,
        estimated, returns, rollout.importance(setup, done),
    )  # fmt: skip
    spread = returns[scored.mask].var(correction=0).item()
    unexplained = (returns - scored.values)[scored.mask].var(correction=0).item()
    metrics = rollout.measured(done, steering.coef)
    metrics["val/explained_variance"] = 1 - unexplained / spread if spread > 0 else 0.0
    return Collected(done, episodes, metrics), scale


def learn(
    setup: Setup,
    optimizers: Sequence[torch.optim.Optimizer],
    episodes: Episodes,
    update: int,
    coef: float,
    pace: float = 1.0,
) -> dict[str, float]:
    """Epochs of mini-batches over one batch of experience. Returns means over the gradient steps taken."""
    waits = settings_of(setup).critic_warmup
    learning, first = update > waits, update == waits + 1

    def of_part(rows: list[int], mini_batch: list[int], fresh: bool) -> Iterator[LossTerm]:
        tokens = int(episodes.mask[mini_batch].sum())
        return losses(setup, episodes, rows, tokens, coef, fresh=fresh, learning=learning)

    return epochs.learn(
        setup, optimizers, episodes, update, of_part, pace=pace, learning=learning, first=first
    )


def losses(
    setup: Setup,
    episodes: Episodes,
    rows: list[int],
    tokens: int,
    coef: float,
    *,
    fresh: bool,
    learning: bool,
) -> Iterator[LossTerm]:
    """The part that `rows` have in the loss of a mini-batch with `tokens` response tokens: a critic's of its
    own and then the policy's, or both in one where they share a trunk.

    fresh: the weights are those that sampled, so π_old is π itself. Metrics add up over the parts; for a
    fresh part the drift says how far log π is from the scored log π_old.
    """
    config, device = settings_of(setup), setup.run.device
    mask = episodes.mask[rows].to(device)
    width = int(mask.sum(dim=1).max())
    mask = mask[:, :width]
    ids, starts = episodes.ids[rows].to(device), episodes.prompt_lengths[rows].to(device)
    ids = ids[:, : int((starts + mask.sum(dim=1)).max())]
    old_logp, old_values, returns, advantages, ref_logp = (
        field[rows, :width].to(device)
        for field in (
            episodes.logp, episodes.values, episodes.returns, episodes.advantages, episodes.ref_logp,
        )
    )  # fmt: skip
    index = response_index(mask, starts, ids.shape[1])

    def of_values(values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        value_loss, measured = value.clipped(
            scatter_to_mask(values, mask), old_values, returns, mask, config.value_clip, denominator=tokens
        )
        metrics = {"loss/value_avg": value_loss.detach(), "val/clipfrac_avg": measured["clipfrac"]}
        return config.value_coef * value_loss, metrics

    total, metrics = torch.zeros((), device=device), dict[str, Tensor]()
    if (head := setup.roles.value_head) is None:
        yield *of_values(scores_at(setup.roles.critic, ids, index)), LogprobMismatch()
    found, logp, entropies = _policy(setup, ids, index, mask, learning)
    if head is not None:
        assert found.hidden is not None
        total, metrics = of_values(head(at_least_float32(found.hidden)).squeeze(-1))
    drift = LogprobMismatch.between(logp, old_logp, mask) if fresh else LogprobMismatch()
    old_logp = logp.detach() if fresh else old_logp
    policy_loss, policy_metrics = policy.clipped(
        logp, old_logp, advantages, mask, config.clip, config.clip, dual_clip=config.dual_clip, denominator=tokens,
        weights=None if episodes.weights is None else episodes.weights[rows, :width].to(device),
    )  # fmt: skip
    mean_entropy = masked_mean(entropies, mask, denominator=tokens)
    if learning:
        total = total + policy_loss - config.entropy_coef * mean_entropy
        if config.kl.where == "loss":
            estimate = kl.estimate(logp, ref_logp, config.kl.estimator, mask)
            total = total + coef * masked_mean(estimate, mask, denominator=tokens)
    metrics |= {
        "policy/approxkl_avg": policy_metrics["approxkl"],
        "policy/approxkl_k3": policy_metrics["approxkl_k3"],
        "policy/clipfrac_avg": policy_metrics["clipfrac"],
        "policy/entropy_avg": mean_entropy.detach(),
        "loss/policy_avg": policy_loss.detach(),
        "val/ratio": policy_metrics["ratio"],
        "val/ratio_var": policy_metrics["ratio_var"],
    }
    yield total, metrics, drift


def _policy(
    setup: Setup, ids: Tensor, index: Tensor, mask: Tensor, learning: bool
) -> tuple[HeadInputs, Tensor, Tensor]:
    """The policy's states, and (B, T) log π and entropies, 0 where the mask is False; no gradient reaches the
    policy unless it is learning, and none comes from the entropies unless they are rewarded."""
    config, roles = settings_of(setup), setup.roles
    with torch.set_grad_enabled(learning):
        found = head_inputs(roles.policy, ids, index, hidden=roles.value_head is not None)
        logp, entropies, _ = token_logprobs(
            found, ids.flatten()[index + 1], config.sampling.temperature, entropy=True
        )
    entropies = entropies if config.entropy_coef > 0 else entropies.detach()
    return found, scatter_to_mask(logp, mask), scatter_to_mask(entropies, mask)


def _save(setup: Setup, config: PPOConfig) -> None:
    """The policy, and what valued it: users ask for the critic too."""
    run, roles = setup.run, setup.roles
    if roles.critic is not None:
        card = (
            f"The critic of stage {run.name}: a sequence classifier whose score at each position is V(s_t).\n"
        )
        base = config.model.path or ""
        adapter = files_of(roles.critic, prepare.source_of(config.model, run), base)
        save(merged(roles.critic), setup.tokenizer, run.directory / "critic", card, adapter=adapter)
    elif roles.value_head is not None:
        head: nn.Linear = roles.value_head
        target = run.directory / "value_head.safetensors"
        partial = target.with_name(f".{target.name}.partial")
        save_file({name: value.contiguous() for name, value in head.state_dict().items()}, partial)
        partial.replace(target)
    prepare.save_model(
        run, roles.policy, setup.tokenizer, config, "A policy trained by PPO under a KL constraint"
    )
