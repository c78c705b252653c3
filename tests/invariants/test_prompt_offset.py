"""A constant added to all rewards of a prompt says nothing (Bradley–Terry learns differences), so it changes
no advantage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from keel.algorithms.advantages import gae, group_relative, leave_one_out
from keel.rewards.shaping import terminal_rewards, token_rewards

PROMPTS, SAMPLES, STEPS = 6, 4, 5
N = PROMPTS * SAMPLES


def drawn(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scores, offsets (one a prompt), who ended, masks, KLs and values of the responses."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(N, generator=g, dtype=torch.float64)
    offsets = (10 * torch.randn(PROMPTS, generator=g, dtype=torch.float64)).repeat_interleave(SAMPLES)
    ended = torch.rand(N, generator=g) < 0.8
    mask = torch.arange(STEPS) < torch.randint(1, STEPS + 1, (N, 1), generator=g)
    kl, values = (torch.randn(N, STEPS, generator=g, dtype=torch.float64) for _ in range(2))
    return scores, offsets, ended, mask, kl, values


def ppo(scores: Tensor, rest: tuple[Tensor, ...], center: Any, clip: float | None) -> Tensor:
    """PPO's advantages, from raw scores on."""
    ended, mask, kl, values = rest
    terminal = terminal_rewards(
        scores,
        ended,
        mean=0.7,
        std=1.9,
        clip=clip,
        missing_stop_penalty=1.0,
        center=center,
        group_size=SAMPLES,
    )
    return gae(token_rewards(terminal, mask, kl, 0.1), values, mask)[0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("clip", [None, 0.4, 3.0])
def test_ppo_with_centring_by_prompt(clip: float | None, seed: int) -> None:
    scores, offsets, *rest = drawn(seed)
    plain, moved = (ppo(s, tuple(rest), "prompt", clip) for s in (scores, scores + offsets))
    torch.testing.assert_close(moved, plain, rtol=0, atol=1e-12)
    assert plain.abs().max() > 0.1


def test_ppo_without_centring_feels_it() -> None:
    scores, offsets, *rest = drawn(0)
    plain, moved = (ppo(s, tuple(rest), "none", None) for s in (scores, scores + offsets))
    assert (moved - plain).abs().max() > 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scale", ["group", "none"])
def test_grpo(scale: Any, seed: int) -> None:
    scores, offsets, ended, *_ = drawn(seed)
    plain, moved = (
        group_relative(terminal_rewards(s, ended, std=1.9, missing_stop_penalty=1.0), SAMPLES, scale)
        for s in (scores, scores + offsets)
    )
    torch.testing.assert_close(moved, plain, rtol=0, atol=1e-12)
    assert plain.abs().max() > 0.1


@pytest.mark.parametrize("seed", range(5))
def test_rloo(seed: int) -> None:
    scores, offsets, *_ = drawn(seed)
    torch.testing.assert_close(
        leave_one_out(scores + offsets, SAMPLES), leave_one_out(scores, SAMPLES), rtol=0, atol=1e-12
    )


def test_grpo_scaled_by_the_batch_keeps_its_direction_only() -> None:
    """The paper's scale (2508.08221) is the deviation of all rewards of the batch, to which offsets
    belong."""
    scores, offsets, *_ = drawn(1)
    plain, moved = (group_relative(s, SAMPLES, "batch") for s in (scores, scores + offsets))
    torch.testing.assert_close(moved / moved.norm(), plain / plain.norm(), rtol=0, atol=1e-12)
    assert moved.norm() < 0.5 * plain.norm()
