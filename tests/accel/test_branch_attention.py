"""Attention of sequences that begin alike, each token once, against torch's kernel on whole sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from keel import accel
from keel.accel import attention, branch_attention
from keel.accel.attention import Rows
from keel.accel.batch_layout import BatchLayout, Group, _layout
from keel.accel.branch_attention import Branches

# three sequences that begin alike, one by itself, two of which one is the start of the other, and starts of
# several lengths
SEQUENCES = [
    [1, 2, 3, 4, 5],
    [1, 2, 3, 6, 7, 8, 9, 10],
    [1, 2, 3, 5],
    [8, 9, 7, 6],
    [4, 4, 4],
    [4, 4, 4, 2, 2],
]
GROUPS = [Group([0, 1, 2], 3, 11), Group([3], 4, 4), Group([4, 5], 3, 5)]
TOKENS = 20


class Owner(nn.Module):
    """What has the attention."""

    is_causal = True


def rows() -> tuple[Rows, list[list[int]]]:
    """The rows, and of each sequence the tokens that it is made of."""
    ids = torch.zeros(len(SEQUENCES), 8, dtype=torch.long)
    for row, sequence in zip(ids, SEQUENCES):
        row[: len(sequence)] = torch.tensor(sequence)
    every = torch.arange(ids.numel())
    laid = _layout(SEQUENCES, BatchLayout(GROUPS, True), ids, every, torch.float64)
    assert laid.rows is not None
    assert laid.ids.shape == (1, TOKENS)
    at = laid.index.view(ids.shape)
    return laid.rows, [at[i, : len(sequence)].tolist() for i, sequence in enumerate(SEQUENCES)]


def drawn(heads: int, shared: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, h, TOKENS, 8, dtype=dtype, requires_grad=True) for h in (heads, shared, shared)]


def apart(given: list[Tensor], sequences: list[list[int]], heads: int) -> Tensor:
    """(1, T, H, D): each sequence by itself, by torch's kernel."""
    found = torch.zeros(1, TOKENS, heads, 8, dtype=torch.float64)
    for tokens in sequences:
        q, k, v = (x.double()[:, :, tokens] for x in given)
        attended = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        found = found.index_copy(1, torch.tensor(tokens), attended)
    return found


def gradients(found: Tensor, given: list[Tensor]) -> list[Tensor]:
    pull = torch.linspace(-1, 2, found.numel(), dtype=found.dtype).cos().view_as(found)
    return list(torch.autograd.grad(found, given, pull, retain_graph=True))


@pytest.mark.parametrize("way", ["branches", "kernel"])
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_it_is_attention_of_whole_sequences(
    way: str, heads: int, shared: int, dtype: torch.dtype, close: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    laid, sequences = rows()
    given, module = drawn(heads, shared, dtype), Owner()
    module.num_key_value_groups = heads // shared  # pyright: ignore
    if way == "kernel":  # sequence by sequence, common starts again in each
        monkeypatch.setattr(attention, "half_attention", None)
        monkeypatch.setattr(branch_attention, "branch_attend", None)
    with accel.disabled(*(["branch_attention"] if way == "kernel" else [])):
        q, k, v = given
        ours, _ = attention.attend(module, q, k, v, attention.mask_for(laid, dtype))
    theirs = apart(given, sequences, heads)
    torch.testing.assert_close(ours.double(), theirs, rtol=close, atol=close)
    for a, b in zip(gradients(ours, given), gradients(theirs, given), strict=True):
        assert float((a.double() - b.double()).norm() / b.double().norm()) < close


def test_rows_of_similar_length_are_a_part_and_every_token_asks_once() -> None:
    groups = [
        (range(9), [range(9 + 100 * i, 9 + 100 * i + n) for i, n in enumerate([40, 3, 38, 4, 5, 39, 2, 37])])
    ]
    tokens = sorted({*range(9), *(t for row in groups[0][1] for t in row)})
    number = {token: i for i, token in enumerate(tokens)}
    branches = Branches.of(
        [([number[t] for t in a], [[number[t] for t in row] for row in b]) for a, b in groups]
    )
    assert [part.size for part in branches.parts] == [(1, 9, 9), (4, 40, 49), (4, 5, 14)]
    assert branches.scores() == 81 + 4 * 40 * 49 + 4 * 5 * 14
    asking = torch.cat([part.queries.flatten() for part in branches.parts])
    assert sorted(asking[asking >= 0].tolist()) == [*range(len(tokens))]
    # three short rows are not worth a part
    few = Branches.of([([], [range(n) for n in (40, 40, 40, 40, 3, 3, 3)])])
    assert [part.size for part in few.parts] == [(7, 40, 40)]


def test_what_it_is_not_for_goes_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    laid, _ = rows()
    query, module = drawn(2, 2)[0], Owner()

    def fits(more: dict[str, Any] | None = None, asked: Tensor = query) -> bool:
        return branch_attention.fits(module, asked, laid.branches, more or {})

    assert fits()
    assert not branch_attention.fits(module, query, None, {})
    assert not fits({"dropout": 0.1})
    assert not fits({"softcap": 30.0})
    assert not fits({"is_causal": False})
    assert not fits(asked=query.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not fits()
    with accel.disabled("branch_attention"):
        assert not fits()
    assert laid.branches is not None
    kept = 8 * 2 * laid.branches.scores()
    monkeypatch.setattr(branch_attention, "KEPT_AT_MOST", kept - 1)
    assert not fits()
    monkeypatch.setattr(branch_attention, "KEPT_AT_MOST", kept)
    assert fits()
    monkeypatch.setattr(branch_attention, "AT_MOST", 7)
    assert not fits()


def test_tokens_that_stand_again_get_the_gradients_of_all_their_places() -> None:
    laid, _ = rows()
    x = torch.randn(1, TOKENS, 3, dtype=torch.float64, requires_grad=True)
    assert laid.again is not None
    real = torch.cat([laid.where, laid.again[0]])  # all places but padding's
    assert len(real) == sum(map(len, SEQUENCES))
    assert torch.autograd.gradcheck(lambda x: laid.laid_out(x).flatten(0, 1).index_select(0, real), x)
    y = torch.randn(laid.rows, laid.width, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(laid.taken, y)
    torch.testing.assert_close(laid.taken(laid.laid_out(x)), x)
