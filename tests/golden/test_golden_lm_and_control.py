"""The language-modelling loss and the controllers against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from keel.algorithms import control, lm

NAN, INF = float("nan"), float("inf")


def test_cross_entropy_by_hand() -> None:
    # probabilities (¼, ¾) at every position; labels 1, 0; the third does not count
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, math.log(3)], [NAN, INF]]], dtype=torch.float64)
    logits.requires_grad_()
    labels, mask = torch.tensor([[1, 0, -100]]), torch.tensor([[True, True, False]])
    loss, metrics = lm.cross_entropy(logits, labels, mask)
    assert loss.item() == pytest.approx((-math.log(0.75) - math.log(0.25)) / 2)
    assert metrics["accuracy"].item() == 0.5
    (out,) = torch.autograd.grad(loss, logits)
    # (π - onehot)/2
    assert out.tolist() == [[pytest.approx([0.125, -0.125]), pytest.approx([-0.375, 0.375]), [0.0, 0.0]]]


def test_cross_entropy_of_nothing_is_0_with_gradient_0() -> None:
    logits = torch.full((1, 2, 3), NAN, requires_grad=True)
    loss, metrics = lm.cross_entropy(logits, torch.full((1, 2), -100), torch.zeros(1, 2, dtype=torch.bool))
    (out,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0.0
    assert metrics["accuracy"].item() == 0.0
    assert torch.equal(out, torch.zeros(1, 2, 3))


def test_adaptive_pace_by_hand() -> None:
    assert control.kl_adaptive_lr(0.5, 0.1 / 0.64, 0.1) == pytest.approx(
        0.4
    )  # 0.64 of the KL is 0.8 of the step
    assert control.kl_adaptive_lr(1.0, 0.4, 0.1) == control.kl_adaptive_lr(1.0, 100.0, 0.1) == 0.5  # at most
    assert control.kl_adaptive_lr(1 / 50, 100.0, 0.1) == 1 / 64
    assert control.kl_adaptive_lr(0.5, 0.1, 0.1) == pytest.approx(0.55)
    assert control.kl_adaptive_lr(0.95, 0.0, 0.1) == 1.0


def test_adaptive_kl_by_hand() -> None:
    # KL 6.6 of 6: error 0.1; 64 of 640 episodes: 0.2 (1 + 0.1 · 0.1)
    assert control.adaptive_kl(0.2, 6.6, 6.0, episodes=64, horizon=640) == pytest.approx(0.202)
    assert control.adaptive_kl(0.2, 60.0, 6.0, 64, 640) == pytest.approx(0.2 * 1.02)  # error cut to 0.2
    assert control.adaptive_kl(0.2, 0.0, 6.0, 64, 640) == pytest.approx(0.2 * 0.98)  # and to -0.2
    assert control.adaptive_kl(0.2, 6.0, 6.0, 64, 640) == 0.2


def test_adaptive_kl_never_turns_its_sign() -> None:
    assert control.adaptive_kl(0.2, 0.0, 6.0, episodes=64, horizon=1) == pytest.approx(0.2 * 0.8)
    for wrong in ((NAN, 6.0, 10), (1.0, 0.0, 10), (1.0, 6.0, 0)):
        with pytest.raises(ValueError, match=r"KL|above 0"):
            control.adaptive_kl(0.2, wrong[0], wrong[1], 64, wrong[2])


def test_trap_18_the_controllers_input_and_target_are_both_nats_per_response() -> None:
    # 100 tokens of 0.06 nats are 6 nats a response, the target: it stays. Per token it would fall.
    per_token, tokens = 0.06, 100
    assert control.adaptive_kl(0.1, per_token * tokens, 6.0, 64, 640) == pytest.approx(0.1)
    assert control.adaptive_kl(0.1, per_token, 6.0, 64, 640) < 0.1


def test_adaptive_kl_reaches_its_target() -> None:
    # a policy whose KL is 1/β: the fixed point is β = 1/6
    coef = 1.0
    for _ in range(400):
        coef = control.adaptive_kl(coef, 1 / coef, 6.0, 64, 640)
    assert 1 / coef == pytest.approx(6.0, rel=0.02)


def test_schedules_by_hand() -> None:
    def at(kind: str, steps: list[int], floor: float = 0.0) -> list[float]:
        return [control.schedule(s, 8, 4, kind, floor) for s in steps]

    for kind in ("linear", "cosine", "constant"):
        assert at(kind, [0, 1, 2, 3, 4]) == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert at("linear", [5, 6, 7, 8, 9]) == pytest.approx([0.75, 0.5, 0.25, 0.0, 0.0])
    half = math.sqrt(0.5)
    assert at("cosine", [5, 6, 7, 8]) == pytest.approx([(1 + half) / 2, 0.5, (1 - half) / 2, 0.0])
    assert at("constant", [5, 7, 100]) == [1.0, 1.0, 1.0]
    assert at("linear", [4, 6, 8], floor=0.1) == pytest.approx([1.0, 0.55, 0.1])
    with pytest.raises(ValueError, match="kind"):
        at("step", [7])


def test_no_step_of_a_schedule_is_wasted() -> None:
    for total, warmup in ((1, 0), (1, 1), (10, 0), (10, 10), (10, 3)):
        for kind in ("linear", "cosine"):
            assert all(0 < control.schedule(s, total, warmup, kind) <= 1 for s in range(total))
