"""Proximal policy optimisation (1707.06347) against a reward model under a KL constraint (1909.08593, 2203.02155).

What this leaves out or does differently, knowingly:
- no top-p or top-k while sampling: a cut distribution is not the one whose ratio is taken;
- the first gradient step of an update takes π's own log-probabilities as π_old's (they are the same weights), so its
  ratio is exactly 1; how far the scored ones were off is logged as `policy/logp_drift`;
- the adaptive β is steered by the exact KL of each position's distribution, not by the noisier sampled one;
- scores are clipped before the KL penalty and before any baseline is subtracted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from keel.algorithms import advantages as advantage
from keel.algorithms import kl, policy, value
from keel.algorithms.control import adaptive_kl
from keel.config import PPOConfig
from keel.data.batches import derive_seed, rows_of_step
from keel.masked import at_least_float32, entropy, masked_mean, token_logp, whiten
from keel.models.forward import response_logits, response_logits_and_hidden, response_scores, response_tokens
from keel.models.load import ModelSource, count_parameters, merged, save
from keel.models.roles import Roles, open_roles
from keel.rewards import learned
from keel.rewards.shaping import RunningScale, token_rewards
from keel.runlog import StageRun
from keel.stages import epochs, experience, inputs
from keel.stages.experience import Experience, Setup, Steering, Task
from keel.stages.update import EarlyStop, copy_state, due, optimizer_for
from keel.types import Episodes, UsageError


@dataclass(frozen=True, slots=True)
class Collected:
    """A batch of experience with its advantages, and what there is to say about it."""

    experience: Experience
    episodes: Episodes
    metrics: dict[str, float]


def run(config: PPOConfig, run: StageRun) -> dict[str, Any]:
    """Each update: 1. sample and score  2. advantages  3. learn  4. steer β  5. evaluate  6. log, checkpoint."""
    tasks, held, setup = open_stage(config, run, inputs.source_of(config.model, run))
    policy_model, optimizers = setup.roles.policy, _optimizers(config, setup.roles)
    steering = Steering(config.kl.coef, RunningScale())
    stopping, best, first = EarlyStop(config.patience), None, 0
    if checkpoint := run.restore():
        _load_state(setup, optimizers, checkpoint.tensors)
        values = checkpoint.values
        steering = Steering(values["coef"], RunningScale(**values["scale"]), values["episodes"])
        stopping = stopping.restored(values["stopping"])
        best, first = checkpoint.tensors["best"], checkpoint.step

    for update in range(first + 1, config.updates + 1):
        if stopping.stop:
            break
        # 1. and 2. experience: nothing here takes a gradient
        prompts = rows_of_step(
            len(tasks), config.batch_size // config.samples_per_prompt, update - 1, run.seed
        )
        collected, scale = collect(
            setup, [tasks[i] for i in prompts], steering, derive_seed(run.seed, "rollout", update)
        )
        # 3. epochs of mini-batches
        with run.timed("train"):
            metrics = collected.metrics | learn(setup, optimizers, collected.episodes, update, steering.coef)
        # 4. β follows the KL of this batch; while the critic warms up the policy stands still
        coef = steering.coef
        if config.kl.target is not None and update > config.critic_warmup:
            coef = adaptive_kl(
                coef, collected.experience.kl, config.kl.target, config.batch_size, config.kl.horizon
            )
        steering = Steering(coef, scale, steering.episodes + config.batch_size)
        metrics["episode"] = steering.episodes
        # 5. held-out prompts
        if held and due(update, config.updates, config.eval_every):
            with run.timed("evaluate"):
                metrics |= experience.evaluate(setup, held)
            stopping = stopping.see(metrics["eval/objective/rlhf_reward"])
            if config.patience is not None and stopping.waited == 0:
                best = copy_state(policy_model)
        # 6. what happened, and where to go on from
        if update == 1 or due(update, config.updates, max(1, config.updates // 10)):
            run.samples(experience.sample_rows(setup, update, collected.experience))
        run.log(update, config.updates, metrics)
        if due(update, config.updates, config.save_every) or stopping.stop:
            values = {"coef": steering.coef, "episodes": steering.episodes, "stopping": stopping.values()}
            scale_values = {"count": scale.count, "mean": scale.mean, "spread": scale.spread}
            run.save(update, _state(setup, optimizers) | {"best": best}, {**values, "scale": scale_values})

    if best is not None:
        policy_model.load_state_dict(best)
    result = experience.final_measures(setup, held or tasks)
    _save(setup, config)
    return result | {
        "kl_coef": steering.coef, "kl_target": config.kl.target, "episodes": steering.episodes,
    }  # fmt: skip


def collect(
    setup: Setup, batch: Sequence[Task], steering: Steering, seed: int
) -> tuple[Collected, RunningScale]:
    """One batch of experience with advantages."""
    config = setup.config
    done, scale = experience.collect(setup, batch, steering.scale, seed)
    scored = done.scored
    estimate = kl.estimate(scored.logp, scored.ref_logp, config.kl.estimator)
    in_reward = config.kl.where == "reward"
    rewards = token_rewards(done.rewards, scored.mask, estimate if in_reward else None, steering.coef)
    estimated, returns = advantage.gae(rewards, scored.values, scored.mask, config.gamma, config.lam)
    if config.whiten_advantages:
        estimated = whiten(estimated, scored.mask)
    episodes = Episodes(
        scored.ids, scored.prompt_lengths, scored.mask, scored.logp, scored.ref_logp, scored.values, rewards,
        estimated, returns,
    )  # fmt: skip
    spread = returns[scored.mask].var(correction=0).item()
    unexplained = (returns - scored.values)[scored.mask].var(correction=0).item()
    metrics = experience.measured(done, steering.coef)
    metrics["val/explained_variance"] = 1 - unexplained / spread if spread > 0 else 0.0
    return Collected(done, episodes, metrics), scale


def learn(
    setup: Setup, optimizers: Sequence[torch.optim.Optimizer], episodes: Episodes, update: int, coef: float
) -> dict[str, float]:
    """Epochs of mini-batches over one batch of experience. Returns means over the gradient steps taken."""
    learning = update > setup.config.critic_warmup
    own = partial(_own_loss, setup, episodes, coef, learning)
    return epochs.learn(setup, optimizers, episodes, update, own, learning=learning)


def _own_loss(
    setup: Setup, episodes: Episodes, coef: float, learning: bool, rows: list[int], tokens: int, fresh: bool
) -> tuple[Tensor, dict[str, Tensor], float]:
    return loss(setup, episodes, rows, tokens, coef, fresh=fresh, learning=learning)


def loss(
    setup: Setup,
    episodes: Episodes,
    rows: list[int],
    tokens: int,
    coef: float,
    *,
    fresh: bool,
    learning: bool,
) -> tuple[Tensor, dict[str, Tensor], float]:
    """The part that `rows` have in the loss of a mini-batch with `tokens` response tokens.

    fresh: the weights are those that sampled, so π_old is π itself. Returns the loss, metrics that add up over the
    parts, and the largest |log π − scored log π_old| of a fresh part.
    """
    config, roles, device = setup.config, setup.roles, setup.run.device
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
    logits, values = _logits_and_values(roles, ids, starts, width, learning)
    logp = token_logp(logits, response_tokens(ids, starts, width), config.sampling.temperature)
    drift = float(torch.where(mask, (logp.detach() - old_logp).abs(), 0.0).max()) if fresh else 0.0
    old_logp = logp.detach() if fresh else old_logp
    policy_loss, policy_metrics = policy.clipped(
        logp,
        old_logp,
        advantages,
        mask,
        config.clip,
        config.clip,
        dual_clip=config.dual_clip,
        denominator=tokens,
    )
    value_loss, value_metrics = value.clipped(
        values, old_values, returns, mask, config.value_clip, denominator=tokens
    )
    with torch.set_grad_enabled(config.entropy_coef > 0 and learning):
        mean_entropy = masked_mean(entropy(logits, config.sampling.temperature), mask, denominator=tokens)
    total = config.value_coef * value_loss
    if learning:
        total = total + policy_loss - config.entropy_coef * mean_entropy
        if config.kl.where == "loss":
            estimate = kl.estimate(logp, ref_logp, config.kl.estimator, mask)
            total = total + coef * masked_mean(estimate, mask, denominator=tokens)
    metrics = {
        "policy/approxkl_avg": policy_metrics["approxkl"],
        "policy/approxkl_k3": policy_metrics["approxkl_k3"],
        "policy/clipfrac_avg": policy_metrics["clipfrac"],
        "policy/entropy_avg": mean_entropy.detach(),
        "loss/policy_avg": policy_loss.detach(),
        "loss/value_avg": value_loss.detach(),
        "val/clipfrac_avg": value_metrics["clipfrac"],
        "val/ratio": policy_metrics["ratio"],
        "val/ratio_var": policy_metrics["ratio_var"],
    }
    return total, metrics, drift


def _logits_and_values(
    roles: Roles, ids: Tensor, starts: Tensor, width: int, learning: bool
) -> tuple[Tensor, Tensor]:
    """(B, T, V) and (B, T); no gradient reaches the policy unless it is learning."""
    if roles.value_head is not None:
        logits, hidden = response_logits_and_hidden(roles.policy, ids, starts, width)
        hidden = hidden if learning else hidden.detach()
        return logits, roles.value_head(at_least_float32(hidden)).squeeze(-1)
    with torch.set_grad_enabled(learning):
        logits = response_logits(roles.policy, ids, starts, width)
    return logits, response_scores(roles.critic, ids, starts, width)


def open_stage(config: PPOConfig, run: StageRun, source: ModelSource) -> tuple[list[Task], list[Task], Setup]:
    """Data and tokens first, so that a bad row is found before any weights are read; then the models."""
    tasks, held, ptx, tokenizer = experience.read_tasks(config, run, source)
    reference = None
    if config.reference:
        reference = ModelSource(
            run.resolve(config.reference), None, config.model.dtype, config.model.trust_remote_code
        )
    reward = learned.load(
        run.resolve(config.reward), device=run.device, dtype=config.model.dtype, trust_remote_code=config.model.trust_remote_code,
    )  # fmt: skip
    if config.shaping.normalize == "model" and not reward.scaled:
        raise UsageError(
            f"{run.name}: the reward model {config.reward!r} says nothing of the scale of its scores, so `shaping.normalize: model` has nothing to normalise by; set it to running or none"
        )
    same_ids = learned.reads_ids_of(reward, tokenizer)
    if same_ids:
        longest = max(len(task.ids) for task in [*tasks, *held]) + config.sampling.max_new_tokens
        learned.check_room(reward, longest, run.name)
    roles = open_roles(
        source, reference, sharing=config.sharing, adapters=inputs.adapters_of(config.lora) if config.lora else None,
        gradient_checkpointing=config.gradient_checkpointing, device=run.device, seed=derive_seed(run.seed, "model"),
    )  # fmt: skip
    run.facts |= {"rows": len(tasks), "parameters": count_parameters(roles.policy), "steps": config.updates}
    run.facts["trained_parameters"] = sum(
        count_parameters(m, trainable=True) for m in (roles.policy, *roles.value_modules)
    )
    return tasks, held, Setup(config, roles, reward, tokenizer, run, ptx, same_ids)


def _optimizers(config: PPOConfig, roles: Roles) -> list[torch.optim.Optimizer]:
    """One for the policy (and its value head); one more for a separate critic, whose gradient is clipped by itself."""
    value_lr = config.value_lr or config.lr
    if roles.critic is None:
        assert roles.value_head is not None
        return [optimizer_for(config, ([roles.policy], config.lr), ([roles.value_head], value_lr))]
    return [
        optimizer_for(config, ([roles.policy], config.lr)),
        optimizer_for(config, ([roles.critic], value_lr)),
    ]


def _state(setup: Setup, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    modules = {
        "policy": setup.roles.policy,
        **{f"value{i}": m for i, m in enumerate(setup.roles.value_modules)},
    }
    return {name: m.state_dict() for name, m in modules.items()} | {
        f"optimizer{i}": o.state_dict() for i, o in enumerate(optimizers)
    }


def _load_state(setup: Setup, optimizers: Sequence[torch.optim.Optimizer], tensors: Any) -> None:
    setup.roles.policy.load_state_dict(tensors["policy"])
    for i, module in enumerate(setup.roles.value_modules):
        module.load_state_dict(tensors[f"value{i}"])
    for i, optimizer in enumerate(optimizers):
        optimizer.load_state_dict(tensors[f"optimizer{i}"])


def _save(setup: Setup, config: PPOConfig) -> None:
    """The policy, and what valued it: users ask for the critic too."""
    run, roles = setup.run, setup.roles
    if roles.critic is not None:
        card = (
            f"The critic of stage {run.name}: a sequence classifier whose score at each position is V(s_t).\n"
        )
        save(merged(roles.critic), setup.tokenizer, run.directory / "critic", card)
    elif roles.value_head is not None:
        head: nn.Linear = roles.value_head
        target = run.directory / "value_head.safetensors"
        partial = target.with_name(f".{target.name}.partial")
        save_file({name: value.contiguous() for name, value in head.state_dict().items()}, partial)
        partial.replace(target)
    inputs.save_model(
        run, roles.policy, setup.tokenizer, config, "A policy trained by PPO under a KL constraint"
    )
