"""KL estimators and the exact KL against sums done by hand; their gradients over an enumerated policy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from keel.algorithms import kl

LN2 = math.log(2)
PI = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)  # the policy
REF = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)  # the reference
INF, NAN = float("inf"), float("nan")


def test_estimates_by_hand() -> None:
    # d = log(π/π_ref) = ln 2, -ln 2, 0
    logp, ref_logp = PI.log(), REF.log()
    assert kl.estimate(logp, ref_logp, "k1").tolist() == pytest.approx([LN2, -LN2, 0.0])
    assert kl.estimate(logp, ref_logp, "k2").tolist() == pytest.approx([LN2**2 / 2, LN2**2 / 2, 0.0])
    # e^-d - 1 + d: 1/2 - 1 + ln 2, 2 - 1 - ln 2, 0
    assert kl.estimate(logp, ref_logp, "k3").tolist() == pytest.approx([LN2 - 0.5, 1 - LN2, 0.0])
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        kl.estimate(logp, ref_logp, "k4")


def test_exact_by_hand() -> None:
    # 1/2 ln 2 - 1/4 ln 2 + 0 = 1/4 ln 2; the logits may carry any constant
    assert kl.exact(PI.log() + 7, REF.log() - 3).item() == pytest.approx(LN2 / 4)
    # at temperature 1/2 probabilities are squared: π (4, 1, 1)/6, π_ref (1, 4, 1)/6: 4/6 ln 4 - 1/6 ln 4
    assert kl.exact(PI.log(), REF.log(), 0.5).item() == pytest.approx(math.log(4) / 2)
    assert kl.exact(PI.log().expand(2, 3, 3), REF.log().expand(2, 3, 3)).shape == (2, 3)


def test_k1_and_k3_have_the_exact_kl_as_expectation_and_k2_has_not() -> None:
    mean = {k: (PI * kl.estimate(PI.log(), REF.log(), k)).sum().item() for k in ("k1", "k2", "k3")}
    assert mean["k1"] == pytest.approx(LN2 / 4)
    assert mean["k3"] == pytest.approx(LN2 / 4)
    assert mean["k2"] == pytest.approx(0.75 * LN2**2 / 2)


def expected_gradient(kind: kl.Kind) -> Tensor:
    """E over the policy's own samples of the estimate's gradient, with respect to the policy's logits."""
    logits = PI.log().requires_grad_()
    per_token = kl.estimate(torch.log_softmax(logits, 0), REF.log(), kind)
    (gradient,) = torch.autograd.grad((PI * per_token).sum(), logits)
    return gradient


REVERSE = [
    0.375 * LN2,
    -0.3125 * LN2,
    -0.0625 * LN2,
]  # ∇KL(π‖ref) = π_v (d_v - KL): π (ln 2, -ln 2, 0) - π ¼ ln 2
FORWARD = [0.25, -0.25, 0.0]  # ∇KL(ref‖π) = π - ref


def test_exact_has_the_reverse_kls_gradient() -> None:
    logits = PI.log().requires_grad_()
    kl.exact(logits, REF.log()).backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx(REVERSE)


def test_trap_17_as_losses_k2_is_the_reverse_kl_k3_the_forward_kl_and_k1_nothing() -> None:
    assert expected_gradient("k1").tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-15)
    assert expected_gradient("k2").tolist() == pytest.approx(REVERSE)
    assert expected_gradient("k3").tolist() == pytest.approx(FORWARD, abs=1e-15)
    assert expected_gradient("k3").tolist() != pytest.approx(REVERSE, abs=1e-2)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_trap_16_descending_the_kl_loss_brings_the_policy_to_the_reference(kind: kl.Kind) -> None:
    after = torch.softmax(PI.log() - 0.1 * expected_gradient(kind), 0)
    divergence = (after * (after / REF).log()).sum().item()
    assert divergence < LN2 / 4 - 0.005


def test_trap_10_a_sentinel_reaches_no_kl() -> None:
    logp = torch.tensor([math.log(0.5), -1e9, NAN, -INF], dtype=torch.float64).requires_grad_()
    ref_logp = torch.tensor([math.log(0.25), 0.0, 1.0, 0.0], dtype=torch.float64)
    mask = torch.tensor([True, False, False, False])
    for kind, by_hand, slope in (("k1", LN2, 1.0), ("k2", LN2**2 / 2, LN2), ("k3", LN2 - 0.5, 0.5)):
        value = kl.estimate(logp, ref_logp, kind, mask)
        (gradient,) = torch.autograd.grad(value.sum(), logp)
        assert value.tolist() == pytest.approx([by_hand, 0.0, 0.0, 0.0])
        assert gradient.tolist() == pytest.approx([slope, 0.0, 0.0, 0.0])
    # a token that both exclude adds nothing to the exact KL: (1/2, 1/2, 0) against (1/4, 3/4, 0)
    logits = torch.tensor([0.0, 0.0, -INF], dtype=torch.float64).requires_grad_()
    ref_logits = torch.tensor([0.0, math.log(3), -INF], dtype=torch.float64)
    value = kl.exact(logits, ref_logits)
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    # π_v (d_v - KL): 1/2 (ln 2 - KL), 1/2 (ln 2/3 - KL), 0
    assert gradient.tolist() == pytest.approx([math.log(3) / 4, -math.log(3) / 4, 0.0])
