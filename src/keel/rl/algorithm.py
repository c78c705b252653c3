"""What PPO and GRPO are to the loop: a way to collect, advantages, and a loss. And the policy's part of that
loss, which they share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from keel.algorithms import kl, masked, policy
from keel.algorithms.advantages import Advantages
from keel.algorithms.masked import Reduction, reduced
from keel.config import OnPolicy, methods
from keel.distributed import group
from keel.errors import NotFiniteError, UsageError
from keel.models import experts
from keel.models.logprobs import HeadInputs, head_inputs, response_index, scatter_to_mask, token_logprobs
from keel.rewards.shaping import RunningScale
from keel.rl import rollout
from keel.rl.rollout import Drawn, Experience, LoopState, PromptExample, Setup
from keel.types import Episodes

# ---------------------------------------------------------------- what travels


@dataclass(frozen=True, slots=True)
class Collected:
    """What one update has sampled."""

    experience: Experience
    reward_scaler: RunningScale  # which has seen the rewards
    episodes: int  # responses that were sampled, replaced ones included
    metrics: Mapping[str, float] = field(default_factory=dict)  # of how they were collected


def collected(
    setup: Setup[Any], prompts: Sequence[PromptExample], state: LoopState, update: int, drawn: Drawn | None
) -> Collected:
    """Responses to an update's prompts, with what every model makes of them; none replaced."""
    seed = rollout.seed_of(setup, update)
    experience, reward_scaler = rollout.collect(setup, prompts, state.reward_scaler, seed, update, drawn)
    return Collected(experience, reward_scaler, len(experience.completions))


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Some rows of a mini-batch on the device, cut to their longest response. S: of these rows; N: the
    counted positions of the mask."""

    ids: Tensor  # (B, S) prompt + response, right-padded
    mask: Tensor  # (B, T) True at response tokens that count
    index: Tensor  # (N,) into the flattened ids: the positions that predict the counted tokens
    tokens: Tensor  # (N,) the counted tokens
    old_logp: Tensor  # (B, T) log π_old(a_t | s_t) as scored
    ref_logp: Tensor  # (B, T) log π_ref(a_t | s_t)
    old_values: Tensor  # (B, T) V_old(s_t)
    returns: Tensor  # (B, T) R_t
    advantages: Tensor  # (B, T) Â_t
    weights: Tensor | None  # (B, T) truncated importance weights
    denominator: float  # `masked.count` of the whole mini-batch
    kl_coef: float  # β
    on_policy: bool  # the weights are those that sampled, so π_old is π itself
    policy_learns: bool  # False while only the critic learns
    lengths: Tensor  # (B,) tokens of each row: its prompt, and its response up to the last that counts

    @classmethod
    def of(
        cls,
        episodes: Episodes,
        rows: Sequence[int],
        device: torch.device,
        *,
        denominator: float,
        kl_coef: float,
        on_policy: bool,
        policy_learns: bool = True,
    ) -> MicroBatch:
        """The rows of some episodes."""
        chosen = list(rows)
        mask = episodes.mask[chosen].to(device)
        width = max(1, int(masked.extent(mask).max()))
        mask = mask[:, :width]
        starts = episodes.prompt_lengths[chosen].to(device)
        ends = starts + masked.extent(mask)
        # one column more where nothing counts, so that no row is empty
        reach = int(ends.max()) + int(not mask.any())
        ids = episodes.ids[chosen].to(device)[:, :reach]
        index = response_index(mask, starts, ids.shape[1])

        def part(column: Tensor) -> Tensor:
            return column[chosen, :width].to(device)

        return cls(
            ids, mask, index, ids.flatten()[index + 1], part(episodes.logp), part(episodes.ref_logp),
            part(episodes.values), part(episodes.returns), part(episodes.advantages),
            None if episodes.weights is None else part(episodes.weights),
            denominator, kl_coef, on_policy, policy_learns, ends,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class LogprobMismatch:
    """|log π − log π_old| at the response tokens of the first gradient step, where both are of the same
    weights."""

    largest: float = 0.0
    total: float = 0.0
    tokens: int = 0

    @staticmethod
    def between(logp: Tensor, old_logp: Tensor, mask: Tensor) -> LogprobMismatch:
        """Of (B, T)."""
        gap = torch.where(mask, (logp.detach() - old_logp).abs(), 0.0)
        return LogprobMismatch(float(gap.max()), float(gap.sum()), int(mask.sum()))

    def __add__(self, other: LogprobMismatch) -> LogprobMismatch:
        return LogprobMismatch(
            max(self.largest, other.largest), self.total + other.total, self.tokens + other.tokens
        )

    @property
    def mean(self) -> float:
        return self.total / max(1, self.tokens)


@dataclass(frozen=True, slots=True)
class CriticLoss:
    """The critic's part of a loss. Every tensor has shape () and is a share of the mini-batch's."""

    loss: Tensor  # what the backward begins at: `value_coef` times the value loss
    value_loss: Tensor  # detached, before its coefficient
    clip_fraction: Tensor  # share of positions where the clip raises the loss


@dataclass(frozen=True, slots=True)
class LossOutput:
    """What an algorithm makes of a micro-batch. Every tensor has shape () and is a share of the mini-batch's,
    so that those of its micro-batches add up. All but `loss` are detached."""

    loss: Tensor  # what the backward begins at
    policy_loss: Tensor  # before entropy bonus and KL
    approx_kl: Tensor  # ½ (log π − log π_old)², nats a token
    approx_kl_k3: Tensor  # ρ − 1 − log ρ, nats a token
    entropy: Tensor  # nats a token
    ratio: Tensor  # ρ
    ratio_var: Tensor  # (ρ − 1)²
    clip_fraction: Tensor | None = None  # where the clip lowers the objective; None for a loss without
    critic: CriticLoss | None = None  # of a value head on the policy, whose loss is part of `loss`
    mismatch: LogprobMismatch = field(default_factory=LogprobMismatch)
    extra: Mapping[str, Tensor] = field(default_factory=dict)  # more that a policy loss measures, by name


class Algorithm(Protocol):
    """What the loop asks of a method that learns from its own samples. PPO and GRPO are two."""

    setup: Setup[Any]
    warmup: int  # updates at the start during which the policy stands still

    def collect(
        self, prompts: Sequence[PromptExample], state: LoopState, update: int, drawn: Drawn | None = None
    ) -> Collected:
        """Sample and score responses to the prompts of an update. drawn: the responses, where they were
        sampled already."""
        ...

    def advantages(self, experience: Experience, kl_coef: float) -> tuple[Episodes, dict[str, float]]:
        """Rewards of each token, advantages and returns; and metrics of them. No gradient."""
        ...

    def critic_loss(self, batch: MicroBatch) -> CriticLoss | None:
        """The loss of a critic with weights of its own; None without one. Its backward runs before the
        policy's forward, so that what the two keep for their backwards is never there together."""
        ...

    def loss(self, batch: MicroBatch) -> LossOutput:
        """The loss of the policy, and of a value head on it."""
        ...


# ---------------------------------------------------------------- the policy's part of a loss


@dataclass(frozen=True, slots=True)
class PolicyForward:
    """What the policy says of a micro-batch now. Both 0 where the mask is False."""

    inputs: HeadInputs  # what its head was given at the N counted positions
    logp: Tensor  # (B, T) log π(a_t | s_t)
    entropy: Tensor  # (B, T) of π(· | s_t), nats; without a gradient where it is not rewarded
    routed: experts.Routed  # the balancing loss of its experts, where it has one


def policy_forward(setup: Setup[OnPolicy], batch: MicroBatch) -> PolicyForward:
    """One forward of the policy. No gradient reaches it unless it learns."""
    config, roles = setup.config, setup.roles
    with torch.set_grad_enabled(batch.policy_learns), experts.collecting(roles.policy) as routed:
        hidden = roles.value_head is not None
        inputs = head_inputs(roles.policy, batch.ids, batch.index, hidden=hidden, lengths=batch.lengths)
        logp, entropy, _ = token_logprobs(
            inputs, batch.tokens, config.sampling.temperature, entropy=True, vocab=setup.vocab
        )
    entropy = entropy if config.entropy_coef > 0 else entropy.detach()
    logp, entropy = scatter_to_mask(logp, batch.mask), scatter_to_mask(entropy, batch.mask)
    return PolicyForward(inputs, logp, entropy, routed)


def policy_output(
    config: OnPolicy, surrogate: Surrogate, batch: MicroBatch, now: PolicyForward
) -> LossOutput:
    """The policy's loss, with c_H `entropy_coef` and β the KL coefficient, 0 unless `kl.where` is "loss":

        L = L_policy − c_H H + β KL(π ‖ π_ref)

    and with the balancing loss of a mixture of experts, where the policy has one (`models.experts`).
    Each is normalised alike, by the `masked.count` of the mini-batch. now: of the same micro-batch.
    """
    reduce, mask, denominator = config.reduction, batch.mask, batch.denominator
    mismatch, old_logp = LogprobMismatch(), batch.old_logp
    if batch.on_policy:  # π_old is π: the ratio is exactly 1, whatever rounding is between the two
        mismatch, old_logp = LogprobMismatch.between(now.logp, old_logp, mask), now.logp.detach()
    policy_loss, measured = surrogate(now.logp, old_logp, batch)
    loss = policy_loss - config.entropy_coef * reduced(now.entropy, mask, reduce, denominator)
    if config.kl.where == "loss" and batch.kl_coef > 0:
        estimate = kl.estimate(now.logp, batch.ref_logp, config.kl.estimator, mask)
        loss = loss + batch.kl_coef * reduced(estimate, mask, reduce, denominator)
    loss, of_experts = now.routed.added_to(loss, masked.count(mask, reduce) / denominator)
    per_token: Reduction = "token" if reduce == "token" else "sequence"
    known = ("approxkl", "approxkl_k3", "ratio", "ratio_var", "clipfrac")
    return LossOutput(
        loss, policy_loss.detach(), measured["approxkl"], measured["approxkl_k3"],
        reduced(now.entropy.detach(), mask, per_token, denominator), measured["ratio"], measured["ratio_var"],
        measured.get("clipfrac"), mismatch=mismatch,
        extra={name: value for name, value in measured.items() if name not in known} | of_experts,
    )  # fmt: skip


class Surrogate:
    """The policy loss that a config names, with its settings: L_policy of a micro-batch."""

    def __init__(self, config: OnPolicy, stage: str) -> None:
        """stage: its name, for messages. UsageError where the config names no policy loss."""
        self.what = f"{stage}: policy loss {config.policy_loss!r}"
        self.reduction: Reduction = config.reduction
        self.function = methods.policy_loss(
            config.policy_loss, config.loss_settings(), config.policy_loss_args
        )
        tensors = methods.LOSS_TENSORS
        self.tensors = tuple(name for name in tensors if methods.takes(self.function.func, name))
        self.own = not methods.is_plugin("keel.policy_losses", config.policy_loss)

    def __call__(self, logp: Tensor, old_logp: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, (), and what it measured; logp, old_logp: (B, T). UsageError for a loss that is no number
        to take a gradient of, NotFiniteError for one that is NaN or infinite; of one rank of several its
        gradient is NaN, so that all of them raise it at the step."""
        offered = {"denominator": batch.denominator, "ref_logp": batch.ref_logp, "weights": batch.weights}
        passed = {name: offered[name] for name in self.tensors}
        returned = self.function(logp, old_logp, batch.advantages, batch.mask, **passed)
        if self.own:
            loss, measured = returned
            return loss, {name: value for name, value in measured.items() if name != "dual_clipfrac"}
        loss, measured = self._checked(returned, logp)
        far = policy.divergence(logp, old_logp, batch.mask, self.reduction, batch.denominator)
        return loss, {**far, **measured}

    def _checked(self, returned: object, logp: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        what = self.what
        if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping)):
            raise UsageError(f"{what} must return (loss, metrics), not {type(returned).__name__}")
        loss, measured = returned
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            shape = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UsageError(
                f"{what} must return a loss of shape (), not one {shape}: divide by `denominator`"
            )
        if logp.requires_grad and not loss.requires_grad:
            raise UsageError(f"{what} returned a loss without a gradient: it must depend on `logp`")
        if not math.isfinite(float(loss.detach())):
            if group.size() == 1:
                raise NotFiniteError(f"{what} is {float(loss.detach())}")
            loss = math.nan * logp.sum()  # the others know nothing of it: all meet it in the step's gradient
        metrics = {str(name): torch.as_tensor(value).detach() for name, value in measured.items()}
        if wrong := next((name for name, value in metrics.items() if value.dim() != 0), None):
            raise UsageError(
                f"{what}: the metric {wrong!r} must have shape (), not {tuple(metrics[wrong].shape)}"
            )
        return loss, metrics


# ---------------------------------------------------------------- an estimator by name


def estimated(
    setup: Setup[OnPolicy], name: str, rewards: Tensor, values: Tensor | None, mask: Tensor
) -> Advantages:
    """What the estimator called `name` makes of (B, T) rewards, 0 where the mask is False.

    values: (B, T); None without a critic. UsageError for something else than `Advantages` of that shape,
    NotFiniteError for a number that is NaN or infinite where the mask is True.
    """
    config = setup.config
    estimator = methods.estimator(name, config.advantage_settings(), config.advantage_args)
    passed = {"values": values} if methods.takes(estimator.func, "values") else {}
    returned = estimator(rewards, mask, **passed)
    if not methods.is_plugin("keel.advantages", name):
        return returned
    what = f"{setup.run.name}: advantage estimator {name!r}"
    if not isinstance(returned, Advantages):
        raise UsageError(
            f"{what} must return keel.algorithms.advantages.Advantages, not {type(returned).__name__}"
        )
    columns: list[Tensor] = []
    for label, column in (("advantages", returned.advantages), ("returns", returned.returns)):
        if tuple(column.shape) != tuple(mask.shape):
            raise UsageError(
                f"{what}: `{label}` must have the shape {tuple(mask.shape)} of the mask,"
                f" not {tuple(column.shape)}"
            )
        column = torch.where(mask, column.detach(), 0.0)
        if not bool(column.isfinite().all()):
            raise NotFiniteError(f"{what}: `{label}` are not finite")
        columns.append(column)
    return Advantages(*columns)
