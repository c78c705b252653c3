"""Adapters are put where they can be, and it is said where they are not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from keel.config.parts import LoraConfig
from keel.errors import UsageError
from keel.models import lora_targets
from keel.models.load import ModelSource, causal_lm
from keel.models.lora import Adapters, add_adapters, merged, put_on

MOE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
IDS = torch.arange(5, 17)[None]


def _model(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**MOE, **more})).eval()


def _trained(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize("kind", ["granitemoe", "phimoe", "jetmoe", "gpt_oss", "mixtral"])
def test_adapters_on_experts_train_and_are_merged(kind: str) -> None:
    model = add_adapters(_model(kind), Adapters(r=2, target_parameters="experts"), 0)
    assert lora_targets.frozen_experts(model) is None
    before = model(IDS).logits
    _trained(model)
    logits = model(IDS).logits
    assert not torch.allclose(before, logits)
    logits.sum().backward()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad and "expert" in name]
    assert trained or kind == "jetmoe"  # whose experts have other names
    assert all(p.grad is not None for _, p in trained)
    with torch.no_grad():
        torch.testing.assert_close(merged(model)(IDS).logits, logits, rtol=1e-3, atol=1e-5)


def test_what_stays_frozen_is_said_with_its_share() -> None:
    model = add_adapters(_model("granitemoe"), Adapters(r=2), 0)
    experts = sum(p.numel() for p in model.get_base_model().parameters() if p.dim() == 3)
    total = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    (line,) = lora_targets.notes(model)
    assert line.startswith(f"lora: {experts / total:.0%} of all weights stay frozen")
    assert "`lora.target_parameters: experts`" in line
    assert lora_targets.notes(add_adapters(_model("mixtral"), Adapters(r=2), 0)) == []  # peft reaches them


def test_a_router_that_is_no_plain_product_gets_no_adapter_and_a_plain_one_does() -> None:
    """PhiMoE's router returns more; Falcon's linear layers have a forward of their own that is a product."""
    model = add_adapters(_model("phimoe"), Adapters(r=2), 0)
    assert lora_targets.notes(model)[0] == "lora: no adapter on router, which one cannot be put on"
    assert lora_targets.left_out(_model("falcon", num_kv_heads=4)) == []


def test_a_layer_whose_weight_is_read_around_it_gets_no_adapter() -> None:
    small = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
    names = lora_targets.left_out(_model("bamba", **small, mamba_expand=2, attn_layer_indices=[1]))
    assert {name.rpartition(".")[2] for name in names} == {"out_proj"}


def test_layers_that_share_a_weight_are_left_out_of_all_linear(tiny_model: Path) -> None:
    model = causal_lm(ModelSource(str(tiny_model)), 0)
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    wrapped = add_adapters(model, Adapters(r=2), 0)
    assert not any("up_proj" in name and "lora" in name for name, _ in wrapped.named_parameters())
    assert lora_targets.notes(wrapped) == ["lora: no adapter on up_proj, which one cannot be put on"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_pro"]}, r"has no 'q_pro'; it has .*q_proj"),
        ({"target_parameters": "experts"}, r"experts has no effect: a LlamaForCausalLM holds none"),
    ],
)
def test_what_is_not_there_is_a_line_that_says_what_is(
    settings: dict[str, Any], message: str, tiny_model: Path
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        add_adapters(causal_lm(ModelSource(str(tiny_model)), 0), Adapters(r=2, **settings), 0)
    assert "\n" not in str(caught.value)


def test_adapters_that_break_a_models_forward_are_found_before_training(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = causal_lm(ModelSource(str(tiny_model)), 0)
    attention = type(model.model.layers[0].self_attn)
    forward = attention.forward

    def picky(self: Any, *arguments: Any, **more: Any) -> Any:
        if not isinstance(self.q_proj, nn.Linear) and not self.q_proj.disable_adapters:
            raise AttributeError("no such thing")
        return forward(self, *arguments, **more)

    monkeypatch.setattr(attention, "forward", picky)
    with pytest.raises(UsageError, match=r"cannot be read with these adapters \(no such thing\)"):
        add_adapters(model, Adapters(r=2, target_modules=["q_proj"]), 0)


def test_dropout_has_no_place_on_weights() -> None:
    with pytest.raises(ValueError, match="`target_parameters` needs `dropout: 0`"):
        LoraConfig(target_parameters="experts", dropout=0.1)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_of_embeddings_that_peft_saved_goes_on_its_base_alone(target: str, tmp_path: Path) -> None:
    """peft saves the base's matrix beside it."""
    base, ids = _model("llama", tie_word_embeddings=False), IDS
    plain = copy.deepcopy(base)
    wrapped: Any = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", target])).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = wrapped(ids).logits
        torch.testing.assert_close(put_on(copy.deepcopy(plain), tmp_path)(ids).logits, expected)
        plain.get_submodule("model.embed_tokens" if target == "embed_tokens" else target).weight.add_(1)
    with pytest.raises(UsageError, match=rf"trained on another base_model.*{target}.*weight"):
        put_on(plain, tmp_path)
