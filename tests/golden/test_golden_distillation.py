"""Divergences of distillation against TRL's two losses, by hand, and what they reduce to."""

from __future__ import annotations

import importlib.util
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from keel.algorithms import kl, masked
from keel.algorithms.distillation import Compared, compare


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Those that TRL was given."""
    spec = importlib.util.spec_from_file_location("of_trl", Path(__file__).parent / "distillation_of_trl.py")
    assert spec
    assert spec.loader
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.inputs()


# beta, temperature; the loss of TRL's GKDTrainer, in float64; of its DistillationTrainer, in float32: the
# loss and the sum of the student's entropies; the gradient of the first to the logits at position 1 of row 0.
# PYTHONPATH=FOLDER_WITH_TRL python tests/golden/distillation_of_trl.py, TRL 1.16.0
# fmt: off
OF_TRL = [
    (0.0, 1.0, 1.64257306658697, 1.642573, 6.96347475,
     [-0.0754378731502, 0.0557946731313, 0.0250183319396, 0.00141277593123,
      0.00757456096625, 0.0718328557188, -0.0861953245369]),
    (0.0, 0.7, 2.46072619013261, 2.46072626, 5.7658,
     [-0.114968430606, 0.093090447782, 0.0261286908651, 0.000503454435002,
      0.00527349755307, 0.137079558088, -0.147107218117]),
    (0.1, 1.0, 0.130039195501578, 0.1300392, 6.96347475,
     [-0.00367513662512, 0.00325426406066, 0.00157695611563, 8.03897117379e-05,
      0.000447655978309, 0.00410635210407, -0.00579048134529]),
    (0.1, 0.7, 0.173730801158128, 0.173730791, 5.7658,
     [-0.00292968013967, 0.00358259739047, 0.00108453891437, 1.88120575731e-05,
      0.000206016680575, 0.00515107962366, -0.00711336452698]),
    (0.5, 1.0, 0.327989333280602, 0.32798934, 6.96347475,
     [-0.00491518951024, 0.00500787398841, 0.00331872676102, 0.000109558129319,
      0.000731114630151, 0.00573118856998, -0.00998327256864]),
    (0.5, 0.7, 0.420113167050525, 0.420113176, 5.7658,
     [-0.00307639043432, 0.00460784638177, 0.00185595653967, 2.10227837316e-05,
      0.000282479620451, 0.00592324964475, -0.00961416453605]),
    (1.0, 1.0, 2.17287164713643, 2.17287135, 6.96347475,
     [-0.0167755267892, 0.00965414266071, 0.0443346389023, -6.97790249589e-05,
      0.00238226142344, -0.000801944994195, -0.0387237921781]),
    (1.0, 0.7, 3.55924137978177, 3.55924153, 5.7658,
     [-0.0104348033214, 0.00750850371867, 0.0610033821248, -0.000105498807785,
      0.0014220668818, -0.0219753184795, -0.0374183321166]),
]
# fmt: on


@pytest.mark.parametrize(("beta", "temperature", "gkd", "chunked", "entropy", "slope"), OF_TRL)
def test_the_losses_of_trl_on_the_same_logits(
    beta: float, temperature: float, gkd: float, chunked: float, entropy: float, slope: list[float]
) -> None:
    student, teacher, mask = _inputs()
    logits = student.requires_grad_()
    tokens = torch.zeros(5, dtype=torch.long)
    found = compare(logits[mask], teacher[mask], tokens, beta, temperature)
    loss = found.loss.sum() / mask.sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(gkd, rel=1e-12)
    assert loss.item() == pytest.approx(chunked, rel=1e-6)
    assert found.entropy.sum().item() == pytest.approx(entropy, rel=1e-6)
    assert gradient[0, 1].tolist() == pytest.approx(slope, rel=1e-9)
    assert not gradient[~mask].any()


# π = (½, ¼, ¼), p = (¼, ½, ¼)
PI, P = (torch.tensor([row], dtype=torch.float64) for row in ([0.5, 0.25, 0.25], [0.25, 0.5, 0.25]))


def _of(beta: float, **more: Any) -> Compared:
    return compare(PI.log(), P.log(), torch.tensor([0]), beta, **more)


def test_by_hand() -> None:
    ln2 = math.log(2)
    assert _of(1.0).loss.item() == pytest.approx(0.5 * ln2 - 0.25 * ln2)
    assert _of(0.0).loss.item() == pytest.approx(0.5 * ln2 - 0.25 * ln2)
    # M = (⅜, ⅜, ¼): both sides cost ½ log(4/3) + ¼ log(2/3)
    assert _of(0.5).loss.item() == pytest.approx(0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3))
    found = _of(1.0)
    assert (found.logp.item(), found.reverse_kl.item()) == pytest.approx((-ln2, 0.25 * ln2))
    assert (found.entropy.item(), found.teacher_entropy.item()) == pytest.approx((1.5 * ln2, 1.5 * ln2))
    assert not found.agree.item()


def test_two_outcomes_of_top_1_by_hand() -> None:
    """The teacher's likeliest is the second: p = (½ | ½), π = (¼ | ¾), and the rest keeps its 2 : 1."""
    logits = PI.log().requires_grad_()
    found = compare(logits, P.log(), torch.tensor([0]), 1.0, top_k=1)
    assert found.loss.item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    (gradient,) = torch.autograd.grad(found.loss.sum(), logits)
    slope = 0.25 * (math.log(0.5) - found.loss.item())
    assert gradient[0].tolist() == pytest.approx([-slope * 2 / 3, slope, -slope / 3])


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_top_k_is_a_lower_bound_that_grows_into_the_whole(beta: float, temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = (2 * torch.randn(9, 11, dtype=torch.float64) for _ in range(2))
    tokens = torch.zeros(9, dtype=torch.long)
    found = [compare(student, teacher, tokens, beta, temperature, k).loss for k in (1, 2, 4, 8, 9, 10, None)]
    for smaller, larger in pairwise(found):
        assert (smaller <= larger + 1e-12).all()
    assert torch.equal(found[-2], found[-1])
    assert (found[0] >= 0).all()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("top_k", [None, 3])
def test_the_gradient_is_that_of_the_loss(beta: float, top_k: int | None) -> None:
    torch.manual_seed(1)
    student, teacher = (2 * torch.randn(4, 8, dtype=torch.float64) for _ in range(2))
    tokens = torch.zeros(4, dtype=torch.long)
    of_loss = lambda logits: compare(logits, teacher, tokens, beta, 0.8, top_k).loss  # noqa: E731
    assert torch.autograd.gradcheck(of_loss, (student.requires_grad_(),))


def test_reverse_kl_is_the_exact_kl_of_policies_and_jsd_has_the_kls_as_its_limits() -> None:
    student, teacher, mask = _inputs()
    x, t = student[mask], teacher[mask]
    tokens = torch.arange(5)
    reverse, forward = (compare(x, t, tokens, beta).loss for beta in (1.0, 0.0))
    y, z = masked.log_softmax(x), masked.log_softmax(t)
    assert torch.allclose(reverse, kl.between(y, z))
    assert torch.allclose(forward, kl.between(z, y))
    assert torch.allclose(compare(x, t, tokens, 1e-7).loss / 1e-7, forward, rtol=1e-5)
    assert torch.allclose(compare(x, t, tokens, 1 - 1e-7).loss / 1e-7, reverse, rtol=1e-5)
    assert torch.equal(compare(x, t, tokens).logp, masked.token_logp(x, tokens))


def test_what_has_no_probability_reaches_no_gradient() -> None:
    """A token that both rule out: 0 · log 0 = 0. One that the teacher alone rules out is infinitely far."""
    minus = float("-inf")
    logits = torch.tensor([[1.0, 2.0, minus]], requires_grad=True)
    teacher = torch.tensor([[2.0, 1.0, minus]])
    for beta in (0.0, 0.5, 1.0):
        for top_k in (None, 1):
            found = compare(logits, teacher, torch.tensor([0]), beta, top_k=top_k)
            (gradient,) = torch.autograd.grad(found.loss.sum(), logits)
            assert found.loss.isfinite().all()
            assert gradient.isfinite().all()
    far = compare(torch.tensor([[1.0, 2.0, 0.0]]), teacher, torch.tensor([0]))
    assert far.loss.item() == math.inf


@pytest.mark.parametrize("wrong", [{"beta": 1.5}, {"beta": -0.1}, {"beta": 0.5, "top_k": 0}])
def test_what_is_no_divergence_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(reversed(wrong))):
        compare(PI, P, torch.tensor([0]), **wrong)
