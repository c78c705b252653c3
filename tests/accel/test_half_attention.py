"""Attention of short rows in bfloat16 against torch's kernel: values, gradients, and what it is not for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from keel import accel
from keel.accel import attention, half_attention
from keel.accel.patches import AccelWarning, all_enabled


@pytest.fixture(autouse=True)
def on():
    with all_enabled():
        half_attention._differs.cache_clear()
        yield
    half_attention._differs.cache_clear()


class Owner(nn.Module):
    """What transformers' kernels are given as the module."""

    is_causal = True

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def drawn(rows: int, heads: int, asking: int, keys: int, groups: int = 1, width: int = 16) -> list[Tensor]:
    """Queries, keys and values that bfloat16 holds exactly, in float32, with gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, asking), (heads // groups, keys), (heads // groups, keys))
    made = [torch.randn(rows, h, n, width, generator=generator).bfloat16().float() for h, n in shapes]
    return [x.requires_grad_() for x in made]


def masks(rows: int, asking: int, keys: int) -> dict[str, Tensor | None]:
    seen = torch.arange(keys) <= torch.arange(keys - asking, keys)[:, None]
    padded = seen[None, None].repeat(rows, 1, 1, 1)
    padded[0, ..., 1] &= False
    padded[0, 0, :, 0] = True
    additive = torch.zeros(padded.shape).masked_fill(~padded, torch.finfo(torch.float32).min)
    return {"bool": padded, "additive": additive, **({"causal": None} if asking == keys else {})}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("asking", "keys"), [(33, 33), (5, 20)])
def test_values_and_gradients_are_those_of_torchs_kernel_to_rounding(groups: int, asking: int, keys: int):
    given = drawn(3, 4, asking, keys, groups)
    for name, mask in masks(3, asking, keys).items():
        with torch.autocast("cpu", torch.bfloat16):
            ours, _ = attention.attend(Owner(groups), *given, mask, scaling=0.3)
        assert ours.dtype == torch.bfloat16, "computed elsewhere"
        q, k, v = given[0], *(x.repeat_interleave(groups, dim=1) for x in given[1:])
        theirs = scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=0.3).transpose(
            1, 2
        )
        pull = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1))
        close = {"rtol": 0.05, "atol": 0.03}
        torch.testing.assert_close(ours.float(), theirs, **close, msg=lambda text, n=name: f"{n}: {text}")
        found = torch.autograd.grad(ours, given, pull.bfloat16())
        for a, b in zip(found, torch.autograd.grad(theirs, given, pull), strict=True):
            assert float((a - b).norm()) < 0.02 * float(b.norm()), name


@pytest.mark.parametrize(
    ("more", "asking", "keys", "mask"),
    [
        ({"dropout": 0.1}, 6, 6, None),
        ({"softcap": 30.0}, 6, 6, None),
        ({"is_causal": False}, 6, 6, None),
        ({}, 1, 6, None),
        ({}, 3, 6, None),  # without a mask nobody knows what they see
        ({}, half_attention.AT_MOST + 1, half_attention.AT_MOST + 1, None),
    ],
)
def test_what_it_is_not_for(more: dict[str, Any], asking: int, keys: int, mask: Tensor | None):
    q, k, _ = drawn(1, 2, asking, keys)
    assert half_attention.fits(Owner(), *drawn(1, 2, 6, 6)[:2], None, {})
    assert not half_attention.fits(Owner(), q, k, mask, more)


def test_too_many_probabilities_are_not_kept(monkeypatch: pytest.MonkeyPatch):
    q, k, _ = drawn(2, 2, 6, 6)
    monkeypatch.setattr(half_attention, "KEPT_AT_MOST", 2 * 2 * 2 * 36)
    assert half_attention.fits(Owner(), q, k, None, {})
    monkeypatch.setattr(half_attention, "KEPT_AT_MOST", 2 * 2 * 2 * 36 - 1)
    assert not half_attention.fits(Owner(), q, k, None, {})


def test_off_or_without_autocast_or_in_float16_torchs_kernel_computes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(half_attention, "half_attend", None)
    given = drawn(1, 2, 6, 6)
    attention.attend(Owner(), *given, None)
    with torch.autocast("cpu", torch.float16):
        attention.attend(Owner(), *given, None)
    with torch.autocast("cpu", torch.bfloat16), accel.disabled("half_attention"):
        assert attention.attend(Owner(), *given, None)[0].dtype == torch.float32


def test_where_torch_computes_something_else_it_says_so_and_is_off(monkeypatch: pytest.MonkeyPatch):
    forward = half_attention._Attention.forward
    monkeypatch.setattr(half_attention._Attention, "forward", lambda *given: 1.2 * forward(*given))
    q, k, _ = drawn(1, 2, 6, 6)
    with pytest.warns(AccelWarning, match="half_attention is off"):
        assert not half_attention.fits(Owner(), q, k, None, {})


def test_a_row_in_which_nothing_is_seen_is_a_number():
    given = drawn(1, 2, 4, 4)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 1:, 0] = True
    with torch.autocast("cpu", torch.bfloat16):
        ours, _ = attention.attend(Owner(), *given, mask)
    assert ours.isfinite().all()


@pytest.mark.parametrize("tiles", [False, True])
def test_a_single_position_asks_in_float32_where_that_is_faster(
    tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without AMX; what comes out is that of its own kernel in float32."""
    monkeypatch.setattr(attention, "has_half_tiles", lambda: tiles)
    query, key, value = drawn(2, 2, 1, 6)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention.attend(Owner(), query, key, value, None)[0]
    assert found.dtype == (torch.bfloat16 if tiles else torch.float32)
    plain = scaled_dot_product_attention(query.float(), key.float(), value.float()).transpose(1, 2)
    torch.testing.assert_close(found.float(), plain, rtol=0, atol=2e-2 if tiles else 1e-6)
