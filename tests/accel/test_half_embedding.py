"""Gradients of embeddings in half precision, against sums in float64, and what is left to torch."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from keel import accel
from keel.accel import half_embedding
from keel.accel.half_embedding import patch_embeddings
from keel.accel.modules import is_patched
from keel.accel.patches import AccelWarning, all_enabled

ROWS, WIDTH = 40, 8


@pytest.fixture(autouse=True)
def on():
    with all_enabled():
        half_embedding._tried.cache_clear()
        yield
    half_embedding._tried.cache_clear()


def table(dtype: torch.dtype = torch.bfloat16, **more: Any) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(ROWS, WIDTH, **more).to(dtype)


def frequent() -> tuple[Tensor, Tensor]:
    """(4, 1000) ids of which half are one token, and what is sent back to each, with a direction in it."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, ROWS, (4, 1000), generator=generator)
    ids[:, ::2] = 7
    return ids, (torch.randn(4, 1000, WIDTH, generator=generator) * 0.1 + 0.05)


def gradient(module: nn.Module, ids: Tensor, pull: Tensor) -> Tensor:
    (module(ids) * pull.to(next(module.parameters()).dtype)).sum().backward()
    found = next(module.parameters()).grad
    assert found is not None
    return found.double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_frequent_token_gets_its_whole_gradient(dtype: torch.dtype) -> None:
    ids, pull = frequent()
    exact = gradient(table(torch.float64), ids, pull.to(dtype))
    plain, ours = table(dtype), table(dtype)
    patch_embeddings(ours)
    assert is_patched(ours, "half_embedding")
    torch.testing.assert_close(ours(ids), plain(ids), rtol=0, atol=0)
    found = gradient(ours, ids, pull)
    assert ours.weight.grad is not None
    assert ours.weight.grad.dtype == dtype
    half_a_step = torch.finfo(dtype).eps / 2  # one rounding
    torch.testing.assert_close(found, exact, rtol=1.01 * half_a_step, atol=1e-4)
    if dtype == torch.bfloat16:
        lost = gradient(plain, ids, pull)[7]  # torch's: goes with this path once it is right
        assert (lost - exact[7]).norm() > 0.02 * exact[7].norm()


def test_a_model_in_bfloat16_learns_its_embeddings_as_one_in_float32() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).bfloat16()
    ids = torch.randint(0, 50, (8, 256), generator=torch.Generator().manual_seed(0))
    ids[:, ::2] = 7
    off: list[float] = []
    exact = copy.deepcopy(model).float()
    for one in (exact, copy.deepcopy(model), accel.prepare(model)):
        one(input_ids=ids, labels=ids).loss.backward()
        found, wanted = (x.get_parameter("model.embed_tokens.weight").grad for x in (one, exact))
        assert found is not None
        assert wanted is not None
        off.append(((found.double() - wanted.double()).norm() / wanted.double().norm()).item())
    assert off[2] < 0.02
    assert off[1] > 3 * off[2]


def test_a_pads_row_sends_nothing_back() -> None:
    ids, pull = frequent()
    ours = patch_embeddings(table(padding_idx=7))
    found = gradient(ours, ids, pull)
    assert not found[7].any()
    assert found[8].any()


@pytest.mark.parametrize("more", [{"sparse": True}, {"scale_grad_by_freq": True}, {"max_norm": 1.0}])
def test_other_kinds_are_left_to_torch(more: dict[str, Any]) -> None:
    assert not is_patched(patch_embeddings(table(**more)), "half_embedding")


def test_float32_and_classes_of_their_own_are_left_to_torch() -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    assert type(patch_embeddings(table(torch.float32))) is nn.Embedding
    assert type(patch_embeddings(Scaled(ROWS, WIDTH).bfloat16())) is Scaled


def test_switched_off_undone_copied_and_pickled() -> None:
    ids, pull = frequent()
    plain = gradient(table(), ids, pull)
    ours = patch_embeddings(table())
    with accel.disabled("half_embedding"):
        torch.testing.assert_close(gradient(ours, ids, pull), plain, rtol=0, atol=0)
    assert is_patched(copy.deepcopy(ours), "half_embedding")
    assert type(pickle.loads(pickle.dumps(ours))) is nn.Embedding
    assert type(accel.restore(ours)) is nn.Embedding


def test_it_is_off_where_its_sums_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_embedding, "_torchs", lambda table, ids, pad: 1.1 * table[ids])
    ours = table()
    with pytest.warns(AccelWarning, match="half_embedding is off"):
        patch_embeddings(ours)
    assert type(ours) is nn.Embedding
