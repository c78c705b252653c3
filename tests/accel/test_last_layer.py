"""The last layer at some positions alone, against the whole of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from keel.accel import batch_layout, last_layer
from keel.accel.norm_and_rope import patch_norms_and_rope
from keel.models import logprobs, packing
from keel.models.load import checkpoint_activations
from keel.models.lora import Adapters, add_adapters

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 97,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
KNOWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
}
OTHER: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4},
    "gemma": {},
    "llama": {"attn_implementation": "eager"},
}
WIDTH = 9
IDS = torch.arange(3 * WIDTH).view(3, WIDTH) % 90 + 1
# the first row's end, one position of the second twice, nothing of the third but its first
INDEX = torch.tensor([6, 7, 8, WIDTH + 4, WIDTH + 4, 2 * WIDTH])
NEEDED = 9 + 5 + 1  # tokens up to the last of these in each row


def model_of(kind: str, more: dict[str, Any], auto: Any = AutoModelForCausalLM) -> Any:
    torch.manual_seed(0)
    how = {"attn_implementation": "sdpa"} | {k: v for k, v in more.items() if k == "attn_implementation"}
    config = AutoConfig.for_model(kind, **{**SIZES, **more})
    return patch_norms_and_rope(auto.from_config(config, **how).double()).eval()


class Seen:
    """How many positions the last feed-forward part was given."""

    def __init__(self, model: Any) -> None:
        self.positions = 0
        plain = model.get_base_model() if hasattr(model, "peft_config") else model
        plain.base_model.layers[-1].mlp.register_forward_hook(self.count)

    def count(self, _: Any, inputs: tuple[Tensor, ...], __: Any) -> None:
        self.positions = inputs[0].numel() // inputs[0].shape[-1]


def pulled(model: Any, found: Tensor) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    (found * torch.linspace(-1, 2, found.numel(), dtype=found.dtype).view_as(found)).sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same(model: Any, read: Any, monkeypatch: pytest.MonkeyPatch, positions: int) -> None:
    seen = Seen(model)
    found = read()
    assert seen.positions == positions
    by_found = pulled(model, found)
    monkeypatch.setattr(last_layer, "WORTH", math.inf)
    whole = read()
    assert seen.positions > positions
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found, whole, **close)
    by_whole = pulled(model, whole)
    assert len(by_found) == len(by_whole) > 0
    for a, b in zip(by_found, by_whole, strict=True):
        torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("kind", KNOWN)
def test_states_and_gradients_are_those_of_the_whole_layer(kind, monkeypatch):
    model = model_of(kind, KNOWN[kind])
    assert_same(model, lambda: logprobs.head_inputs(model, IDS, INDEX).values, monkeypatch, positions=5)


@pytest.mark.parametrize("kind", KNOWN)
def test_under_a_mask_of_ones_own(kind, monkeypatch):
    """As packed rows have, and rows that are read together."""
    model = model_of(kind, KNOWN[kind])
    segments = torch.tensor([[0] * 4 + [1] * 5, [0] * 9, [0] * 2 + [1] * 2 + [2] * 5])
    positions = torch.tensor([[*range(4), *range(5)], [*range(9)], [0, 1, 0, 1, *range(5)]])
    inputs = {"attention_mask": packing.packed_mask(segments, torch.float64), "position_ids": positions}
    assert_same(
        model, lambda: logprobs.head_inputs(model, IDS, INDEX, inputs=inputs).values, monkeypatch, positions=5
    )


def test_with_a_prompt_that_two_rows_share(monkeypatch):
    monkeypatch.setattr(batch_layout, "DEARER", 0)  # reading together is taken to pay
    model = model_of("llama", {})
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 20, 21], [5, 6, 7, 8, 9, 10, 22, 23]])
    index = torch.tensor([5, 6, 8 + 5, 8 + 6])
    with batch_layout.counting() as count:
        logprobs.head_inputs(model, ids, index)
        assert count() == 10 - 2  # the last token of neither is needed
    assert_same(model, lambda: logprobs.head_inputs(model, ids, index).values, monkeypatch, positions=3)


def test_scores_need_one_position_a_row(monkeypatch):
    model = model_of("llama", {"num_labels": 1}, AutoModelForSequenceClassification)
    ends = torch.tensor([8, WIDTH + 3, 2 * WIDTH + 6])
    assert_same(model, lambda: logprobs.scores_at(model, IDS, ends), monkeypatch, positions=3)


def test_with_adapters(monkeypatch):
    model = add_adapters(model_of("llama", {}), Adapters(r=2), 0)
    model = model.double().eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    assert_same(model, lambda: logprobs.head_inputs(model, IDS, INDEX).values, monkeypatch, positions=5)


@pytest.mark.parametrize("kind", OTHER)
def test_the_whole_layer_is_computed_where_another_attention_is_asked_for(kind):
    model = model_of(kind, OTHER[kind])
    seen = Seen(model)
    logprobs.head_inputs(model, IDS, INDEX)
    assert seen.positions == (NEEDED if kind == "gemma" else IDS.numel())


def test_with_recomputed_activations(monkeypatch):
    model = model_of("llama", {}).train()
    checkpoint_activations(model)
    assert_same(model, lambda: logprobs.head_inputs(model, IDS, INDEX).values, monkeypatch, positions=5)
    assert model.model.layers[-1].gradient_checkpointing


def test_the_whole_layer_is_computed_where_something_is_wrapped_around_it():
    model = model_of("llama", {}).train()
    seen, layer = Seen(model), model.model.layers[-1]
    layer.forward = layer.forward  # as offloading libraries do
    logprobs.head_inputs(model, IDS, INDEX)
    assert seen.positions == NEEDED
    del layer.forward
    logprobs.head_inputs(model, IDS, INDEX)
    assert seen.positions == 5


def test_an_error_leaves_the_layer_as_it_was():
    model = model_of("llama", {})
    with pytest.raises(RuntimeError, match="stop"), last_layer.last_layer_at(model, INDEX, IDS.shape):
        raise RuntimeError("stop")
    seen = Seen(model)
    model(input_ids=IDS)
    assert seen.positions == IDS.numel()


def test_long_rows_most_of_which_is_looked_at_take_the_kernel_that_needs_no_mask(monkeypatch):
    layer = model_of("llama", {}).model.layers[-1]

    def worth(share: float, length: int, rows: int = 2) -> bool:
        each = torch.arange(round(share * length))
        index = torch.cat([row * length + each for row in range(rows)])
        return last_layer._worth_it(layer, index, (rows, length), None)

    assert [worth(share, 32) for share in (0.1, 0.7, 0.99, 1.0)] == [True, True, False, False]
    assert [worth(share, 1024) for share in (0.01, 0.1, 0.7)] == [True, True, False]
    assert not worth(0.0, 32)
    monkeypatch.setattr(last_layer, "MASK_AT_MOST", 4 * 2 * 16 * 32 - 1)
    assert not worth(0.5, 32)
    assert worth(0.4, 32)
