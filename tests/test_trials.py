"""The shortcut of the tests: a trial of a fast path is run once for models that differ in weights alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

SIZES = {
    "vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 16,
}  # fmt: skip
RAN: list[str | None] = []


def tiny(**more: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **more}))


def trial_of(model: Any, why: str | None = None) -> Callable[[], str | None]:
    def trial() -> str | None:
        assert model is not None
        RAN.append(why)
        return why

    return trial


@pytest.fixture
def memory(trials: Any) -> Any:
    RAN.clear()
    made = trials(lambda trial: trial())
    made.on = True
    return made


def test_models_with_other_weights_are_alike(memory: Any) -> None:
    for seed in (0, 1):
        torch.manual_seed(seed)
        assert memory(trial_of(tiny())) is None
    assert RAN == [None]
    memory.on = False
    memory(trial_of(tiny()))
    assert RAN == [None, None]


def _in_training(model: Any) -> None:
    model.train(not model.training)


def _hooked(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)


def _frozen(model: Any) -> None:
    model.model.norm.weight.requires_grad_(False)


def _with_own_forward(model: Any) -> None:
    model.lm_head.forward = lambda x: x


def _of_another_kernel(model: Any) -> None:
    model.config._attn_implementation = "eager"


def _tied(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


CHANGES = (_in_training, _hooked, _frozen, _with_own_forward, _of_another_kernel, _tied)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_model_that_computes_otherwise_is_tried(memory: Any, change: Callable[[Any], None]) -> None:
    memory(trial_of(tiny()))
    other = tiny()
    change(other)
    memory(trial_of(other))
    assert len(RAN) == 2


@pytest.mark.parametrize("more", [{"hidden_size": 16}, {"rms_norm_eps": 1e-3}, {"attention_bias": True}])
def test_a_model_of_another_config_is_tried(memory: Any, more: dict[str, Any]) -> None:
    memory(trial_of(tiny()))
    memory(trial_of(tiny(**more)))
    memory(trial_of(tiny().double()))
    assert len(RAN) == 3


def test_a_transformers_that_changed_is_tried(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory(trial_of(tiny()))
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: x)
    memory(trial_of(tiny()))
    assert len(RAN) == 2


def test_what_differs_is_tried_each_time(memory: Any) -> None:
    assert [memory(trial_of(tiny(), "logits differ")) for _ in range(2)] == ["logits differ"] * 2
    assert RAN == ["logits differ"] * 2
