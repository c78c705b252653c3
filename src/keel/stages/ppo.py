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
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from keel.algorithms import advantages as advantage
from keel.algorithms import kl, policy, value
from keel.algorithms.control import adaptive_kl
from keel.config import PPOConfig
from keel.data import chat
from keel.data.batches import derive_seed, permutation, rows_of_step
from keel.evaluation.measures import mean_interval
from keel.masked import at_least_float32, entropy, masked_mean, token_logp, whiten
from keel.models import optim
from keel.models.forward import response_logits, response_logits_and_hidden, response_scores, response_tokens
from keel.models.load import ModelSource, count_parameters, merged, save
from keel.models.roles import Roles, open_roles
from keel.rewards import learned
from keel.rewards.shaping import RunningScale, terminal_rewards, token_rewards
from keel.rollout.engine import generate, text_of
from keel.rollout.score import Scored, score
from keel.runlog import StageRun
from keel.stages import inputs, language
from keel.stages.update import (
    EarlyStop,
    add_metrics,
    copy_state,
    due,
    lr_scale,
    micro_batches,
    optimizer_for,
)
from keel.types import Completion, Episodes, Prompt, PromptRecord, Record, TextRecord, UsageError

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
class Collected:
    """A batch of experience, and what there is to say about it."""

    completions: tuple[Completion, ...]
    scored: Scored
    scores: Tensor  # (B,) raw scores of the reward model
    episodes: Episodes
    metrics: dict[str, float]
    kl: float  # mean over responses of the exact KL summed over their tokens, in nats


def run(config: PPOConfig, run: StageRun) -> dict[str, Any]:
    """Each update: 1. sample  2. score and shape  3. advantages  4. learn  5. steer β  6. evaluate  7. log, checkpoint."""
    source = inputs.source_of(config.model, run)
    tasks, held, setup = _open(config, run, source)
    roles = setup.roles
    optimizers = _optimizers(config, roles)
    steering = Steering(config.kl.coef, RunningScale())
    stopping, best, first = EarlyStop(config.patience), None, 0
    run.facts |= {"rows": len(tasks), "parameters": count_parameters(roles.policy), "steps": config.updates}
    run.facts["trained_parameters"] = sum(
        count_parameters(m, trainable=True) for m in (roles.policy, *roles.value_modules)
    )
    if checkpoint := run.restore():
        _load_state(setup, optimizers, checkpoint.tensors)
        values = checkpoint.values
        steering = Steering(values["coef"], RunningScale(**values["scale"]), values["episodes"])
        stopping, best, first = (
            stopping.restored(values["stopping"]),
            checkpoint.tensors["best"],
            checkpoint.step,
        )

    for update in range(first + 1, config.updates + 1):
        if stopping.stop:
            break
        # 1. to 3. experience: nothing here takes a gradient
        batch = [
            tasks[i]
            for i in rows_of_step(
                len(tasks), config.batch_size // config.samples_per_prompt, update - 1, run.seed
            )
        ]
        collected, scale = collect(setup, batch, steering, derive_seed(run.seed, "rollout", update))
        # 4. epochs of mini-batches
        with run.timed("train"):
            learned_metrics = learn(setup, optimizers, collected.episodes, update, steering.coef)
        metrics = collected.metrics | learned_metrics
        # 5. β follows the KL of this batch
        coef = steering.coef
        if (
            config.kl.target is not None and update > config.critic_warmup
        ):  # before that the policy stands still
            coef = adaptive_kl(coef, collected.kl, config.kl.target, config.batch_size, config.kl.horizon)
        steering = Steering(coef, scale, steering.episodes + config.batch_size)
        metrics["episode"] = steering.episodes
        # 6. held-out prompts
        if held and due(update, config.updates, config.eval_every):
            with run.timed("evaluate"):
                metrics |= evaluate(setup, held)
            stopping = stopping.see(
                metrics["eval/objective/scores"] - steering.coef * metrics["eval/objective/kl"]
            )
            if config.patience is not None and stopping.waited == 0:
                best = copy_state(roles.policy)
        # 7. what happened, and where to go on from
        if update == 1 or due(update, config.updates, max(1, config.updates // 10)):
            run.samples(_samples(setup, update, collected))
        run.log(update, config.updates, metrics)
        if due(update, config.updates, config.save_every) or stopping.stop:
            values = {"coef": steering.coef, "episodes": steering.episodes, "stopping": stopping.values()}
            scale_values = {"count": scale.count, "mean": scale.mean, "spread": scale.spread}
            run.save(update, _state(setup, optimizers) | {"best": best}, {**values, "scale": scale_values})

    if best is not None:
        roles.policy.load_state_dict(best)
    result = _final(setup, held or tasks, steering)
    _save(setup, config)
    return result


def collect(
    setup: Setup, batch: Sequence[Task], steering: Steering, seed: int
) -> tuple[Collected, RunningScale]:
    """One batch of experience: sample, score, shape, estimate advantages."""
    config, run = setup.config, setup.run
    with run.timed("rollout"):
        completions = _sample(setup, [task for task in batch for _ in range(config.samples_per_prompt)], seed)
    with run.timed("score"):
        scored = _score_tokens(setup, completions)
        scores = score_completions(
            setup, [task for task in batch for _ in range(config.samples_per_prompt)], completions
        )
    scale = steering.scale.update(scores)
    ended = torch.tensor([c.stop_reason != "length" for c in completions])
    mean, std = {
        "none": (0.0, 1.0),
        "model": (setup.reward.mean, setup.reward.std),
        "running": (scale.mean, scale.std),
    }[config.shaping.normalize]
    terminal = terminal_rewards(
        scores, ended, mean=mean, std=std, clip=config.shaping.clip, missing_stop_penalty=config.shaping.missing_stop_penalty,
        center=config.shaping.center, group_size=config.samples_per_prompt,
    )  # fmt: skip
    estimate = kl.estimate(scored.logp, scored.ref_logp, config.kl.estimator)
    in_reward = config.kl.where == "reward"
    rewards = token_rewards(terminal, scored.mask, estimate if in_reward else None, steering.coef)
    estimated, returns = advantage.gae(rewards, scored.values, scored.mask, config.gamma, config.lam)
    if config.whiten_advantages:
        estimated = whiten(estimated, scored.mask)
    episodes = Episodes(
        scored.ids,
        scored.prompt_lengths,
        scored.mask,
        scored.logp,
        scored.ref_logp,
        scored.values,
        rewards,
        estimated,
        returns,
    )
    exact = scored.exact_kl.sum(dim=1).mean().item()
    metrics = _metrics_of(completions, scored, scores, terminal, returns, steering.coef)
    return Collected(tuple(completions), scored, scores, episodes, metrics, exact), scale


def learn(
    setup: Setup, optimizers: Sequence[torch.optim.Optimizer], episodes: Episodes, update: int, coef: float
) -> dict[str, float]:
    """Epochs of mini-batches over one batch of experience. Returns means over the gradient steps taken."""
    config, run = setup.config, setup.run
    size, rows = config.mini_batch or config.batch_size, config.batch_size
    learning = update > config.critic_warmup
    scale = lr_scale(config, update - 1, config.updates)
    totals: dict[str, float] = {}
    steps, epochs, drift, first_ratio = 0, 0, 0.0, 1.0
    lengths = episodes.prompt_lengths + episodes.mask.sum(dim=1)
    for epoch in range(config.epochs):
        order = permutation(rows, derive_seed(run.seed, "mini-batches", update), epoch)
        stop = False
        for start in range(0, rows, size):
            # rows of similar length share a micro-batch: less padding, the same sum
            chosen = sorted(order[start : start + size], key=lambda row: (int(lengths[row]), row))
            tokens = int(episodes.mask[chosen].sum())
            measured: dict[str, float] = {}
            for part in micro_batches(chosen, config.micro_batch):
                step_loss, part_metrics, part_drift = loss(
                    setup, episodes, list(part), tokens, coef, fresh=steps == 0, learning=learning
                )
                step_loss.backward()
                add_metrics(measured, part_metrics)
                drift = max(drift, part_drift)
            if setup.ptx and learning:
                add_metrics(measured, {"loss/ptx": _ptx_gradient(setup, update, steps)})
            stepped = [
                optim.step(o, scale, config.max_grad_norm, f"{run.name}, update {update}") for o in optimizers
            ]
            measured["grad_norm"], measured["lr"] = stepped[0]["grad_norm"], stepped[0]["lr"]
            if steps == 0 and measured["val/ratio_var"] > 0:  # else 1: its sum over the parts is only rounded
                first_ratio = measured["val/ratio"]
            add_metrics(totals, measured)
            steps += 1
            stop = (
                config.max_approx_kl is not None
                and learning
                and measured["policy/approxkl_k3"] > config.max_approx_kl
            )
            if stop:
                break
        epochs += 1
        if stop:
            break
    return {name: total / steps for name, total in totals.items()} | {
        "policy/epochs": epochs, "policy/logp_drift": drift, "val/ratio_first": first_ratio,
    }  # fmt: skip


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
            episodes.logp,
            episodes.values,
            episodes.returns,
            episodes.advantages,
            episodes.ref_logp,
        )
    )
    if roles.value_head is not None:
        logits, hidden = response_logits_and_hidden(roles.policy, ids, starts, width)
        values = roles.value_head(at_least_float32(hidden if learning else hidden.detach())).squeeze(-1)
    else:
        logits = (
            response_logits(roles.policy, ids, starts, width)
            if learning
            else _without_gradient(roles.policy, ids, starts, width)
        )
        values = response_scores(roles.critic, ids, starts, width)
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


def _without_gradient(model: Any, ids: Tensor, starts: Tensor, width: int) -> Tensor:
    with torch.no_grad():
        return response_logits(model, ids, starts, width)


def _ptx_gradient(setup: Setup, update: int, step: int) -> float:
    """Add the gradient of coef × language-modelling loss on a few rows (PPO-ptx); returns the loss."""
    ptx = setup.config.ptx
    assert ptx is not None
    seed = derive_seed(setup.run.seed, "ptx", update)
    rows = [setup.ptx[i] for i in rows_of_step(len(setup.ptx), ptx.batch_size, step, seed)]
    tokens, total = sum(row.counted for row in rows), 0.0
    for part in micro_batches(rows, setup.config.micro_batch):
        value, _ = language.loss(setup.roles.policy, part, setup.pad_id, tokens)
        (ptx.coef * value).backward()
        total += float(value.detach())
    return total


def _open(config: PPOConfig, run: StageRun, source: ModelSource) -> tuple[list[Task], list[Task], Setup]:
    """Data and tokens first, so that a bad row is found before any weights are read; then the models."""
    dataset = inputs.read(run, config.data, ("prompt",))
    tokenizer = inputs.open_tokenizer(config.model, run, conversational=dataset.conversational)
    limit = inputs.limit_of(config, run, source)
    room = None if limit is None else limit - config.sampling.max_new_tokens
    if room is not None and room < 1:
        raise UsageError(
            f"{run.name}: sampling.max_new_tokens {config.sampling.max_new_tokens} leaves no room for a prompt within {limit} tokens"
        )
    too_long = inputs.TooLong(run, config.too_long, room)
    tasks: list[Task] = inputs.encode_all(
        run, dataset.records, lambda record: _task(tokenizer, record, too_long)
    )
    held_records = inputs.read(run, config.eval_data, ("prompt",)).records if config.eval_data else ()
    held = inputs.encode_all(run, held_records, lambda record: _task(tokenizer, record, too_long))
    ptx_rows: list[language.Row] = []
    if config.ptx:
        records = inputs.read(run, config.ptx.data, ("text",)).records
        texts = [chat.text_ids(tokenizer, record) for record in records if isinstance(record, TextRecord)]
        ptx_rows = [language.Row(ids[:limit], counts[:limit]) for ids, counts in texts if len(ids) > 1]
    too_long.report()
    reference = None
    if config.reference:
        reference = ModelSource(
            run.resolve(config.reference), None, config.model.dtype, config.model.trust_remote_code
        )
    roles = open_roles(
        source, reference, sharing=config.sharing, adapters=inputs.adapters_of(config.lora) if config.lora else None,
        gradient_checkpointing=config.gradient_checkpointing, device=run.device, seed=derive_seed(run.seed, "model"),
    )  # fmt: skip
    reward = learned.load(
        run.resolve(config.reward), device=run.device, dtype=config.model.dtype, trust_remote_code=config.model.trust_remote_code,
    )  # fmt: skip
    return tasks, held, Setup(config, roles, reward, tokenizer, run, tuple(ptx_rows))


def _task(tokenizer: Any, record: Record, too_long: inputs.TooLong) -> Task | None:
    assert isinstance(record, PromptRecord)
    ids = chat.prompt_ids(tokenizer, record.prompt)
    if not too_long.fits(record, len(ids)):
        return None
    return Task(record.prompt, tuple(ids[-too_long.limit :] if too_long.limit else ids))


def _sample(setup: Setup, tasks: Sequence[Task], seed: int) -> list[Completion]:
    sampling = setup.config.sampling.plain()
    return generate(
        setup.roles.policy, [task.ids for task in tasks], sampling,
        stop_ids=chat.stop_ids(setup.tokenizer, sampling.stop), pad_id=setup.pad_id, seed=seed,
    )  # fmt: skip


def _score_tokens(setup: Setup, completions: Sequence[Completion]) -> Scored:
    config, roles = setup.config, setup.roles
    return score(
        completions, roles.policy, roles.reference, temperature=config.sampling.temperature, pad_id=setup.pad_id,
        device=setup.run.device, micro_batch=config.micro_batch or config.batch_size, critic=roles.critic, value_head=roles.value_head,
    )  # fmt: skip


def score_completions(setup: Setup, tasks: Sequence[Task], completions: Sequence[Completion]) -> Tensor:
    """(B,) raw scores of the reward model: from ids where it reads the policy's, otherwise from text."""
    reward, tokenizer = setup.reward, setup.tokenizer
    if not reward.is_encoder and learned.same_tokenizer(reward.tokenizer, tokenizer):
        rows: list[learned.Inputs] = [{"input_ids": [*c.prompt_ids, *c.ids]} for c in completions]
    else:
        rows = [
            learned.encode_sampled(reward, task.prompt, text_of(tokenizer, c), c.stop_reason != "length")
            for task, c in zip(tasks, completions, strict=True)
        ]
    return learned.score(reward, rows, batch_size=setup.config.micro_batch or setup.config.batch_size)


def _metrics_of(
    completions: Sequence[Completion],
    scored: Scored,
    scores: Tensor,
    terminal: Tensor,
    returns: Tensor,
    coef: float,
) -> dict[str, float]:
    mask, sampled_kl = scored.mask, (scored.logp - scored.ref_logp).sum(dim=1)
    lengths = mask.sum(dim=1).float()
    non_score = -coef * sampled_kl
    spread = returns[mask].var(correction=0).item()
    unexplained = (returns - scored.values)[mask].var(correction=0).item()
    return {
        "objective/kl": sampled_kl.mean().item(),
        "objective/kl_exact": scored.exact_kl.sum(dim=1).mean().item(),
        "objective/kl_coef": coef,
        "objective/entropy": (-scored.logp).sum(dim=1).mean().item(),
        "objective/non_score_reward": non_score.mean().item(),
        "objective/rlhf_reward": (terminal + non_score).mean().item(),
        "objective/scores": scores.mean().item(),
        "objective/scores_std": scores.std(correction=0).item(),
        "val/explained_variance": 1 - unexplained / spread if spread > 0 else 0.0,
        "val/num_eos_tokens": float(sum(c.stop_reason == "eos" for c in completions)),
        "rollout/response_length": lengths.mean().item(),
        "rollout/truncated": sum(c.stop_reason == "length" for c in completions) / len(completions),
    }


def _samples(setup: Setup, update: int, collected: Collected) -> list[dict[str, Any]]:
    scored = collected.scored
    kls = (scored.logp - scored.ref_logp).sum(dim=1).tolist()
    return [
        {
            "step": update,
            "prompt": setup.tokenizer.decode(list(c.prompt_ids), skip_special_tokens=True),
            "completion": text_of(setup.tokenizer, c),
            "rewards": {"reward": collected.scores[i].item()},
            "kl": kls[i],
            "length": len(c.ids),
            "stop_reason": c.stop_reason,
        }
        for i, c in enumerate(collected.completions[:SAMPLES_KEPT])
    ]


def evaluate(setup: Setup, tasks: Sequence[Task]) -> dict[str, float]:
    """Raw score and exact KL on held-out prompts; the same random draws at every evaluation."""
    scores, kls, _ = _held_out(setup, tasks)
    return {"eval/objective/scores": scores.mean().item(), "eval/objective/kl": kls.mean().item()}


def _held_out(setup: Setup, tasks: Sequence[Task]) -> tuple[Tensor, Tensor, Tensor]:
    scores, kls, lengths = [], [], []
    for number, part in enumerate(micro_batches(tasks, setup.config.batch_size)):
        completions = _sample(setup, part, derive_seed(setup.run.seed, "held-out", number))
        scored = _score_tokens(setup, completions)
        kls.append(scored.exact_kl.sum(dim=1))
        lengths.append(scored.mask.sum(dim=1).float())
        scores.append(score_completions(setup, part, completions))
    return torch.cat(scores), torch.cat(kls), torch.cat(lengths)


def _final(setup: Setup, tasks: Sequence[Task], steering: Steering) -> dict[str, Any]:
    """Measures of the finished policy on held-out prompts, or on the first of its own where none are held out."""
    scores, kls, lengths = _held_out(setup, tasks[: 4 * setup.config.batch_size])
    columns = {"scores": scores, "kl": kls, "length": lengths}
    return {name: mean_interval(column.tolist()) for name, column in columns.items()} | {
        "kl_coef": steering.coef, "kl_target": setup.config.kl.target, "episodes": steering.episodes,
    }  # fmt: skip


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
