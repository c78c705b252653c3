"""Norms and rotations as one step each, against transformers' own modules."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from keel.accel import norm_and_rope
from keel.accel.modules import is_patched
from keel.accel.norm_and_rope import patch_norms_and_rope
from keel.accel.patches import AccelWarning

sys.path.insert(0, str(Path(__file__).parents[1] / "architectures"))
import zoo

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 97,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# how many norms and attention modules are changed; Gemma's norms multiply by 1 + weight
CHANGED: dict[str, tuple[int, int]] = {
    "llama": (5, 2),
    "mistral": (5, 2),
    "qwen2": (5, 2),
    "qwen3": (9, 2),
    "mixtral": (5, 2),
    "phi3": (5, 2),
    "olmo2": (9, 2),
    "gemma": (0, 2),
    "gemma3_text": (0, 2),
    "gpt_neox": (0, 2),
    "gpt2": (0, 0),
    "opt": (0, 0),
}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16], [3, 3, 4, 4, 5, 5]])


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    own = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
        "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    }
    sizes = SIZES if CHANGED[kind][1] else {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}
    if kind in ("gpt_neox", "opt"):
        sizes = {k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads")}
    config = AutoConfig.for_model(kind, **{**sizes, **own.get(kind, {})})
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # norms begin as all ones, or all zeros
    return model.eval()


def pulled(model: Any, **how: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of a function of them."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, **how):
        logits = model(IDS).logits
    (logits.float() * torch.linspace(-1, 2, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def changed(model: Any) -> list[str]:
    return [type(m).__name__ for m in model.modules() if is_patched(m, "norm_and_rope")]


@pytest.mark.parametrize("kind", CHANGED)
def test_states_and_gradients_are_those_of_the_modules(kind):
    plain = model_of(kind)
    quick = patch_norms_and_rope(copy.deepcopy(plain))
    found = Counter("norm" if name.endswith("Norm") else "attention" for name in changed(quick))
    assert (found["norm"], found["attention"]) == CHANGED[kind]
    (one, by_one), (two, by_two) = pulled(plain, enabled=False), pulled(quick, enabled=False)
    assert torch.equal(two, one)
    assert by_one.keys() == by_two.keys()
    for name, gradient in by_one.items():
        torch.testing.assert_close(by_two[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_in_bfloat16_too(kind):
    plain = model_of(kind)
    (one, by_one), (two, by_two) = (
        pulled(plain, enabled=True),
        pulled(patch_norms_and_rope(copy.deepcopy(plain)), enabled=True),
    )
    assert one.dtype == two.dtype == torch.bfloat16
    assert torch.equal(two, one)
    for name, gradient in by_one.items():
        assert (by_two[name] - gradient).norm() < 0.1 * gradient.norm(), name


def test_fewer_bytes_are_kept_for_the_backward():
    def kept(model: Any) -> int:
        seen: dict[int, int] = {}

        def keep(x: Tensor) -> Tensor:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(IDS.repeat(4, 4)).logits.sum()  # which holds what it kept
        total = sum(seen.values())
        del loss
        return total

    plain = model_of("llama")
    quick = patch_norms_and_rope(copy.deepcopy(plain))
    norms = 5 * IDS.numel() * 16 * SIZES["hidden_size"] * 4  # what each norm's weight is multiplied with
    assert kept(plain) - kept(quick) >= norms


def test_a_second_time_changes_nothing_and_copies_are_changed_too():
    model = patch_norms_and_rope(model_of("llama"))
    names = changed(model)
    kinds = [type(m) for m in model.modules()]
    assert [type(m) for m in patch_norms_and_rope(model).modules()] == kinds
    assert changed(copy.deepcopy(model)) == names
    assert patch_norms_and_rope(model_of("llama")).model.norm.__class__ is model.model.norm.__class__


def test_double_precision_goes_through_the_modules_themselves():
    plain = model_of("llama").double()
    quick = patch_norms_and_rope(model_of("llama")).double()
    assert torch.equal(plain(IDS).logits, quick(IDS).logits)


def test_a_rotation_of_another_kind_is_left_alone(monkeypatch):
    from transformers.models.llama import modeling_llama

    def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        return q * cos.unsqueeze(1), k * sin.unsqueeze(1)

    monkeypatch.setattr(modeling_llama, norm_and_rope.ROTATION, interleaved)
    with pytest.warns(AccelWarning, match="norm_and_rope is off for LlamaAttention"):
        model = patch_norms_and_rope(model_of("llama"))
    assert "LlamaAttention" not in changed(model)


def test_a_rotation_that_is_called_otherwise_is_transformers_own():
    """Of one tensor alone, as the indexer of sparse attention calls it."""
    model = zoo.build("qwen4_exp_text")
    expected = model(IDS).logits
    quick = patch_norms_and_rope(copy.deepcopy(model))
    torch.testing.assert_close(quick(IDS).logits, expected, atol=1e-4, rtol=1e-4)
