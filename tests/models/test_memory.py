"""Bytes: activations against what autograd really saves, caches against real ones, sums against hand-worked ones."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from keel.models import memory, shapes
from keel.models.adapters import Adapters, add_adapters
from keel.models.fused import fuse
from keel.models.load import checkpoint_activations, disable_dropout
from keel.models.memory import Lora, Model, Pass

ROWS, LENGTH = 2, 40


def _saved_by_autograd(
    config: Any, dtype: torch.dtype, *, lora: bool, dropout: bool, checkpointing: bool
) -> int:
    """Bytes of the distinct tensors that the backbone's forward keeps for its backward, parameters aside."""
    family: Any = (
        AutoModelForSequenceClassification if config.model_type in shapes.ENCODERS else AutoModelForCausalLM
    )
    model: Any = fuse(family.from_config(config, dtype=dtype))
    if lora:
        model = add_adapters(model, Adapters(r=4), 0)
    if not dropout:
        disable_dropout(model)
    if checkpointing:
        checkpoint_activations(model)
    model.train()
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    backbone = model.get_base_model().base_model if lora else model.base_model
    cache = {} if config.model_type in shapes.ENCODERS else {"use_cache": False}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = backbone(input_ids=torch.randint(1, 101, (ROWS, LENGTH)), **cache)
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _model(config: Any, **settings: Any) -> Model:
    shape = shapes.of_config(config)
    assert shape is not None
    return Model(shape, trained=True, device="cpu", **settings)


@pytest.mark.parametrize("kind", shapes.FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "lora", "dropout"),
    [
        ("float32", False, False),
        ("float32", False, True),
        ("float32", True, False),
        ("bfloat16", True, False),
    ],
)
def test_activations_are_those_that_autograd_saves(config_of, kind, dtype, lora, dropout):
    """To 4 %: the first block saves less where the embeddings are frozen, and token ids are not counted."""
    found = _saved_by_autograd(
        config_of(kind), getattr(torch, dtype), lora=lora, dropout=dropout, checkpointing=False
    )
    model = _model(config_of(kind), dtype=dtype, lora=Lora(4) if lora else None, dropout=dropout)
    assert memory.saved(model, ROWS, LENGTH) == pytest.approx(found, rel=0.04)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_checkpointing_saves_the_input_of_every_block_and_recomputes_one(config_of, kind):
    found = _saved_by_autograd(config_of(kind), torch.float32, lora=False, dropout=False, checkpointing=True)
    model = _model(config_of(kind), checkpointing=True)
    recomputed = ROWS * LENGTH * memory.block(model, LENGTH)
    assert memory.saved(model, ROWS, LENGTH) - recomputed == pytest.approx(found, rel=0.04)


def test_no_square_matrix_is_kept_where_a_fused_kernel_attends(config_of):
    """Twice the length is twice the memory; four times only where scores are written out."""
    for kind in ("llama", "gpt2"):
        model = _model(config_of(kind))
        assert memory.saved(model, 1, 2000) == 2 * memory.saved(model, 1, 1000)
    gemma = _model(config_of("gemma2"))
    assert memory.saved(gemma, 1, 2000) > 2.5 * memory.saved(gemma, 1, 1000)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_the_cache_is_that_of_a_real_forward(config_of, kind):
    model: Any = AutoModelForCausalLM.from_config(config_of(kind))
    with torch.no_grad():
        cache = model(input_ids=torch.ones(ROWS, LENGTH, dtype=torch.long), use_cache=True).past_key_values
    found = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    assert memory.kv_cache(_model(config_of(kind)), ROWS, LENGTH) == found


def test_weights_gradients_and_moments_by_hand():
    shape = shapes.KNOWN["openai-community/gpt2"]
    n = 124_439_808
    full = Model(shape, trained=True)
    assert (memory.weights(full), memory.gradients(full), memory.optimizer(full)) == (4 * n, 4 * n, 8 * n)
    frozen = Model(shape, "bfloat16")
    assert (memory.weights(frozen), memory.gradients(frozen), memory.optimizer(frozen)) == (2 * n, 0, 0)
    # r × (inputs + outputs) of 4 matrices in 12 blocks: 16 × (768 + 2304 + 768 + 768 + 768 + 3072 + 3072 + 768) × 12
    adapted = Model(shape, "bfloat16", trained=True, lora=Lora(16))
    adapters = 16 * 12288 * 12
    assert memory.weights(adapted) == 2 * n + 4 * adapters
    assert memory.optimizer(adapted) == 8 * adapters
    assert memory.weights(replace(adapted, base=False)) == 4 * adapters
    matrices = 12 * (768 * 2304 + 768 * 768 + 2 * 768 * 3072)
    assert memory.weights(Model(shape, "int4")) == matrices * (0.5 + 4 / 64) + 2 * (n - matrices)


def test_the_peak_of_a_step_is_its_fullest_moment(config_of):
    """Few tokens: all gradients at once. Many: all activations, before any gradient."""
    model = _model(config_of("llama"))
    models = {"model": model}
    n = model.parameters
    few = memory.training(models, [Pass("model", 1, 1)], accumulates=False)
    assert few.total == pytest.approx(16 * n, rel=0.02)
    logits = memory.loss_logits(model, 8 * 500)
    many = memory.training(models, [Pass("model", 8, 500, logits)], accumulates=False)
    last = memory.backward_working(model, 8, 500)  # the last block's backward, when the logits are gone
    assert many.total == 12 * n + memory.saved(model, 8, 500) + max(logits, last)
    again = memory.training(models, [Pass("model", 8, 500, logits)], accumulates=True)
    assert again.total == many.total + 4 * n


# ---------------------------------------------------------------- predicted against measured


def _benchmark() -> Any:
    path = Path(__file__).parents[2] / "benchmarks" / "memory.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_memory", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("name", ["sft", "ppo", "dpo"])
def test_the_plan_is_within_15_percent_of_the_measured_peak(name, tmp_path):
    benchmark = _benchmark()
    benchmark.prepare(tmp_path, (name,))
    predicted, measured = benchmark.predicted(name, tmp_path), benchmark.measured(name, tmp_path)
    assert measured["peak"] > 500 * 2**20  # tensors, not the allocator's noise
    assert predicted["peak"] == pytest.approx(measured["peak"], rel=0.15)
