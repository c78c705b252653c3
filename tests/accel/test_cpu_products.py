"""Products in float32 by oneDNN, against torch's own and through layers: one made to be the faster, whatever
processor the tests run on."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from keel import accel
from keel.accel import cpu_products
from keel.accel.cpu_linear import grads_in_place, patch_linears
from keel.accel.patches import AccelWarning, disabled

WIDE, INNER = 192, 256


class Gated(nn.Module):
    """down(silu(gate(x)) · up(x))"""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDE, INNER, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(INNER, WIDE, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """oneDNN is the faster, and what it multiplies is counted: rows, and the shape of the matrix."""
    cpu_products._differs.cache_clear()
    assert cpu_products._differs() is None
    monkeypatch.setattr(cpu_products, "_is_faster", lambda: True)
    monkeypatch.setattr(cpu_products, "LEAST", 32)
    monkeypatch.setattr(cpu_products, "WORTH", 2**14)
    seen: list[tuple[int, ...]] = []
    plain = cpu_products._by_onednn

    def by_onednn(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append((len(rows), *weight.shape))
        return plain(rows, weight, bias)

    monkeypatch.setattr(cpu_products, "_by_onednn", by_onednn)
    yield seen
    cpu_products._differs.cache_clear()


def pulled(model: nn.Module, x: Tensor, *, in_place: bool) -> list[Tensor]:
    """Values, and the gradients of input and weights."""
    x = x.clone().requires_grad_()
    found: Tensor = model(x)
    loss = (found * torch.linspace(-1, 2, found.numel(), dtype=x.dtype).view_as(found)).sum()
    if in_place:
        with grads_in_place():
            loss.backward()
    else:
        loss.backward()
    gradients = [x.grad, *(p.grad for p in model.parameters())]
    return [found.detach(), *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("rows", [(4, 16), (3, 23)])  # 64 is a size, 69 is filled up to 72
def test_values_and_gradients_are_those_in_float64(
    rows: tuple[int, int], in_place: bool, counted: list[tuple[int, ...]]
) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(WIDE, WIDE), Gated())
    ours, x = patch_linears(copy.deepcopy(plain)), torch.randn(*rows, WIDE)
    expected = pulled(copy.deepcopy(plain).double(), x.double(), in_place=False)
    counted.clear()
    found = pulled(ours, x, in_place=in_place)
    size = 64 if rows == (4, 16) else 72
    both = [(WIDE, WIDE)] * 2 + [(INNER, WIDE)] * 3 + [(WIDE, INNER)] * 3  # forward, and the input's gradient
    assert sorted(counted) == sorted((size, *matrix) for matrix in both)
    assert len(found) == len(expected) == 7
    for one, other in zip(found, expected, strict=True):
        assert float((one.double() - other).norm() / other.norm()) < 1e-6


def test_without_gradient_and_without_the_path(counted: list[tuple[int, ...]]) -> None:
    plain, x = nn.Sequential(nn.Linear(WIDE, WIDE), Gated()), torch.randn(3, 23, WIDE)
    ours = patch_linears(copy.deepcopy(plain))
    with torch.no_grad():
        counted.clear()
        found, expected = ours(x), plain(x)
        assert [shape[0] for shape in counted] == [72] * 4
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        counted.clear()
        with accel.disabled("cpu_products"):
            assert torch.equal(ours(x), expected)
        ours(x[:1])  # too few rows
        assert counted == []


def test_frozen_weights_are_multiplied_alike_with_and_without_gradient(
    counted: list[tuple[int, ...]],
) -> None:
    """As under adapters: the first ratio of a policy's update is exactly 1."""
    plain, x = nn.Sequential(nn.Linear(WIDE, WIDE), Gated()).requires_grad_(False), torch.randn(3, 23, WIDE)
    ours = patch_linears(copy.deepcopy(plain))
    with torch.no_grad():
        scored = ours(x)
    kept: list[torch.Size] = []
    counted.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y.shape) or y, lambda y: y):
        found = pulled(ours, x, in_place=True)
    assert torch.equal(found[0], scored)
    assert len(counted) == 8  # forward, and the input's gradient
    assert (72, WIDE) not in kept  # no input is kept for the gradient of a weight
    expected = pulled(copy.deepcopy(plain).double(), x.double(), in_place=False)
    assert len(found) == len(expected) == 2
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_left_alone(dtype: torch.dtype, counted: list[tuple[int, ...]]) -> None:
    model = patch_linears(nn.Sequential(nn.Linear(WIDE, WIDE)))
    counted.clear()
    pulled(model.to(dtype), torch.randn(64, WIDE, dtype=dtype), in_place=False)
    assert counted == []


@pytest.mark.parametrize("rows", [32, 33, 1000, 1024, 1025, 5000])
def test_rows_are_filled_up_by_a_sixteenth_at_most(rows: int) -> None:
    weight = torch.empty(WIDE, WIDE)
    size = cpu_products.size_of(rows, weight)
    assert rows <= size < rows * 17 / 16
    assert cpu_products.size_of(size, weight) == size
    octave = {cpu_products.size_of(n, weight) for n in range(1025, 2049)}
    assert len(octave) == 16
    assert cpu_products.size_of(rows, torch.empty(8, 8)) == rows  # a matrix that takes no time


def test_it_is_the_processor_that_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    decide: Any = cpu_products._is_faster.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for vendor, answer in (("AuthenticAMD", True), ("GenuineIntel", False), ("", False)):
        monkeypatch.setattr(cpu_products, "_vendor", lambda vendor=vendor: vendor)
        assert decide() is answer
    monkeypatch.setattr(cpu_products, "_vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert decide() is False


def test_a_product_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = cpu_products._by_onednn
    monkeypatch.setattr(cpu_products, "_by_onednn", lambda *given: 1.1 * plain(*given))
    cpu_products._differs.cache_clear()
    with pytest.warns(AccelWarning, match="cpu_products is off"):
        assert not cpu_products.faster(64, torch.empty(WIDE, WIDE))
    assert math.isclose(cpu_products.product(torch.ones(64, WIDE), torch.ones(WIDE, WIDE))[0, 0], WIDE)


def wide_parts(monkeypatch: pytest.MonkeyPatch, slow: bool) -> list[int]:
    """Products in parts of ten rows, on a processor that is slow without or not; how many were taken."""
    monkeypatch.setattr(cpu_products, "_is_faster", lambda: False)
    monkeypatch.setattr(cpu_products, "_is_slow_at_once", lambda: slow)
    monkeypatch.setattr(cpu_products, "PART", 10)
    cpu_products._parts_differ.cache_clear()
    assert cpu_products._parts_differ() is None
    taken: list[int] = []
    plain = cpu_products._by_parts

    def by_parts(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        taken.append(len(rows))
        return plain(rows, weight, bias)

    monkeypatch.setattr(cpu_products, "_by_parts", by_parts)
    return taken


@pytest.mark.parametrize("bias", [False, True])
def test_wide_results_are_multiplied_in_parts(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = wide_parts(monkeypatch, slow=True)
    torch.manual_seed(0)
    layer = nn.Linear(192, 777, bias=bias)
    ours, x = patch_linears(nn.Sequential(copy.deepcopy(layer))), torch.randn(2, 9, 192)
    taken.clear()
    values, theirs = pulled(ours, x, in_place=True), pulled(layer, x, in_place=False)
    assert taken == [18]
    torch.testing.assert_close(values, theirs)
    with torch.no_grad():  # what is scored is what is trained, to the bit
        assert torch.equal(ours(x), values[0])
        assert taken == [18, 18]
        with disabled("wide_products"):
            ours(x)
        ours(x.expand(60, -1, -1, -1).flatten(0, 1))  # many rows
        ours[0].weight.requires_grad_(False)
        assert torch.equal(ours(x), values[0])
    assert taken == [18, 18, 18]


def test_narrow_results_and_other_processors_are_multiplied_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    wide_parts(monkeypatch, slow=True)
    assert cpu_products.in_parts(8, torch.zeros(40 * 4, 40))
    assert not cpu_products.in_parts(8, torch.zeros(40 * 4 - 1, 40))
    assert not cpu_products.in_parts(8, torch.zeros(40, 40 * 4).t())
    taken = wide_parts(monkeypatch, slow=False)
    cpu_products.product(torch.zeros(8, 40), torch.zeros(400, 40))
    assert not taken


def test_products_in_parts_that_come_out_otherwise_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    wide_parts(monkeypatch, slow=True)
    plain = cpu_products._by_parts
    cpu_products._parts_differ.cache_clear()
    monkeypatch.setattr(cpu_products, "_by_parts", lambda *given: plain(*given) * 1.1)
    with pytest.warns(AccelWarning, match="wide_products is off"):
        assert not cpu_products.in_parts(8, torch.zeros(400, 40))
    cpu_products._parts_differ.cache_clear()
