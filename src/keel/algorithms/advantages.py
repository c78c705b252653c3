"""From rewards to advantages. Everything here is a constant to the losses: no gradient flows through it.

`ESTIMATORS` are what a config's `advantage` may name. To add one, write a function as `Estimator` says and
put it there; or leave it in a package of your own (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from keel.algorithms.masked import at_least_float32, keep


@dataclass(frozen=True, slots=True)
class Advantages:
    """What an estimator returns."""

    advantages: Tensor  # (B, T) Â_t, 0 where the mask is False
    returns: Tensor  # (B, T) R_t, what a critic learns to predict; 0 where the mask is False


Estimator = Callable[..., Advantages]
"""`f(rewards, mask, *, values=None, group_size=1, gamma, lam, **settings) -> Advantages`.

rewards: (B, T) of each token, the KL penalty included where it is part of the reward. mask: (B, T).
values: (B, T) V(s_t), None without a critic. group_size: G; rows i·G … i·G + G − 1 are samples of one prompt.
gamma, lam: γ and λ. An estimator takes those keywords that it needs, and may take settings of its own.
"""


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (1506.02438, eq. 16).

        δ_t = r_t + γ V(s_{t+1}) − V(s_t)        Â_t = δ_t + γλ Â_{t+1}        R_t = Â_t + V(s_t)

    t+1 is the next *counted* position of the row; after the last one V and Â are 0, since the response has
    ended. So padding, and holes in the mask, are as if they were not there.

    rewards, values, mask: (B, T). Returns (advantages, returns), each (B, T) and 0 where the mask is False.
    """
    rewards, values = keep(rewards.detach(), mask), keep(values.detach(), mask)
    advantages = torch.zeros_like(rewards + values)
    next_value = next_advantage = advantages.new_zeros(len(mask))
    for t in reversed(range(rewards.shape[1])):
        counts = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(counts, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(counts, values[:, t], next_value)
        advantages[:, t] = torch.where(counts, next_advantage, 0.0)
    return advantages, advantages + values


def group_relative(
    rewards: Tensor, group_size: int, scale: Literal["group", "batch", "none"] = "group"
) -> Tensor:
    """Advantages relative to the group's mean: Â_i = (r_i − mean(r)) / (std(r) + 1e-4) (GRPO, 2402.03300).

    scale: "group" divides by each group's standard deviation, "batch" by that of all rewards of the call
    (2508.08221), "none" by nothing (Dr. GRPO, 2503.20783). The standard deviation is the sample's (n − 1) and
    1e-4 is added to it; the paper says neither, and this is what TRL does.

    rewards: (B,), the members of a group next to each other. Returns (B,). A group whose rewards are all
    equal, and so a group of one, gets exactly 0: it has nothing to learn from.
    Raises ValueError if a reward is not finite, or B is not a multiple of group_size.
    """
    groups = _groups(rewards, group_size)
    centred = _centred(groups)
    match scale:
        case "group":
            deviation = groups.std(dim=1, keepdim=True) if group_size > 1 else torch.zeros_like(groups)
        case "batch":
            deviation = groups.std() if groups.numel() > 1 else torch.zeros_like(groups)
        case "none":
            return centred.flatten()
        case _:
            raise ValueError(f'scale must be "group", "batch" or "none", not {scale!r}')
    return (centred / (deviation + 1e-4)).flatten()


def leave_one_out(rewards: Tensor, group_size: int) -> Tensor:
    """Â_i = r_i − mean of the group's *other* rewards (RLOO, 2402.14740).

    rewards: (B,), the members of a group next to each other. Returns (B,); exactly 0 where a group's rewards
    are all equal. Raises ValueError if group_size is below 2, a reward is not finite, or B is not a multiple
    of it.
    """
    if group_size < 2:
        raise ValueError(
            f"leave-one-out needs groups of 2 or more, not {group_size}: a lone sample has no peers"
        )
    groups = _groups(rewards, group_size)
    return (_centred(groups) * (group_size / (group_size - 1))).flatten()  # r − (Σ − r)/(G − 1)


def _groups(rewards: Tensor, group_size: int) -> Tensor:
    """(B,) → (B / group_size, group_size), checked."""
    if rewards.dim() != 1:
        raise ValueError(f"rewards must be one number a sequence, (B,), not {tuple(rewards.shape)}")
    if group_size < 1 or rewards.numel() % group_size:
        raise ValueError(f"{rewards.numel()} rewards do not make groups of {group_size}")
    if not torch.isfinite(rewards).all():
        bad = (~torch.isfinite(rewards)).nonzero().flatten().tolist()
        raise ValueError(f"rewards that are not finite, at {bad}: one would spoil its whole group")
    return at_least_float32(rewards.detach()).view(-1, group_size)


def _centred(groups: Tensor) -> Tensor:
    """r − mean of its group; exactly 0 in a group of equals, where rounding the mean would leave noise."""
    equal = groups.amax(dim=1, keepdim=True) == groups.amin(dim=1, keepdim=True)
    return torch.where(equal, 0.0, groups - groups.mean(dim=1, keepdim=True))


def by_gae(
    rewards: Tensor, mask: Tensor, *, values: Tensor | None = None, gamma: float = 1.0, lam: float = 0.95
) -> Advantages:
    """`gae` as an `Estimator`. values None: V = 0, and with λ = 1 the advantages are the returns to go."""
    advantages, returns = gae(
        rewards, torch.zeros_like(rewards) if values is None else values, mask, gamma, lam
    )
    return Advantages(advantages, returns)


def by_group_mean(
    rewards: Tensor, mask: Tensor, *, group_size: int, scale: Literal["group", "batch", "none"] = "group"
) -> Advantages:
    """`group_relative` as an `Estimator`, of each response's summed reward; the same at all its tokens.

    Returns are the rewards to go. Raises ValueError as `group_relative` does.
    """
    return _of_responses(rewards, mask, group_relative(keep(rewards, mask).sum(dim=1), group_size, scale))


def by_leave_one_out(rewards: Tensor, mask: Tensor, *, group_size: int) -> Advantages:
    """`leave_one_out` as an `Estimator`, of each response's summed reward; the same at all its tokens.

    Returns are the rewards to go. Raises ValueError as `leave_one_out` does.
    """
    return _of_responses(rewards, mask, leave_one_out(keep(rewards, mask).sum(dim=1), group_size))


def _of_responses(rewards: Tensor, mask: Tensor, advantages: Tensor) -> Advantages:
    """(B,) advantages at every token; rewards, mask: (B, T)."""
    to_go, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma=1.0, lam=1.0)
    return Advantages(torch.where(mask, advantages[:, None], 0.0), to_go)


ESTIMATORS: Mapping[str, Estimator] = {
    "gae": by_gae,
    "group_relative": by_group_mean,
    "leave_one_out": by_leave_one_out,
}
