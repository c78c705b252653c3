"""Advantages against arrays worked out by hand, and the limits they reduce to."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from keel.algorithms import advantages

NAN, INF = float("nan"), float("inf")


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# γ = λ = 1/2, so γλ = 1/4.
# Row 0, three tokens, r = 1, 0, 2, V = 2, 4, 1:
#   δ2 = 2 + 0 - 1 = 1             Â2 = 1
#   δ1 = 0 + ½·1 - 4 = -3.5        Â1 = -3.5 + ¼·1 = -3.25
#   δ0 = 1 + ½·4 - 2 = 1           Â0 = 1 + ¼·(-3.25) = 0.1875
#   R = Â + V = 2.1875, 0.75, 2
# Row 1, one token, r = 3, V = 1: Â = 3 - 1 = 2, R = 3.   Row 2, none: zeros.
MASK = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
ADVANTAGES = [[0.1875, -3.25, 1.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
RETURNS = [[2.1875, 0.75, 2.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def batch(filler: float) -> tuple[Tensor, Tensor]:
    rewards = f64([[1.0, 0.0, 2.0], [3.0, filler, filler], [filler] * 3])
    values = f64([[2.0, 4.0, 1.0], [1.0, filler, filler], [filler] * 3])
    return rewards, values


def test_gae_by_hand() -> None:
    a, r = advantages.gae(*batch(0.0), MASK, gamma=0.5, lam=0.5)
    assert a.tolist() == ADVANTAGES
    assert r.tolist() == RETURNS


@pytest.mark.parametrize("filler", [NAN, INF, -INF, 1e9])
def test_trap_05_values_at_padding_do_not_bootstrap_into_valid_tokens(filler: float) -> None:
    a, r = advantages.gae(*batch(filler), MASK, gamma=0.5, lam=0.5)
    assert a.tolist() == ADVANTAGES
    assert r.tolist() == RETURNS


def test_trap_06_gae_of_rows_of_different_lengths_is_that_of_each_row_alone() -> None:
    rewards, values = batch(9.0)
    for row, length in ((0, 3), (1, 1)):
        a, _ = advantages.gae(
            rewards[row : row + 1, :length],
            values[row : row + 1, :length],
            MASK[row : row + 1, :length],
            0.5,
            0.5,
        )
        assert a[0].tolist() == ADVANTAGES[row][:length]


def test_trap_07_a_reward_at_the_last_token_reaches_all_before_it_and_one_at_the_first_pad_none() -> None:
    mask, values = torch.tensor([[True, True, False]]), torch.zeros(1, 3)
    a, _ = advantages.gae(torch.tensor([[0.0, 1.0, 0.0]]), values, mask, gamma=1.0, lam=1.0)
    assert a.tolist() == [[1.0, 1.0, 0.0]]
    a, _ = advantages.gae(torch.tensor([[0.0, 0.0, 1.0]]), values, mask, gamma=1.0, lam=1.0)
    assert a.tolist() == [[0.0, 0.0, 0.0]]


def test_gae_steps_over_holes_in_the_mask() -> None:
    # row 0 of above with a position that does not count between its second and third token
    rewards, values = f64([[1.0, 0.0, NAN, 2.0]]), f64([[2.0, 4.0, NAN, 1.0]])
    a, r = advantages.gae(rewards, values, torch.tensor([[True, True, False, True]]), 0.5, 0.5)
    assert a.tolist() == [[0.1875, -3.25, 0.0, 1.0]]
    assert r.tolist() == [[2.1875, 0.75, 0.0, 2.0]]


def test_gae_of_no_positions_is_empty() -> None:
    a, r = advantages.gae(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool))
    assert a.shape == r.shape == (2, 0)


FLOATS = st.floats(-10, 10)
EPISODES = st.lists(st.tuples(FLOATS, FLOATS), min_size=1, max_size=6)


@given(EPISODES, st.floats(0, 1), st.floats(0, 1))
def test_gae_reduces_to_returns_to_go_and_to_the_td_error(
    episode: list[tuple[float, float]], gamma: float, other: float
) -> None:
    n, r, v = len(episode), [e[0] for e in episode], [e[1] for e in episode]
    rewards, values = f64([[*r, NAN]]), f64([[*v, NAN]])
    mask = torch.tensor([[True] * n + [False]])
    # λ = 1: discounted returns to go minus V; the returns do not depend on V at all
    to_go = [sum(gamma ** (k - t) * r[k] for k in range(t, n)) for t in range(n)]
    a, returns = advantages.gae(rewards, values, mask, gamma, lam=1.0)
    assert returns[0, :n].tolist() == pytest.approx(to_go, abs=1e-9)
    assert a[0, :n].tolist() == pytest.approx([g - b for g, b in zip(to_go, v)], abs=1e-9)
    # λ = 0: the one-step TD error
    delta = [r[t] + gamma * (v[t + 1] if t + 1 < n else 0.0) - v[t] for t in range(n)]
    a, _ = advantages.gae(rewards, values, mask, gamma, lam=0.0)
    assert a[0, :n].tolist() == pytest.approx(delta, abs=1e-9)
    # any λ: the sum of discounted TD errors, written out instead of recursed
    a, _ = advantages.gae(rewards, values, mask, gamma, other)
    summed = [sum((gamma * other) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]
    assert a[0, :n].tolist() == pytest.approx(summed, abs=1e-8)


def test_gae_carries_no_gradient() -> None:
    values = torch.zeros(1, 2, requires_grad=True)
    a, r = advantages.gae(torch.ones(1, 2), values, torch.ones(1, 2, dtype=torch.bool))
    assert not a.requires_grad
    assert not r.requires_grad


def test_group_relative_by_hand() -> None:
    rewards = f64(
        [1.0, 3.0, 2.0, 6.0]
    )  # groups (1, 3) and (2, 6): means 2 and 4; standard deviations √2 and √8
    one, two = 1 / (math.sqrt(2) + 1e-4), 2 / (math.sqrt(8) + 1e-4)
    assert advantages.group_relative(rewards, 2).tolist() == pytest.approx([-one, one, -two, two])
    # all four: mean 3, squares 4 + 0 + 1 + 9 = 14, over n - 1 = 3
    deviation = math.sqrt(14 / 3) + 1e-4
    assert advantages.group_relative(rewards, 2, "batch").tolist() == pytest.approx(
        [-1 / deviation, 1 / deviation, -2 / deviation, 2 / deviation]
    )
    assert advantages.group_relative(rewards, 2, "none").tolist() == [-1.0, 1.0, -2.0, 2.0]


@given(st.lists(st.floats(-100, 100), min_size=6, max_size=6))
def test_grpo_without_scaling_is_dr_grpo_and_scaled_it_differs_by_one_factor_a_group(
    rewards: list[float],
) -> None:
    plain = advantages.group_relative(f64(rewards), 3, "none")
    dr_grpo = [r - math.fsum(g) / 3 for g in (rewards[:3], rewards[3:]) for r in g]
    assert plain.tolist() == pytest.approx(dr_grpo, abs=1e-9)
    scaled = advantages.group_relative(f64(rewards), 3)
    for group, own, centred in zip((rewards[:3], rewards[3:]), scaled.view(2, 3), plain.view(2, 3)):
        mean = math.fsum(group) / 3
        deviation = math.sqrt(math.fsum((r - mean) ** 2 for r in group) / 2)
        assert (own * (deviation + 1e-4)).tolist() == pytest.approx(centred.tolist(), abs=1e-7)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_trap_20_a_group_of_one_has_advantage_0_and_not_its_raw_score(scale: str) -> None:
    out = advantages.group_relative(torch.tensor([5.0, -2.0]), 1, scale)
    assert out.tolist() == [0.0, 0.0]
    alone = advantages.group_relative(torch.tensor([5.0]), 1, scale)
    assert alone.tolist() == [0.0]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_trap_22_a_group_of_equal_rewards_has_advantage_exactly_0(scale: str) -> None:
    # float32: the mean of seven times 1000.1 is not 1000.1, and a small deviation would blow the error up
    rewards = torch.tensor([1000.1] * 7 + [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    out = advantages.group_relative(rewards, 7, scale)
    assert out[:7].tolist() == [0.0] * 7
    assert out[7:].abs().min().item() == 0.0  # the middle one
    assert out[7:].abs().max().item() > 0.0
    assert advantages.leave_one_out(rewards, 7)[:7].tolist() == [0.0] * 7


def test_leave_one_out_by_hand() -> None:
    # 1 - (3+5)/2, 3 - (1+5)/2, 5 - (1+3)/2
    assert advantages.leave_one_out(f64([1.0, 3.0, 5.0]), 3).tolist() == pytest.approx([-3.0, 0.0, 3.0])
    assert advantages.leave_one_out(f64([1.0, 3.0, 0.0, 4.0]), 2).tolist() == pytest.approx([-2, 2, -4, 4])


def test_groups_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite, at \\[1\\]"):
        advantages.group_relative(torch.tensor([0.0, NAN]), 2)
    with pytest.raises(ValueError, match="not finite"):
        advantages.leave_one_out(torch.tensor([0.0, NAN]), 2)
    with pytest.raises(ValueError, match="no peers"):
        advantages.leave_one_out(torch.tensor([0.0, 1.0]), 1)
    with pytest.raises(ValueError, match="3 rewards do not make groups of 2"):
        advantages.group_relative(torch.zeros(3), 2)
    with pytest.raises(ValueError, match="one number a sequence"):
        advantages.group_relative(torch.zeros(2, 2), 2)
    with pytest.raises(ValueError, match="scale"):
        advantages.group_relative(torch.zeros(2), 2, "std")
