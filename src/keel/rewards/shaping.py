"""From a score to the rewards of each token. The order matters and is fixed here: normalise → clip →
missing-stop penalty → leave-one-out within the prompt, if asked → last token; then −β·KL at every token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from keel.algorithms.advantages import leave_one_out
from keel.algorithms.masked import extent


@dataclass(frozen=True, slots=True)
class RunningScale:
    """Mean and variance of all scores seen (Chan's parallel form); part of the checkpoint."""

    count: float = 0.0
    mean: float = 0.0
    spread: float = 0.0  # sum of squared deviations

    def update(self, scores: Tensor) -> RunningScale:
        """With (B,) more scores."""
        values = scores.double()
        n, mean = values.numel(), values.mean().item()
        spread, delta, total = (values - mean).square().sum().item(), mean - self.mean, self.count + n
        return replace(
            self,
            count=total,
            mean=self.mean + delta * n / total,
            spread=self.spread + spread + delta**2 * self.count * n / total,
        )

    @property
    def std(self) -> float:
        """Standard deviation; 1 until two different scores were seen."""
        return (self.spread / (self.count - 1)) ** 0.5 if self.count > 1 and self.spread > 0 else 1.0


def terminal_rewards(
    scores: Tensor,
    ended: Tensor,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    clip: float | None = None,
    missing_stop_penalty: float = 0.0,
    center: Literal["none", "prompt"] = "none",
    group_size: int = 1,
    unclipped: Tensor | None = None,
) -> Tensor:
    """(B,) scores → (B,) rewards of whole responses.

    unclipped: (B,) what is added after the clip, such as rules, which say what they mean at any size.

    ended: (B,) True where the response stopped by itself (EOS or a stop string), whatever the stop token is.
    center "prompt": minus the mean of the prompt's other samples, so that a constant added to all scores of a
    prompt changes nothing. For that the clip then bounds the distance to the prompt's mean, not the score
    itself.
    """
    rewards = (scores - mean) / std
    if clip is not None:
        if (
            center == "prompt"
        ):  # the clip is meant for outliers, so an offset of the prompt must not decide what is one
            rewards = rewards - rewards.view(-1, group_size).mean(dim=1).repeat_interleave(group_size)
        rewards = rewards.clamp(-clip, clip)
    if unclipped is not None:
        rewards = rewards + unclipped
    rewards = rewards - missing_stop_penalty * (~ended).to(rewards.dtype)
    return leave_one_out(rewards, group_size) if center == "prompt" else rewards


def token_rewards(
    terminal: Tensor, mask: Tensor, kl: Tensor | None, coef: float, early: Tensor | None = None
) -> Tensor:
    """(B,) → (B, T): the terminal reward at the last response token, −coef·kl at each; 0 where the mask is
    False.

    early: (B, T) the part of `terminal` that is paid before the end, where it is paid; 0 elsewhere.
    """
    rewards = torch.zeros(mask.shape, dtype=terminal.dtype, device=terminal.device)
    if kl is not None:
        rewards = torch.where(mask, -coef * kl.to(terminal.dtype), 0.0)
    if early is not None:
        rewards = rewards + early
        terminal = terminal - early.sum(dim=1)
    last = (extent(mask) - 1).clamp(min=0)
    rows = torch.arange(mask.shape[0], device=mask.device)
    rewards[rows, last] += terminal
    return torch.where(mask, rewards, 0.0)
