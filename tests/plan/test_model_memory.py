"""Bytes: activations against what autograd really saves, caches against real ones, sums against hand-worked
ones."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from keel.accel import cpu_linear, decode_step, processor
from keel.data.batches import pad
from keel.models import logprobs, precision
from keel.models.load import checkpoint_activations, disable_dropout
from keel.models.lora import Adapters, add_adapters
from keel.models.precision import prepare_model
from keel.plan import activation_memory, model_memory, model_shapes, peaks, predicted_layout
from keel.plan.model_memory import Forward, Lora, Model
from keel.plan.peaks import Pass

pytestmark = pytest.mark.usefixtures("accel_on")  # a plan reckons with the fast paths

ROWS, LENGTH = 2, 40
READ = Forward(ROWS, LENGTH)


def _benchmark() -> Any:
    path = Path(__file__).parents[2] / "benchmarks" / "memory.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_memory", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _built(config: Any, dtype: torch.dtype, *, lora: bool = False, dropout: bool = False) -> Any:
    family: Any = (
        AutoModelForSequenceClassification
        if config.model_type in model_shapes.ENCODERS
        else AutoModelForCausalLM
    )
    model: Any = prepare_model(family.from_config(config, dtype=dtype), str(dtype).removeprefix("torch."))
    if lora:
        model = add_adapters(model, Adapters(r=4), 0)
    if not dropout:
        disable_dropout(model)
    return model.train()


def _saved_by_autograd(model: Any, read: Callable[[], Any]) -> int:
    """Bytes of the distinct tensors that a forward keeps for its backward, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = read()
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _backbone(model: Any) -> Callable[[], Any]:
    """Its forward over `READ`."""
    backbone = logprobs.backbone(model)
    cache = {} if model.config.model_type in model_shapes.ENCODERS else {"use_cache": False}
    ids = torch.randint(1, 101, (ROWS, LENGTH))
    return lambda: backbone(input_ids=ids, **cache)


def _model(config: Any, **settings: Any) -> Model:
    shape = model_shapes.of_config(config)
    assert shape is not None
    return Model(shape, trained=True, device="cpu", **settings)


def each_with_half(kinds: Sequence[str], ways: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Every kind with every other way, so that each way meets half of the kinds; the rest is slow."""
    return [
        pytest.param(kind, *way, marks=() if (one + other) % 2 else pytest.mark.slow)
        for one, kind in enumerate(kinds)
        for other, way in enumerate(ways)
    ]


WAYS = [
    ("float32", False, False),
    ("float32", False, True),
    ("float32", True, False),
    ("bfloat16", True, False),
]


@pytest.mark.parametrize(("kind", "dtype", "lora", "dropout"), each_with_half([*model_shapes.FAMILIES], WAYS))
def test_activations_are_those_that_autograd_saves(config_of, kind, dtype, lora, dropout):
    """To 4 %: the first block saves less where the embeddings are frozen, and token ids are not counted."""
    built = _built(config_of(kind), getattr(torch, dtype), lora=lora, dropout=dropout)
    found = _saved_by_autograd(built, _backbone(built))
    model = _model(config_of(kind), dtype=dtype, lora=Lora(4) if lora else None, dropout=dropout)
    assert activation_memory.saved(model, READ) == pytest.approx(found, rel=0.04)


@pytest.mark.parametrize("kind", model_shapes.FAMILIES)
@pytest.mark.parametrize("lora", [False, True])
def test_activations_where_linear_layers_are_steps_of_keel(config_of, kind, lora, monkeypatch):
    """As those of larger models are."""
    monkeypatch.setattr(cpu_linear, "WORTH", 0)
    built = _built(config_of(kind), torch.float32, lora=lora)
    found = _saved_by_autograd(built, _backbone(built))
    model = _model(config_of(kind), lora=Lora(4) if lora else None)
    assert activation_memory.saved(model, READ) == pytest.approx(found, rel=0.04)


PROMPTS = [[5 + i for i in range(24)], [50 + i for i in range(20)]]
SIDES = [[30, 31, 32, 33, 34, 35], [36, 37, 38, 39], [40, 41, 42, 43, 44], [45, 46, 47]]


def _pairs() -> tuple[torch.Tensor, torch.Tensor, list[predicted_layout.Row]]:
    """Two pairs of responses, the positions that predict them, and what is known of them beforehand."""
    rows = [PROMPTS[i // 2] + side for i, side in enumerate(SIDES)]
    ids, lengths = pad(rows, 0)
    index = [
        row * ids.shape[1] + at
        for row, length in enumerate(lengths.tolist())
        for at in range(len(PROMPTS[row // 2]) - 1, length - 1)
    ]
    known = [predicted_layout.answer(i // 2, len(PROMPTS[i // 2]), len(side)) for i, side in enumerate(SIDES)]
    return ids, torch.tensor(index), known


READ_AS_ONE = [
    ("float32", False, cpu_linear.WORTH),
    ("float32", False, 0),
    ("float32", True, 0),
    ("bfloat16", True, 0),
]


@pytest.mark.parametrize(
    ("kind", "dtype", "lora", "worth"),
    each_with_half(["llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "gemma2", "phi3"], READ_AS_ONE),
)
def test_activations_of_rows_that_are_read_as_one(config_of, kind, dtype, lora, worth, monkeypatch):
    """And of a last layer at some positions alone, where that is done: in the first three. The last reads
    apart."""
    monkeypatch.setattr(cpu_linear, "WORTH", worth)
    ids, index, rows = _pairs()
    built = _built(config_of(kind), getattr(torch, dtype), lora=lora)
    logprobs.head_inputs(built, ids, index)  # tries out its head, and whether it takes masks
    model = _model(config_of(kind), dtype=dtype, lora=Lora(4) if lora else None)
    read = predicted_layout.forward(model, rows)
    together = read.masked or (read.unpadded is not None and read.unpadded < sum(row.end for row in rows))
    assert together is (kind != "phi3")
    branches = kind not in ("gemma2", "phi3") and dtype == "float32"
    assert (read.scores > 0) is branches
    assert (read.looked is not None) is kind.startswith(("llama", "qwen"))
    if kind != "phi3":  # it reads together too, which nobody has tested
        found = _saved_by_autograd(built, lambda: logprobs.head_inputs(built, ids, index).values)
        assert activation_memory.saved(model, read) == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize(
    ("kind", "dtype", "lora"),
    each_with_half(
        ["llama", "qwen2", "qwen3", "gpt2", "gpt_neox"],
        [("float32", False), ("float32", True), ("bfloat16", True)],
    ),
)
def test_activations_of_rows_without_padding(config_of, kind, dtype, lora, monkeypatch):
    monkeypatch.setattr(cpu_linear, "WORTH", 0)
    lengths = [40, 12, 20]
    ids = torch.randint(1, 101, (3, 40))
    index = torch.tensor([row * 40 + at for row, n in enumerate(lengths) for at in range(n // 2, n - 1)])
    rows = [predicted_layout.answer(i, n // 2 + 1, n - n // 2 - 1) for i, n in enumerate(lengths)]
    built = _built(config_of(kind), getattr(torch, dtype), lora=lora)
    logprobs.head_inputs(built, ids, index)
    model = _model(config_of(kind), dtype=dtype, lora=Lora(4) if lora else None)
    read = predicted_layout.forward(model, rows)
    assert (read.unpadded, read.cells, read.masked) == (sum(lengths) - 3, 3 * 39, False)
    found = _saved_by_autograd(built, lambda: logprobs.head_inputs(built, ids, index).values)
    assert activation_memory.saved(model, read) == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("kind", model_shapes.FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_forward_without_gradient_holds_what_is_counted(config_of, kind, dtype):
    model = _built(config_of(kind), getattr(torch, dtype)).eval()
    read = _backbone(model)
    with torch.no_grad(), _benchmark().Tensors() as tensors:
        for tensor in [*model.parameters(), *model.buffers()]:
            tensors.see(tensor)
        weights = tensors.now
        read()
    planned = activation_memory.working(Model(_model(config_of(kind)).shape, dtype, device="cpu"), READ)
    assert 0.9 * (tensors.peak - weights) < planned < 1.2 * (tensors.peak - weights)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_checkpointing_saves_the_input_of_every_block_and_recomputes_one(config_of, kind):
    built = _built(config_of(kind), torch.float32)
    checkpoint_activations(built)
    found = _saved_by_autograd(built, _backbone(built))
    model = _model(config_of(kind), checkpointing=True)
    recomputed = activation_memory.block(model, READ)
    assert activation_memory.saved(model, READ) - recomputed == pytest.approx(found, rel=0.04)


def test_no_square_matrix_is_kept_where_a_fused_kernel_attends(config_of):
    """Twice the length is twice the memory; four times only where scores are written out."""
    for kind in ("llama", "gpt2"):
        model = _model(config_of(kind))
        assert activation_memory.saved(model, Forward(1, 2000)) == 2 * activation_memory.saved(
            model, Forward(1, 1000)
        )
    gemma = _model(config_of("gemma2"))
    assert activation_memory.saved(gemma, Forward(1, 2000)) > 2.5 * activation_memory.saved(
        gemma, Forward(1, 1000)
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_the_cache_is_that_of_a_real_forward(config_of, kind):
    model: Any = AutoModelForCausalLM.from_config(config_of(kind))
    with torch.no_grad():
        cache = model(input_ids=torch.ones(ROWS, LENGTH, dtype=torch.long), use_cache=True).past_key_values
    found = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    assert model_memory.kv_cache(_model(config_of(kind)), ROWS, LENGTH) == found


def test_weights_gradients_and_moments_by_hand():
    shape = model_shapes.KNOWN["openai-community/gpt2"]
    n = 124_439_808
    full = Model(shape, trained=True)
    assert (model_memory.weights(full), model_memory.gradients(full), model_memory.optimizer(full)) == (
        4 * n,
        4 * n,
        8 * n,
    )
    frozen = Model(shape, "bfloat16")
    assert (model_memory.weights(frozen), model_memory.gradients(frozen), model_memory.optimizer(frozen)) == (
        2 * n,
        0,
        0,
    )
    # r × (inputs + outputs) of 4 matrices in 12 blocks: 16 × (768 + 2304 + 768 + 768 + 768 + 3072 + 3072 +
    # 768) × 12
    adapted = Model(shape, "bfloat16", trained=True, lora=Lora(16))
    adapters = 16 * 12288 * 12
    assert model_memory.weights(adapted) == 2 * n + 4 * adapters
    assert model_memory.optimizer(adapted) == 8 * adapters
    assert model_memory.weights(replace(adapted, base=False)) == 4 * adapters
    matrices = 12 * (768 * 2304 + 768 * 768 + 2 * 768 * 3072)
    assert model_memory.weights(Model(shape, "int4")) == matrices * (0.5 + 4 / 64) + 2 * (n - matrices)


def test_weights_that_are_cast_are_there_twice(config_of, monkeypatch):
    """With `auto`, where products are taken in bfloat16: the matrices and the head, in training and in a
    forward."""
    model, shape = _model(config_of("llama"), dtype="auto"), model_shapes.of_config(config_of("llama"))
    assert shape is not None
    matrices = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)
    monkeypatch.setattr(precision, "fast_in_bfloat16", lambda device: False)
    slow = peaks.training({"model": model}, [Pass("model", [READ])], accumulates=False).total
    assert model_memory.casts(model) == model_memory.casts(replace(model, dtype="float32")) == 0
    monkeypatch.setattr(precision, "fast_in_bfloat16", lambda device: True)
    assert model_memory.casts(model) == 2 * (matrices + 101 * 64)
    assert model_memory.casts(replace(model, head="score")) == 2 * matrices
    fast = peaks.training({"model": model}, [Pass("model", [READ])], accumulates=False).total
    assert fast - slow == model_memory.casts(model)


def test_keys_and_values_are_as_large_as_they_are_kept(config_of, monkeypatch):
    """In bfloat16 where products are; in float32 on a CPU whose attention is faster so."""
    model = _model(config_of("llama"), dtype="auto")
    monkeypatch.setattr(precision, "fast_in_bfloat16", lambda device: False)
    whole = model_memory.kv_cache(model, 3, 10)
    monkeypatch.setattr(precision, "fast_in_bfloat16", lambda device: True)
    for tiles, share in ((False, 1), (True, 0.5)):
        monkeypatch.setattr(processor, "has_half_tiles", lambda tiles=tiles: tiles)
        assert model_memory.kv_cache(model, 3, 10) == share * whole
    assert model_memory.kv_cache(replace(model, device="cuda"), 3, 10) == 0.5 * whole


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "phi3"])
def test_what_is_laid_out_for_sampling_is_counted(config_of, kind, lora, monkeypatch):
    """All of a Llama's kind, but under adapters; of others what their linear layers lay out."""
    monkeypatch.setattr(cpu_linear, "PACKS_FLOAT32", True)
    monkeypatch.setattr(cpu_linear, "prefers_columns", lambda: False)
    monkeypatch.setattr(cpu_linear, "WORTH", 64 * 64)
    monkeypatch.setattr(cpu_linear, "AFTER", 0)
    built = _built(config_of(kind), torch.float32, lora=lora).eval()
    held = list[torch.Tensor]()
    plainly = cpu_linear.PrepackedWeight.__init__

    def laid_out(self, layer, dtype=torch.bfloat16):
        held.append(layer.weight)
        plainly(self, layer, dtype)

    monkeypatch.setattr(cpu_linear.PrepackedWeight, "__init__", laid_out)
    model = _model(config_of(kind), lora=Lora(4) if lora else None)
    with torch.no_grad(), cpu_linear.lay_out(built, 1):
        built(input_ids=torch.ones(ROWS, 3, dtype=torch.long))
    found = sum(weight.nbytes for weight in held)
    assert found  # of GPT-2 the head, whose layers are no nn.Linear
    if kind in ("llama", "qwen3") and not lora:
        step = decode_step.Step(built, 8)
        assert step.whole is not None
        found = step.whole.nbytes
    assert model_memory.laid_out(model, 1) == found
    monkeypatch.setattr(cpu_linear, "PACKED_AT_MOST", 0)
    monkeypatch.setattr(cpu_linear, "memory", lambda: 8 * found)
    assert model_memory.laid_out(model, 31) == 0
    assert model_memory.laid_out(model, 32) == found


def test_the_peak_of_a_step_is_its_fullest_moment(config_of):
    """Few tokens: all gradients at once. Many: all activations, before any gradient."""
    model = _model(config_of("llama"))
    models = {"model": model}
    n = model.parameters
    few = peaks.training(models, [Pass("model", [Forward(1, 1)])], accumulates=False)
    assert few.total == pytest.approx(16 * n, rel=0.02)
    read = Forward(8, 500)
    logits = model_memory.loss_logits(model, 8 * 500)
    many = peaks.training(models, [Pass("model", [read], logits)], accumulates=False)
    # the last block's backward, when the logits are gone but for the head's gradient
    last = activation_memory.backward_working(model, 8 * 500)
    head = model_memory.embedding_gradient(model)
    assert many.total == 12 * n + activation_memory.saved(model, read) + max(logits, last + head)
    again = peaks.training(models, [Pass("model", [read], logits)], accumulates=True)
    assert again.total == 12 * n + 4 * n + activation_memory.saved(model, read) + max(logits, last)


def test_one_pass_comes_after_the_other(config_of):
    """The critic's forward and backward; then the policy's, beside the critic's gradients."""
    policy = _model(config_of("llama"))
    models = {"policy": policy, "critic": replace(policy, head="score")}
    read = Forward(8, 400)
    kept = activation_memory.saved(policy, read)
    held = sum(12 * model.parameters for model in models.values())
    inside = activation_memory.backward_working(policy, read.tokens)

    def peak(logits: float) -> float:
        passes = [Pass("critic", [read]), Pass("policy", [read], logits)]
        return peaks.training(models, passes, accumulates=False).total

    head = model_memory.embedding_gradient(policy)
    assert peak(0) == held + kept + model_memory.gradients(models["critic"]) + head + inside
    many = 10 * kept
    assert peak(many) == held + kept + many + model_memory.gradients(models["critic"])


def test_gradients_of_several_forwards_are_added_up_beside_those_that_are_there(config_of):
    model = _model(config_of("llama"))
    few, n = Forward(1, 1), model_memory.gradients(model)

    def peak(reads: int, accumulates: bool) -> float:
        passes = [Pass("model", [few] * reads)]
        return peaks.training({"model": model}, passes, accumulates=accumulates).total

    assert peak(2, True) - peak(2, False) == pytest.approx(n)
    assert peak(2, True) - peak(1, True) == pytest.approx(n + activation_memory.saved(model, few))


# ---------------------------------------------------------------- predicted against measured


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("name", ["sft", "ppo", "dpo", "grpo", "reward"])
def test_the_plan_is_within_15_percent_of_the_measured_peak(name, tmp_path):
    benchmark = _benchmark()
    benchmark.prepare(tmp_path, (name,))
    predicted, measured = benchmark.predicted(name, tmp_path), benchmark.measured(name, tmp_path)
    assert measured["peak"] > 500 * 2**20  # tensors, not the allocator's noise
    assert predicted["peak"] == pytest.approx(measured["peak"], rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "ppo", "dpo", "grpo", "reward"])
def test_the_plan_counts_every_tensor(name, tmp_path):
    benchmark = _benchmark()
    benchmark.prepare(tmp_path, (name,))
    predicted, measured = (
        benchmark.predicted(name, tmp_path),
        benchmark.measured(name, tmp_path, tensors=True),
    )
    assert predicted["peak"] == pytest.approx(measured["peak"], rel=0.03)
