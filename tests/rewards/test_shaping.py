"""From scores to rewards, worked out by hand."""

from __future__ import annotations

import pytest
import torch

from keel.rewards.shaping import RunningScale, terminal_rewards, token_rewards

ENDED = torch.tensor([True, True, False, True])
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()


def test_normalise_then_clip_then_the_penalty_for_a_missing_stop() -> None:
    scores = torch.tensor([3.0, 40.0, 40.0, -60.0])
    shaped = terminal_rewards(scores, ENDED, mean=1.0, std=2.0, clip=5.0, missing_stop_penalty=1.5)
    assert shaped.tolist() == [1.0, 5.0, 3.5, -5.0]


def test_without_settings_a_reward_is_its_score() -> None:
    scores = torch.tensor([3.0, 40.0, -1.0, -60.0])
    assert terminal_rewards(scores, ENDED).tolist() == scores.tolist()


def test_centring_takes_the_mean_of_the_prompts_other_samples_away() -> None:
    shaped = terminal_rewards(
        torch.tensor([1.0, 2.0, 6.0, 4.0, 4.0, 4.0]), torch.ones(6).bool(), center="prompt", group_size=3
    )
    assert shaped.tolist() == [1 - 4, 2 - 3.5, 6 - 1.5, 0, 0, 0]


def test_trap_19_rewards_are_clipped_before_the_baseline_is_subtracted() -> None:
    """The clip bounds 10 and −10 at 5 and −5; leave-one-out then makes ±10 of them, which nothing clips
    again."""
    shaped = terminal_rewards(
        torch.tensor([10.0, -10.0]), torch.ones(2).bool(), clip=5.0, center="prompt", group_size=2
    )
    assert shaped.tolist() == [10.0, -10.0]


def test_a_prompts_offset_changes_nothing_when_centred_even_where_the_clip_binds() -> None:
    scores, ended = torch.tensor([0.0, 1.0, 12.0, 3.0]), torch.ones(4).bool()
    settings = {"clip": 2.0, "center": "prompt", "group_size": 2, "missing_stop_penalty": 1.0}
    plain = terminal_rewards(scores, ended, **settings)
    moved = terminal_rewards(scores + torch.tensor([100.0, 100.0, -40.0, -40.0]), ended, **settings)
    assert plain.tolist() == moved.tolist() == [-1.0, 1.0, 4.0, -4.0]


def test_trap_07_the_terminal_reward_lands_on_the_last_response_token() -> None:
    rewards = token_rewards(torch.tensor([5.0, 6.0, 7.0]), MASK, None, 0.1)
    assert rewards.tolist() == [[0, 0, 5], [6, 0, 0], [0, 7, 0]]


def test_trap_16_the_kl_penalty_is_subtracted_at_every_token_and_at_no_pad() -> None:
    kl = torch.tensor([[1.0, 2.0, -3.0], [4.0, 99.0, float("nan")], [0.5, 1.0, float("inf")]])
    rewards = token_rewards(torch.zeros(3), MASK, kl, 0.5)
    assert rewards.tolist() == [[-0.5, -1.0, 1.5], [-2.0, 0, 0], [-0.25, -0.5, 0]]


def test_the_running_scale_is_that_of_all_scores_seen() -> None:
    batches = [torch.tensor([1.0, 2.0]), torch.tensor([10.0]), torch.tensor([-4.0, 0.5, 3.0])]
    scale = RunningScale()
    assert scale.std == 1.0
    for batch in batches:
        scale = scale.update(batch)
    whole = torch.cat(batches).double()
    assert scale.mean == pytest.approx(whole.mean().item(), rel=1e-12)
    assert scale.std == pytest.approx(whole.std().item(), rel=1e-12)
    assert RunningScale().update(torch.tensor([3.0, 3.0])).std == 1.0
