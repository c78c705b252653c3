"""Masked arithmetic: what does not count reaches neither result nor gradient; log-probabilities of tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from keel.algorithms import masked

NAN, INF = float("nan"), float("inf")


def f64(*values: object) -> Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64)


X = f64([[1.0, 2.0, NAN], [4.0, INF, -INF], [NAN, NAN, INF]])
MASK = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])


def test_masked_sum_and_mean_by_hand() -> None:
    assert masked.masked_sum(X, MASK).item() == 7.0  # 1 + 2 + 4
    assert masked.masked_sum(X, MASK, dim=1).tolist() == [3.0, 4.0, 0.0]
    assert masked.masked_mean(X, MASK).item() == pytest.approx(7 / 3)
    assert masked.masked_mean(X, MASK, dim=1).tolist() == [1.5, 4.0, 0.0]  # an empty row: 0, not NaN
    assert masked.masked_mean(X, MASK, denominator=14).item() == 0.5


def test_masked_var_by_hand() -> None:
    # mean 7/3; deviations -4/3, -1/3, 5/3; squares 16/9 + 1/9 + 25/9 = 42/9; over n = 3: 14/9
    assert masked.masked_var(X, MASK).item() == pytest.approx(14 / 9)
    assert masked.masked_var(X, MASK, dim=1).tolist() == [0.25, 0.0, 0.0]


def test_whiten_by_hand() -> None:
    # 1, 3: mean 2, variance 1, so -1 and 1 (up to the 1e-8 under the root)
    x, mask = f64([1.0, NAN, 3.0]), torch.tensor([True, False, True])
    assert masked.whiten(x, mask).tolist() == pytest.approx([-1.0, 0.0, 1.0], abs=1e-7)
    assert masked.whiten(x, mask, shift_mean=False).tolist() == pytest.approx([1.0, 0.0, 3.0], abs=1e-7)


def test_a_mask_broadcasts() -> None:
    x = f64([[1.0, NAN], [3.0, NAN]])
    assert masked.masked_mean(x, torch.tensor([True, False])).item() == 2.0


def test_trap_06_whitening_one_or_equal_elements_is_zero() -> None:
    one = masked.whiten(f64([5.0, NAN]), torch.tensor([True, False]))
    assert one.tolist() == [0.0, 0.0]
    equal = torch.full((7,), 1000.1)  # float32: the mean of equal values is off by a rounding error
    assert masked.whiten(equal, torch.ones(7, dtype=torch.bool)).tolist() == [0.0] * 7
    none = masked.whiten(f64([NAN, INF]), torch.tensor([False, False]))
    assert none.tolist() == [0.0, 0.0]


def test_trap_05_the_mean_of_whitening_is_not_taken_over_padding() -> None:
    x, mask = f64([[1.0, 3.0, 0.0, 0.0]]), torch.tensor([[True, True, False, False]])
    assert masked.whiten(x, mask)[0, :2].tolist() == pytest.approx([-1.0, 1.0], abs=1e-7)


def test_trap_26_an_empty_mask_is_zero_and_has_zero_gradient() -> None:
    x = f64([NAN, INF, 1.0]).requires_grad_()
    mean = masked.masked_mean(x, torch.zeros(3, dtype=torch.bool))
    mean.backward()
    assert mean.item() == 0.0
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 0.0, 0.0]
    assert masked.masked_mean(x, torch.zeros(3, dtype=torch.bool), denominator=0).item() == 0.0


def test_the_gradient_of_a_mean_is_one_over_n_where_it_counts() -> None:
    x = X.clone().requires_grad_()
    masked.masked_mean(x, MASK).backward()
    assert x.grad is not None
    third = 1 / 3
    assert x.grad.tolist() == [[third, third, 0.0], [third, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_nan_behind_a_nonlinearity_does_not_leak_when_inputs_are_kept_first() -> None:
    x = f64([0.0, NAN, INF]).requires_grad_()
    mask = torch.tensor([True, False, False])
    masked.masked_sum(masked.keep(x, mask).exp(), mask).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 0.0, 0.0]


def test_reductions_by_hand() -> None:
    x = f64([[1.0, 2.0, 3.0], [5.0, NAN, NAN], [NAN, NAN, NAN]])
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    assert masked.reduced(x, mask, "token").item() == pytest.approx(11 / 4)
    assert masked.reduced(x, mask, "sequence").item() == pytest.approx((2 + 5) / 2)  # the empty row is none
    assert masked.reduced(x, mask, 10).item() == pytest.approx((6 / 10 + 5 / 10) / 2)
    assert [masked.count(mask, r).item() for r in ("token", "sequence", 10)] == [4, 2, 2]
    for wrong in ("tokens", 0, -1, True):
        with pytest.raises(ValueError, match="reduce must be"):
            masked.reduced(x, mask, wrong)


def test_token_logp_by_hand() -> None:
    # logits (ln 1, ln 3): probabilities 1/4, 3/4. At temperature 1/2 the logits double: 1/10, 9/10.
    logits, ids = f64([[0.0, math.log(3)], [0.0, math.log(3)]]), torch.tensor([0, 1])
    assert masked.token_logp(logits, ids).tolist() == pytest.approx([math.log(0.25), math.log(0.75)])
    assert masked.token_logp(logits, ids, 0.5).tolist() == pytest.approx([math.log(0.1), math.log(0.9)])


def test_entropy_by_hand() -> None:
    logits = f64([[0.0, 0.0, 0.0, 0.0], [0.0, math.log(3), -INF, -INF]])
    mixed = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert masked.entropy(logits).tolist() == pytest.approx([math.log(4), mixed])
    cold = -(0.1 * math.log(0.1) + 0.9 * math.log(0.9))
    assert masked.entropy(logits, 0.5)[1].item() == pytest.approx(cold)


def test_trap_10_an_excluded_token_reaches_neither_entropy_nor_its_gradient() -> None:
    logits = f64([0.0, 0.0, -INF]).requires_grad_()
    h = masked.entropy(logits)
    h.backward()
    assert h.item() == pytest.approx(math.log(2))
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-15)


def test_trap_12_temperature_divides_logits_and_not_log_probabilities() -> None:
    logits, ids, temperature = f64([[2.0, 1.0, -1.0]]), torch.tensor([0]), 0.7
    by_hand = 2 / 0.7 - math.log(sum(math.exp(v / 0.7) for v in (2.0, 1.0, -1.0)))
    assert masked.token_logp(logits, ids, temperature).item() == pytest.approx(by_hand)
    assert masked.token_logp(logits, ids, temperature).item() != pytest.approx(
        masked.token_logp(logits, ids).item() / temperature
    )
    with pytest.raises(ValueError, match="temperature"):
        masked.token_logp(logits, ids, 0.0)


def test_half_precision_is_computed_in_float32_and_float64_stays() -> None:
    logits, ids = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    half = logits.to(torch.bfloat16)
    assert masked.token_logp(half, ids).dtype == torch.float32
    assert torch.equal(masked.token_logp(half, ids), masked.token_logp(half.float(), ids))
    assert torch.equal(masked.entropy(half), masked.entropy(half.float()))
    assert masked.token_logp(logits.double(), ids).dtype == torch.float64
    many = torch.ones(100_000, dtype=torch.float16)  # the sum does not fit float16
    assert masked.masked_sum(many, torch.ones_like(many, dtype=torch.bool)).item() == 100_000


ROWS = st.lists(st.lists(st.floats(-1e3, 1e3), max_size=5), min_size=1, max_size=4)


@given(ROWS, st.sampled_from([NAN, INF, -INF, 1e30]))
def test_padding_with_anything_changes_nothing(rows: list[list[float]], filler: float) -> None:
    x = f64([row + [filler] * (6 - len(row)) for row in rows]).reshape(len(rows), 6)
    mask = torch.tensor([[True] * len(row) + [False] * (6 - len(row)) for row in rows])
    flat = [value for row in rows for value in row]
    mean = math.fsum(flat) / len(flat) if flat else 0.0
    assert masked.masked_mean(x, mask).item() == pytest.approx(mean, abs=1e-9)
    means = [math.fsum(row) / len(row) if row else 0.0 for row in rows]
    assert masked.masked_mean(x, mask, dim=1).tolist() == pytest.approx(means, abs=1e-9)


@given(st.lists(st.integers(-100, 100), min_size=1, max_size=12))
def test_whitened_values_have_mean_0_and_variance_1_or_are_all_0(values: list[int]) -> None:
    white = masked.whiten(f64([*values, NAN]), torch.tensor([True] * len(values) + [False]))[:-1]
    if len(set(values)) == 1:
        assert white.tolist() == [0.0] * len(values)
    else:
        assert white.mean().item() == pytest.approx(0, abs=1e-9)
        assert white.square().mean().item() == pytest.approx(1, abs=1e-6)
