"""Preference and reward-model losses against numbers worked out by hand, and what they reduce to."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from keel.algorithms import masked, preference, reward_model


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def nls(x: float) -> float:
    """-log σ(x) = log(1 + e^-x)."""
    return math.log1p(math.exp(-x))


# chosen -1 against a reference of -2: +1.  rejected -3 against -2: -1.  β = 1/2: rewards ½ and -½, h = 1.
PAIR = (f64([-1.0]), f64([-3.0]), f64([-2.0]), f64([-2.0]))


def test_dpo_by_hand() -> None:
    losses, metrics = preference.dpo(*PAIR, beta=0.5)
    assert losses.tolist() == pytest.approx([nls(1)])  # 0.3132617
    assert losses.item() == pytest.approx(0.3132617, abs=1e-7)
    by_hand = {"chosen": 0.5, "rejected": -0.5, "margins": 1.0, "accuracies": 1.0}
    assert {k: v.tolist() for k, v in metrics.items()} == {f"rewards/{k}": [v] for k, v in by_hand.items()}
    smooth, _ = preference.dpo(*PAIR, beta=0.5, label_smoothing=0.1)
    assert smooth.tolist() == pytest.approx([0.9 * nls(1) + 0.1 * nls(-1)])


def test_gradient_of_dpo_by_hand() -> None:
    chosen, rejected = PAIR[0].clone().requires_grad_(), PAIR[1].clone().requires_grad_()
    losses, _ = preference.dpo(chosen, rejected, *PAIR[2:], beta=0.5)
    losses.sum().backward()
    slope = 0.5 / (1 + math.e)  # β σ(-h)
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert (chosen.grad.item(), rejected.grad.item()) == pytest.approx((-slope, slope))


def test_dpo_of_the_reference_itself_is_log_2_and_a_tie() -> None:
    losses, metrics = preference.dpo(PAIR[0], PAIR[1], PAIR[0], PAIR[1])
    assert losses.item() == pytest.approx(math.log(2))
    assert metrics["rewards/accuracies"].item() == 0.5


def test_dpo_smoothed_by_one_half_does_not_know_which_one_was_chosen() -> None:
    chosen, rejected, ref_chosen, ref_rejected = PAIR
    one, _ = preference.dpo(*PAIR, label_smoothing=0.5)
    other, _ = preference.dpo(rejected, chosen, ref_rejected, ref_chosen, label_smoothing=0.5)
    assert one.item() == pytest.approx(other.item())


def test_robust_dpo_by_hand_and_without_noise_dpo() -> None:
    losses, _ = preference.robust_dpo(*PAIR, beta=0.5, label_smoothing=0.1)
    assert losses.tolist() == pytest.approx([(0.9 * nls(1) - 0.1 * nls(-1)) / 0.8])  # 0.1882617
    plain, _ = preference.robust_dpo(*PAIR, beta=0.5, label_smoothing=0.0)
    assert plain.tolist() == pytest.approx([nls(1)])
    # unbiased: with a share of 0.1 of flipped labels its mean is DPO's loss on the clean ones
    chosen, rejected, ref_chosen, ref_rejected = PAIR
    flipped, _ = preference.robust_dpo(
        rejected, chosen, ref_rejected, ref_chosen, beta=0.5, label_smoothing=0.1
    )
    assert (0.9 * losses + 0.1 * flipped).item() == pytest.approx(nls(1))
    with pytest.raises(ValueError, match="label_smoothing"):
        preference.robust_dpo(*PAIR, label_smoothing=0.5)


def test_ipo_by_hand() -> None:
    # differences +1 and -1: 2 - 1/(2β); β = ½: (2 - 1)² = 1; β = ¼: (2 - 2)² = 0
    assert preference.ipo(*PAIR, beta=0.5)[0].tolist() == pytest.approx([1.0])
    assert preference.ipo(*PAIR, beta=0.25)[0].tolist() == pytest.approx([0.0])


def test_trap_26_ipo_takes_averages_so_length_does_not_move_its_target() -> None:
    # every chosen token is 1 nat likelier than under the reference: at β = ½ the target is a margin of 1
    for length in (1, 3, 8):
        mask = torch.arange(8) < length
        mean = [masked.masked_mean(torch.full((1, 8), x), mask[None], dim=1) for x in (-1.0, -2.0)]
        losses, _ = preference.ipo(mean[0], mean[1], mean[1], mean[1], beta=0.5)
        assert losses.tolist() == pytest.approx([0.0])


def test_trap_26_a_completion_without_counted_tokens_makes_no_nan() -> None:
    none = torch.zeros(1, 3, dtype=torch.bool)
    empty = masked.masked_mean(torch.full((1, 3), float("nan")), none, dim=1)
    some = torch.tensor([-1.0])
    for losses, metrics in (
        preference.dpo(some, empty, some, empty),
        preference.ipo(some, empty, some, empty),
        preference.orpo(some, empty),
        preference.simpo(some, empty),
        preference.kto(empty, empty, torch.tensor([True]), 0.0),
    ):
        assert torch.isfinite(losses).all()
        assert all(torch.isfinite(x).all() for x in metrics.values())


def test_kto_by_hand() -> None:
    # β = ½, r = 2 ln 3 + 1, z = 1: β(r - z) = ln 3, σ = ¾; desirable loses ¼, undesirable 1 - σ(-ln 3) = ¾
    r = 2 * math.log(3) + 1
    logp, label = f64([r, r]).requires_grad_(), torch.tensor([True, False])
    losses, metrics = preference.kto(logp, f64([0.0, 0.0]), label, kl=1.0, beta=0.5)
    assert losses.tolist() == pytest.approx([0.25, 0.75])
    assert metrics["rewards"].tolist() == pytest.approx([r / 2, r / 2])
    weighted, _ = preference.kto(
        logp, f64([0.0, 0.0]), label, 1.0, 0.5, desirable_weight=2, undesirable_weight=4
    )
    assert weighted.tolist() == pytest.approx([0.5, 3.0])
    losses.sum().backward()  # ∓ β σ(1 - σ) = ∓ ½ · 3/16
    assert logp.grad is not None
    assert logp.grad.tolist() == pytest.approx([-3 / 32, 3 / 32])


def test_kto_reference_point_is_never_negative_and_a_constant() -> None:
    kl = torch.tensor(-5.0, requires_grad=True)
    losses, _ = preference.kto(f64([0.0]), f64([0.0]), torch.tensor([True]), kl)
    assert losses.tolist() == [0.5]
    assert not losses.requires_grad


def test_orpo_by_hand() -> None:
    # P = 0.8 and 0.5: odds 4 and 1, log-odds ratio ln 4, σ = 0.8: -ln 0.8 - β ln 0.8
    losses, metrics = preference.orpo(f64([0.8]).log(), f64([0.5]).log(), beta=0.5)
    assert losses.tolist() == pytest.approx([-1.5 * math.log(0.8)])
    assert metrics["nll"].tolist() == pytest.approx([-math.log(0.8)])
    assert metrics["log_odds_ratio"].tolist() == pytest.approx([math.log(4)])


def test_orpo_is_finite_at_certainty_and_exact_near_it() -> None:
    chosen = f64([0.0, -1e-12, -800.0]).requires_grad_()
    losses, metrics = preference.orpo(chosen, f64([0.5] * 3).log())
    (out,) = torch.autograd.grad(losses.sum(), chosen)
    assert torch.isfinite(losses).all()
    assert torch.isfinite(out).all()
    # log odds: -log(1e-12) to first order, and log P itself
    assert metrics["log_odds_ratio"][1:].tolist() == pytest.approx([12 * math.log(10), -800.0], abs=1e-9)


def test_simpo_by_hand_and_without_margin_dpo_against_a_flat_reference() -> None:
    # β = 2, averages 1 apart, γ = 2 - ln 3: the argument is ln 3, σ = ¾
    chosen, rejected = f64([-1.0]), f64([-2.0])
    losses, _ = preference.simpo(chosen, rejected, beta=2.0, gamma=2 - math.log(3))
    assert losses.tolist() == pytest.approx([-math.log(0.75)])
    flat = f64([-4.0])
    assert preference.simpo(chosen, rejected, 0.3, gamma=0.0)[0].item() == pytest.approx(
        preference.dpo(chosen, rejected, flat, flat, 0.3)[0].item()
    )


# ---------------------------------------------------------------- reward model


def test_bradley_terry_by_hand() -> None:
    # Δ = ln 3 and -ln 3: -ln ¾ and -ln ¼; one of two is right
    loss, metrics = reward_model.bradley_terry(f64([math.log(3), 0.0]), f64([0.0, math.log(3)]))
    assert loss.item() == pytest.approx((-math.log(0.75) - math.log(0.25)) / 2)
    by_hand = {"margin": 0.0, "mean_reward": math.log(3) / 2, "correct": 1.0, "decided": 2.0, "accuracy": 0.5}
    assert {name: x.item() for name, x in metrics.items()} == pytest.approx(by_hand)


def test_bradley_terry_with_soft_labels_margin_and_centring_by_hand() -> None:
    chosen, rejected = f64([3.0]), f64([1.0])  # Δ = 2, sum 4
    soft, _ = reward_model.bradley_terry(chosen, rejected, p_chosen=f64([0.75]))
    assert soft.item() == pytest.approx(0.75 * nls(2) + 0.25 * nls(-2))
    far, _ = reward_model.bradley_terry(chosen, rejected, margin=f64([0.5]))
    assert far.item() == pytest.approx(nls(1.5))
    centred, _ = reward_model.bradley_terry(chosen, rejected, center=0.01)
    assert centred.item() == pytest.approx(nls(2) + 0.01 * 16)


def test_gradient_of_bradley_terry_is_the_error_of_the_predicted_probability() -> None:
    chosen = f64([math.log(3)]).requires_grad_()
    loss, _ = reward_model.bradley_terry(chosen, f64([0.0]), p_chosen=f64([0.75]))
    (out,) = torch.autograd.grad(loss, chosen)
    assert out.item() == pytest.approx(0.0, abs=1e-12)  # σ(ln 3) = ¾: nothing to learn
    loss, _ = reward_model.bradley_terry(chosen, f64([0.0]))
    (out,) = torch.autograd.grad(loss, chosen)
    assert out.item() == pytest.approx(-0.25)


def test_trap_25_log_sigmoid_does_not_overflow_and_the_margin_counts() -> None:
    chosen = torch.tensor([-2000.0, 2000.0]).requires_grad_()
    loss, _ = reward_model.bradley_terry(chosen, torch.zeros(2))
    (out,) = torch.autograd.grad(loss, chosen)
    assert loss.item() == pytest.approx(1000.0)
    assert out.tolist() == [-0.5, 0.0]
    plain, _ = reward_model.bradley_terry(torch.zeros(1), torch.zeros(1))
    margin, _ = reward_model.bradley_terry(torch.zeros(1), torch.zeros(1), margin=torch.ones(1))
    assert (plain.item(), margin.item()) == pytest.approx((math.log(2), nls(-1)))


def test_trap_25_accuracy_is_counted_over_pairs_and_is_no_mean_of_means() -> None:
    # labels: chosen, chosen, rejected, tie. Ranked right, wrong, right, -; and of two equal scores, a half.
    chosen, rejected = f64([1.0, 0.0, 0.0, 5.0, 2.0]), f64([0.0, 1.0, 1.0, 0.0, 2.0])
    p = f64([1.0, 0.8, 0.2, 0.5, 1.0])
    _, metrics = reward_model.bradley_terry(chosen, rejected, p_chosen=p)
    assert (metrics["correct"].item(), metrics["decided"].item()) == (2.5, 4.0)
    assert metrics["accuracy"].item() == pytest.approx(2.5 / 4)
    parts = [
        reward_model.bradley_terry(chosen[s], rejected[s], p_chosen=p[s], denominator=5)[1]
        for s in (slice(0, 1), slice(1, 5))
    ]
    assert all("accuracy" not in part for part in parts)  # a part has none to be averaged by mistake
    assert sum(part["correct"].item() for part in parts) == 2.5
    assert sum(part["decided"].item() for part in parts) == 4.0


@given(st.lists(st.tuples(st.floats(-30, 30), st.floats(-30, 30), st.floats(0, 1)), min_size=1, max_size=5))
def test_swapping_the_sides_of_soft_labels_changes_nothing(pairs: list[tuple[float, float, float]]) -> None:
    a, b, p = (f64(column) for column in zip(*pairs))
    one, _ = reward_model.bradley_terry(a, b, p_chosen=p, center=0.1)
    other, _ = reward_model.bradley_terry(b, a, p_chosen=1 - p, center=0.1)
    assert one.item() == pytest.approx(other.item(), rel=1e-9)


def test_dpo_is_bradley_terry_on_implicit_rewards() -> None:
    dpo, _ = preference.dpo(*PAIR, beta=0.5)
    bt, _ = reward_model.bradley_terry(f64([0.5]), f64([-0.5]))
    assert dpo.item() == pytest.approx(bt.item())


def test_no_pairs_is_no_loss() -> None:
    loss, metrics = reward_model.bradley_terry(torch.zeros(0), torch.zeros(0))
    assert loss.item() == 0.0
    assert all(x.item() == 0.0 for x in metrics.values())
