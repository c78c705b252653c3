"""Invariants of every loss: micro-batch split, padding, and what stands where the mask is False."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from keel.algorithms import kl, lm, masked, policy, reward_model, value

Batch = dict[str, Tensor]
Loss = Callable[[Batch, Tensor | float | None], tuple[Tensor, dict[str, Tensor]]]
B, T, V = 6, 5, 7


def make_batch() -> Batch:
    """Six sequences of lengths 5, 1, 3, 0, 2, 4, random also where the mask is False."""
    g = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    old = -normal(B, T).abs()
    return {
        "mask": torch.arange(T)[None] < torch.tensor([5, 1, 3, 0, 2, 4])[:, None],
        "logp": old + 0.3 * normal(B, T),
        "old_logp": old,
        "advantages": normal(B, T),
        "values": normal(B, T),
        "old_values": normal(B, T),
        "returns": normal(B, T),
        "logits": normal(B, T, V),
        "labels": torch.randint(V, (B, T), generator=g),
        "chosen": normal(B),
        "rejected": normal(B),
        "p_chosen": torch.rand(B, dtype=torch.float64, generator=g),
        "margin": torch.rand(B, dtype=torch.float64, generator=g),
    }


def policy_loss(**settings: object) -> Loss:
    def loss(b: Batch, denominator: Tensor | float | None) -> tuple[Tensor, dict[str, Tensor]]:
        names = ("logp", "old_logp", "advantages", "mask")
        return policy.clipped(*(b[n] for n in names), denominator=denominator, **settings)

    return loss


def value_loss(b: Batch, denominator: Tensor | float | None) -> tuple[Tensor, dict[str, Tensor]]:
    return value.clipped(b["values"], b["old_values"], b["returns"], b["mask"], denominator=denominator)


def lm_loss(b: Batch, denominator: Tensor | float | None) -> tuple[Tensor, dict[str, Tensor]]:
    return lm.cross_entropy(b["logits"], b["labels"], b["mask"], denominator)


def kl_loss(b: Batch, denominator: Tensor | float | None) -> tuple[Tensor, dict[str, Tensor]]:
    per_token = kl.estimate(b["logp"], b["old_logp"], "k3", b["mask"])
    return masked.reduced(per_token, b["mask"], "token", denominator), {}


def pair_loss(b: Batch, denominator: Tensor | float | None) -> tuple[Tensor, dict[str, Tensor]]:
    scores = b["chosen"], b["rejected"], b["margin"], b["p_chosen"]
    return reward_model.bradley_terry(*scores, center=0.1, denominator=denominator)


# name → (loss, trained input, how to count what the denominator counts)
CASES: dict[str, tuple[Loss, str, Callable[[Batch], Tensor | int]]] = {
    "policy token": (policy_loss(dual_clip=1.1), "logp", lambda b: masked.count(b["mask"], "token")),
    "policy sequence": (
        policy_loss(reduce="sequence"),
        "logp",
        lambda b: masked.count(b["mask"], "sequence"),
    ),
    "policy constant": (policy_loss(reduce=9), "logp", lambda b: masked.count(b["mask"], 9)),
    "gspo": (
        policy_loss(level="sequence", reduce="sequence"),
        "logp",
        lambda b: masked.count(b["mask"], "sequence"),
    ),
    "gspo token": (policy_loss(level="sequence"), "logp", lambda b: masked.count(b["mask"])),
    "value": (value_loss, "values", lambda b: b["mask"].sum()),
    "lm": (lm_loss, "logits", lambda b: b["mask"].sum()),
    "kl": (kl_loss, "logp", lambda b: b["mask"].sum()),
    "bradley-terry": (pair_loss, "chosen", lambda b: len(b["chosen"])),
}
MASKED = [name for name in CASES if name != "bradley-terry"]


def run(loss: Loss, b: Batch, trained: str, denominator: Tensor | float | None) -> tuple[float, Tensor, dict]:
    leaf = b[trained].clone().requires_grad_()
    total, metrics = loss({**b, trained: leaf}, denominator)
    (gradient,) = torch.autograd.grad(total, leaf)
    return total.item(), gradient, {name: x.item() for name, x in metrics.items()}


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_trap_03_no_loss_or_metric_depends_on_the_split_into_micro_batches(
    case: str, data: st.DataObject
) -> None:
    loss, trained, count = CASES[case]
    order = data.draw(st.permutations(range(B)))
    cuts = sorted(data.draw(st.sets(st.integers(1, B - 1))))
    batch = {name: x[list(order)] for name, x in make_batch().items()}
    whole, gradient, metrics = run(loss, batch, trained, None)
    parts = [{name: x[start:end] for name, x in batch.items()} for start, end in zip([0, *cuts], [*cuts, B])]
    total = sum(int(count(part)) for part in parts)
    results = [run(loss, part, trained, total) for part in parts]
    assert sum(r[0] for r in results) == pytest.approx(whole, abs=1e-12)
    assert torch.allclose(torch.cat([r[1] for r in results]), gradient, rtol=0, atol=1e-12)
    for name in results[0][2]:
        assert sum(r[2][name] for r in results) == pytest.approx(metrics[name], abs=1e-6)


def test_a_mean_of_micro_batch_means_is_not_the_loss() -> None:
    """Without the denominator the split does matter: what the test above would see if it were ignored."""
    batch = make_batch()
    whole = run(value_loss, batch, "values", None)[0]
    halves = [
        run(value_loss, {n: x[s] for n, x in batch.items()}, "values", None)[0]
        for s in (slice(0, 1), slice(1, 6))
    ]
    assert sum(halves) / 2 != pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("filler", [float("nan"), float("inf"), float("-inf"), -1e9])
@pytest.mark.parametrize("case", MASKED)
def test_what_stands_where_the_mask_is_false_reaches_nothing(case: str, filler: float) -> None:
    loss, trained, _ = CASES[case]
    batch = make_batch()
    whole, gradient, metrics = run(loss, batch, trained, None)
    mask = batch["mask"]
    poisoned = {
        name: x
        if name == "mask" or x.dim() < 2
        else torch.where(mask[..., None] if x.dim() == 3 else mask, x, -100 if name == "labels" else filler)
        for name, x in batch.items()
    }
    assert run(loss, poisoned, trained, None)[0] == whole
    assert torch.equal(run(loss, poisoned, trained, None)[1], gradient)
    assert run(loss, poisoned, trained, None)[2] == metrics
    assert not gradient[~mask].any()
    assert gradient[mask].any()


@pytest.mark.parametrize("case", MASKED)
def test_padding_on_the_right_and_rows_of_padding_change_nothing(case: str) -> None:
    loss, trained, _ = CASES[case]
    batch = make_batch()
    whole, gradient, metrics = run(loss, batch, trained, None)

    def pad(x: Tensor) -> Tensor:
        if x.dim() < 2:
            return x
        out = torch.full((B + 2, T + 3, *x.shape[2:]), 0.5).to(x.dtype)
        if x.dtype == torch.bool:
            out = torch.zeros_like(out)
        out[:B, :T] = x
        return out

    padded = run(loss, {name: pad(x) for name, x in batch.items()}, trained, None)
    assert padded[0] == pytest.approx(whole, abs=1e-12)
    assert torch.allclose(padded[1][:B, :T], gradient, rtol=0, atol=1e-12)
    assert padded[2] == pytest.approx(metrics, abs=1e-6)


@pytest.mark.parametrize("case", MASKED)
def test_no_counted_position_is_a_loss_of_0_with_gradient_0(case: str) -> None:
    loss, trained, _ = CASES[case]
    batch = make_batch()
    batch["mask"] = torch.zeros_like(batch["mask"])
    total, gradient, metrics = run(loss, batch, trained, None)
    assert total == 0.0
    assert not gradient.any()
    assert all(x == 0.0 for x in metrics.values())


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_the_loss(case: str) -> None:
    """Central differences, away from the kinks of the clip."""
    loss, trained, _ = CASES[case]
    batch = make_batch()
    _, gradient, _ = run(loss, batch, trained, None)
    direction = torch.randn(
        batch[trained].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9)
    )
    step = 1e-6
    ends = [
        run(loss, {**batch, trained: batch[trained] + s * step * direction}, trained, None)[0]
        for s in (1, -1)
    ]
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx((gradient * direction).sum().item(), abs=1e-7)
