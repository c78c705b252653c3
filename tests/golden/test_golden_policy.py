"""The clipped policy loss and value loss against arrays worked out by hand, and what they reduce to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from keel.algorithms import advantages, policy, value

NAN = float("nan")


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ratio       1.5   1.0   0.5  |  2.0   0.9   pad
# advantage     1     2    -1  |   -1     2   pad
# ρÂ          1.5   2.0  -0.5  | -2.0   1.8
# clipped Â   1.2   2.0  -0.8  | -1.2   1.8          (ε = 0.2)
# min         1.2   2.0  -0.8  | -2.0   1.8          row sums 2.4 and -0.2, all 2.2
RATIO = [[1.5, 1.0, 0.5], [2.0, 0.9, NAN]]
ADVANTAGES = [[1.0, 2.0, -1.0], [-1.0, 2.0, NAN]]
MASK = torch.tensor([[True, True, True], [True, True, False]])


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    old = f64([[-1.0, -2.0, -0.5], [-3.0, -0.1, NAN]])
    return (old + f64(RATIO).log()).requires_grad_(), old, f64(ADVANTAGES), MASK


def gradient(loss: Tensor, logp: Tensor) -> list[list[float]]:
    (out,) = torch.autograd.grad(loss, logp)
    return out.tolist()


def approx(rows: list[list[float]]) -> list[object]:
    return [pytest.approx(row, abs=1e-12) for row in rows]


@pytest.mark.parametrize(
    ("reduce", "by_hand"),
    [("token", -2.2 / 5), ("sequence", -(2.4 / 3 - 0.2 / 2) / 2), (4, -(2.4 / 4 - 0.2 / 4) / 2)],
)
def test_clipped_by_hand_in_every_reduction(reduce: str | int, by_hand: float) -> None:
    loss, _ = policy.clipped(*inputs(), reduce=reduce)
    assert loss.item() == pytest.approx(by_hand)


def test_gradient_of_clipped_by_hand() -> None:
    logp, *rest = inputs()
    loss, _ = policy.clipped(logp, *rest)
    # -ρÂ/5 where the clip is not active, else 0
    assert gradient(loss, logp) == approx([[0.0, -0.4, 0.0], [0.4, -0.36, 0.0]])
    loss, _ = policy.clipped(logp, *rest, reduce="sequence")
    # -ρÂ/(2·length)
    assert gradient(loss, logp) == approx([[0.0, -2 / 6, 0.0], [2 / 4, -1.8 / 4, 0.0]])


def test_metrics_by_hand() -> None:
    _, metrics = policy.clipped(*inputs(), dual_clip=1.5)
    logs = [math.log(r) for r in (1.5, 1.0, 0.5, 2.0, 0.9)]
    by_hand = {
        "clipfrac": 2 / 5,  # the first and the third
        "dual_clipfrac": 1 / 5,  # the fourth
        "approxkl": sum(x * x for x in logs) / 2 / 5,
        "approxkl_k3": (5.9 - 5 - math.log(1.35)) / 5,  # Σρ = 5.9, Πρ = 1.35
        "ratio": 5.9 / 5,
        "ratio_var": (0.25 + 0 + 0.25 + 1 + 0.01) / 5,
    }
    assert {name: x.item() for name, x in metrics.items()} == pytest.approx(by_hand)
    assert all(x.dim() == 0 and not x.requires_grad for x in metrics.values())


def test_metrics_are_means_whatever_the_reduction_of_the_loss() -> None:
    for reduce in ("sequence", 7):
        _, metrics = policy.clipped(*inputs(), reduce=reduce)
        assert metrics["ratio"].item() == pytest.approx((3.0 / 3 + 2.9 / 2) / 2)


def test_dual_clip_by_hand() -> None:
    logp, *rest = inputs()
    loss, _ = policy.clipped(logp, *rest, dual_clip=1.5)
    # the fourth: max(-2, 1.5·(-1)) = -1.5, so the sum is 2.7, and it has no gradient any more
    assert loss.item() == pytest.approx(-2.7 / 5)
    assert gradient(loss, logp) == approx([[0.0, -0.4, 0.0], [0.0, -0.36, 0.0]])
    with pytest.raises(ValueError, match="dual_clip"):
        policy.clipped(logp, *rest, dual_clip=1.0)


def test_clip_bounds_are_separate() -> None:
    # upper 1.3 for the first, lower 0.9 for the third: each alone, since their sum would hide a swap
    for position, by_hand in ((0, -1.3), (2, 0.9)):
        one = torch.zeros_like(MASK)
        one[0, position] = True
        loss, _ = policy.clipped(*inputs()[:3], one, clip_low=0.1, clip_high=0.3)
        assert loss.item() == pytest.approx(by_hand)


# Sequence ratios are geometric means: row 0 √(4·1) = 2, clipped to 1.2, Â = 1; row 1 √(0.81·1) = 0.9, Â = 2.
GSPO_RATIO, GSPO_MASK = [[4.0, 1.0, NAN], [0.81, 1.0, NAN]], torch.tensor([[True, True, False]] * 2)


def test_gspo_by_hand() -> None:
    logp = f64(GSPO_RATIO).log().requires_grad_()
    old = torch.zeros_like(logp)
    loss, metrics = policy.clipped(logp, old, f64([1.0, 2.0]), GSPO_MASK, level="sequence", reduce="sequence")
    assert loss.item() == pytest.approx(-(1.2 + 1.8) / 2)
    # row 1: s Â / 2 sequences, and each of its 2 tokens moves s by s/2: 0.9 · 2 / 2 / 2
    assert gradient(loss, logp) == approx([[0.0, 0.0, 0.0], [-0.45, -0.45, 0.0]])
    assert metrics["clipfrac"].item() == pytest.approx(0.5)
    assert metrics["ratio"].item() == pytest.approx(1.45)


def test_gspo_of_single_tokens_is_the_token_level() -> None:
    logp, old, a, mask = inputs()
    for t in range(2):
        column = [x[:, t : t + 1] for x in (logp, old, a, mask)]
        by_token, by_sequence = policy.clipped(*column), policy.clipped(*column, level="sequence")
        assert by_sequence[0].item() == pytest.approx(by_token[0].item())
        assert gradient(by_sequence[0], logp) == approx(gradient(by_token[0], logp))


def test_one_advantage_a_sequence_is_the_same_at_each_token() -> None:
    logp, old, _, mask = inputs()
    spread = f64([[3.0] * 3, [-1.0] * 3])
    whole, _ = policy.clipped(logp, old, spread[:, 0], mask)
    each, _ = policy.clipped(logp, old, spread, mask)
    assert whole.item() == each.item()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_trap_11_at_equal_log_probabilities_the_ratio_is_exactly_1_and_nothing_clips(level: str) -> None:
    _, old, a, mask = inputs()
    _, metrics = policy.clipped(old.float(), old.float(), a.float(), mask, level=level)
    assert metrics["ratio"].item() == 1.0
    for name in ("clipfrac", "approxkl", "approxkl_k3", "ratio_var"):
        assert metrics[name].item() == 0.0


def test_ppo_at_ratio_1_is_reinforce_with_baseline() -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits.requires_grad_()
    ids = torch.tensor([[0, 4, 2], [3, 3, 1]])
    rewards, baseline = f64([[0.0, 0.0, 1.0], [0.0, -2.0, NAN]]), f64([[0.3, 0.1, 0.7], [-0.5, 0.2, NAN]])
    a, _ = advantages.gae(rewards, baseline, MASK, gamma=1.0, lam=1.0)
    logp = torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]
    loss, _ = policy.clipped(logp, logp.detach(), a, MASK)
    (ppo,) = torch.autograd.grad(loss, logits)
    # -Σ (return to go - baseline) (onehot - π) / 5, written out
    to_go = f64([[1.0, 1.0, 1.0], [-2.0, -2.0, 0.0]])
    weight = (to_go - baseline.nan_to_num()) * MASK / 5
    onehot = torch.nn.functional.one_hot(ids, 5)
    by_hand = -weight[..., None] * (onehot - torch.softmax(logits.detach(), -1))
    assert torch.allclose(ppo, by_hand, atol=1e-12)


def test_a_runaway_ratio_overflows_nothing() -> None:
    logp = torch.tensor([[500.0, -500.0, 500.0]], requires_grad=True)
    mask = torch.ones(1, 3, dtype=torch.bool)
    for dual_clip in (None, 3.0):
        loss, metrics = policy.clipped(
            logp, torch.zeros(1, 3), torch.tensor([[1.0, 1.0, -1.0]]), mask, dual_clip=dual_clip
        )
        (out,) = torch.autograd.grad(loss, logp)
        assert torch.isfinite(out).all()
        assert all(torch.isfinite(x) for x in (loss, *metrics.values()))


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ValueError, match="level"):
        policy.clipped(*inputs(), level="word")
    with pytest.raises(ValueError, match="reduce"):
        policy.clipped(*inputs(), reduce="mean")


# V        1.0   2.0   0.5   pad
# V_old    0.5   2.1   0.5            so V_clip = 0.7, 2.0, 0.5  (ε = 0.2)
# R        2.0   0.0   1.0
# (V-R)²   1.0   4.0   0.25
# clipped  1.69  4.0   0.25           max: 1.69 + 4 + 0.25 = 5.94
def test_value_loss_by_hand() -> None:
    values = f64([[1.0, 2.0, 0.5, NAN]]).requires_grad_()
    old, returns = f64([[0.5, 2.1, 0.5, NAN]]), f64([[2.0, 0.0, 1.0, NAN]])
    mask = torch.tensor([[True, True, True, False]])
    loss, metrics = value.clipped(values, old, returns, mask)
    assert loss.item() == pytest.approx(5.94 / 2 / 3)
    # (V - R)/3 where the clip is not active, else 0
    assert gradient(loss, values) == approx([[0.0, 2 / 3, -0.5 / 3, 0.0]])
    by_hand = {"clipfrac": 1 / 3, "mse": 5.25 / 3, "value": 3.5 / 3}
    assert {name: x.item() for name, x in metrics.items()} == pytest.approx(by_hand)
    unclipped, _ = value.clipped(values, old, returns, mask, clip=float("inf"))
    assert unclipped.item() == pytest.approx(5.25 / 2 / 3)


# ---------------------------------------------------------------- CISPO and truncated importance sampling


def test_cispo_clips_the_weight_and_keeps_every_gradient() -> None:
    """weight clip(ρ, 0.8, 1.2)   1.2   1.0   0.8 | 1.2   0.9;   ∂L/∂log π = −weight · Â / 5"""
    logp, old, advantage, mask = inputs()
    loss, metrics = policy.cispo(logp, old, advantage, mask, 0.2, 0.2)
    assert gradient(loss, logp) == approx([[-0.24, -0.4, 0.16], [0.24, -0.36, 0.0]])
    values = [-1.0 + math.log(1.5), -2.0, -0.5 + math.log(0.5), -3.0 + math.log(2.0), -0.1 + math.log(0.9)]
    factors = [1.2 * 1, 1.0 * 2, 0.8 * -1, 1.2 * -1, 0.9 * 2]
    expected = -sum(factor * value for factor, value in zip(factors, values, strict=True)) / 5
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert metrics["clipfrac"].item() == pytest.approx(3 / 5)
    assert "dual_clipfrac" not in metrics


@pytest.mark.parametrize("reduce", ["token", "sequence", 7.0])
def test_cispo_inside_its_clip_has_the_gradient_of_ppo_inside_its_own(reduce: object) -> None:
    logp, old, advantage, mask = inputs()
    one = policy.cispo(logp, old, advantage, mask, 0.99, 9.0, reduce=reduce)[0]  # pyright: ignore[reportArgumentType]
    other = policy.clipped(logp, old, advantage, mask, 0.99, 9.0, reduce=reduce)[0]  # pyright: ignore[reportArgumentType]
    assert gradient(one, logp) == approx(gradient(other, logp))


def test_importance_weights_are_cut_above_and_only_there() -> None:
    trainer = f64([[-1.0, -1.0, -2.0], [0.0, -5.0, NAN]])
    sampler = f64([[-1.0, -2.0, -1.0], [-9.0, -5.5, NAN]])
    found = policy.importance_weights(trainer, sampler, MASK, cap=2.0)
    assert found.tolist() == approx([[1.0, 2.0, math.exp(-1)], [2.0, math.exp(0.5), 1.0]])
    with pytest.raises(ValueError, match="cap"):
        policy.importance_weights(trainer, sampler, MASK, cap=0.0)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_mask", [[1.0, 0.0, math.exp(-1)], [0.0, math.exp(0.5), 1.0]]),
        ("sequence_truncate", [[1.0, 1.0, 1.0], [2.0, 2.0, 1.0]]),  # e^0 and e^9.5
        ("sequence_mask", [[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]]),
    ],
)
def test_importance_weights_of_whole_responses_and_masks(mode: Any, expected: list[list[float]]) -> None:
    trainer = f64([[-1.0, -1.0, -2.0], [0.0, -5.0, NAN]])
    sampler = f64([[-1.0, -2.0, -1.0], [-9.0, -5.5, NAN]])
    assert policy.importance_weights(trainer, sampler, MASK, 2.0, mode).tolist() == approx(expected)
    with pytest.raises(ValueError, match="sequence_mask, not 'row'"):
        policy.importance_weights(trainer, sampler, MASK, 2.0, "row")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("loss", [policy.clipped, policy.cispo])
def test_weights_multiply_each_tokens_gradient(loss: object) -> None:
    logp, old, advantage, mask = inputs()
    weights = f64([[2.0, 0.5, 1.0], [0.0, 3.0, NAN]])
    plain = gradient(loss(logp, old, advantage, mask, 0.5, 0.5)[0], logp)  # pyright: ignore[reportCallIssue]
    weighted = gradient(loss(logp, old, advantage, mask, 0.5, 0.5, weights=weights)[0], logp)  # pyright: ignore[reportCallIssue]
    expected = [[g * w for g, w in zip(*rows)] for rows in zip(plain, weights.nan_to_num(0.0).tolist())]
    assert weighted == approx(expected)


def test_unit_weights_are_no_weights() -> None:
    logp, old, advantage, mask = inputs()
    one = policy.clipped(logp, old, advantage, mask, weights=torch.ones(2, 3, dtype=torch.float64))[0]
    assert one.item() == policy.clipped(logp, old, advantage, mask)[0].item()
