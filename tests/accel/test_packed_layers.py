"""Layers laid out once, and attention over each row's own tokens, against the model's own forward."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config
from transformers import Qwen3ForCausalLM as Qwen3

from keel.accel import cpu_linear, cpu_products, decode_step, packed_layers, patches, row_attention
from keel.accel.decode_step import Step, by_itself, fits
from keel.accel.decode_trial import decoded_otherwise
from keel.accel.kv_slots import Slots
from keel.accel.packed_layers import PackedLayers, prompts_differ
from keel.accel.row_attention import Spans, spans_of

pytestmark = pytest.mark.usefixtures("accel_on")
SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "initializer_range": 0.3}


def model_of(kind: str, groups: int) -> Any:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {**SIZES, **HEADS, "num_key_value_heads": groups}
    match kind:
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**sizes))
        case "qwen2":  # biases
            model = Qwen2ForCausalLM(Qwen2Config(**sizes))
        case _:  # normed queries and keys
            model = Qwen3(Qwen3Config(head_dim=16, **sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model.eval()


@pytest.mark.parametrize("held", ["by oneDNN", "by columns", "large", "large head", "its own"])
@pytest.mark.parametrize("spans", [True, False])
@pytest.mark.parametrize(("kind", "groups"), [("llama", 4), ("llama", 2), ("qwen2", 4), ("qwen3", 4)])
def test_steps_and_prompts_are_the_models_own(
    kind: str, groups: int, spans: bool, held: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        packed_layers, "prefers_columns", lambda: held in ("by columns", "large", "large head")
    )
    if "large" in held:
        monkeypatch.setattr(packed_layers, "LARGE", 60 * 32 if held == "large head" else 32 * 32)
        monkeypatch.setattr(
            packed_layers, "MANY", 20
        )  # tokens of the prompts of one length, not of the others
    if held == "its own":
        monkeypatch.setattr(packed_layers, "laid_out", lambda model, steps: (False, False))
    monkeypatch.setattr(row_attention, "LEAST", 1 if spans else 10**6)
    taken = list[Any]()
    monkeypatch.setattr(row_attention, "spans_of", lambda *given: taken.append(spans_of(*given)) or taken[-1])
    model = model_of(kind, groups)
    with torch.no_grad():
        assert decoded_otherwise(model, lambda _, columns: Step(model, columns)) is None
        layers = Step(model, 16).whole
        assert layers is not None
        assert prompts_differ(model, layers) is None
        assert layers.has_head
    assert all((found is not None) == (spans and groups == 4) for found in taken)
    assert taken


def test_columns_are_laid_out_where_mkl_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """On AMD's processors with AVX2 alone: Wᵀ, with a norm's weights in it and queries scaled; rows are not
    filled up."""
    model = model_of("llama", 4)
    monkeypatch.setattr(cpu_products, "_is_slow_at_once", lambda: True)
    own, norm = model.model.layers[0].self_attn, model.model.layers[0].input_layernorm
    with torch.no_grad():
        layers = Step(model, 16).whole
        assert layers is not None
        (columns, _), *_ = layers.layers[0].qkv._parts
        factor = norm.weight * math.sqrt(len(norm.weight))
        expected = torch.cat([own.q_proj.weight * own.scaling, own.k_proj.weight, own.v_proj.weight])
        torch.testing.assert_close(columns, (expected * factor).t())
        assert layers._size(5) == 5
        with patches.disabled("column_products"):
            filled = Step(model, 16).whole
    assert filled is not None
    assert filled._size(5) == 8
    monkeypatch.setattr(cpu_products, "_is_slow_at_once", lambda: False)
    assert not cpu_products.prefers_columns()


def test_large_matrices_are_onednns_where_small_ones_are_mkls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where MKL is preferred. Prompts of many tokens are read with the layers' own weights then."""
    model = model_of("llama", 4)
    monkeypatch.setattr(packed_layers, "prefers_columns", lambda: True)
    monkeypatch.setattr(packed_layers, "LARGE", 60 * 32)
    with torch.no_grad():
        layers = Step(model, 16).whole
        assert layers is not None
        assert [m.by_onednn for m in layers.layers[0][:5]] == [
            True,
            False,
            True,
            True,
            True,
        ]  # 96 × 32, 64 × 32
        assert layers._packed_head is not None
        assert layers._packed_head.by_onednn
        assert (layers._size(5), layers._size(9), layers._size(65)) == (8, 12, 72)
        assert layers._many is not None
        held = [weight.data_ptr() for weight, _ in layers._many.layers[0].qkv._parts]
        own = model.model.layers[0].self_attn
        assert held == [part.weight.data_ptr() for part in (own.q_proj, own.k_proj, own.v_proj)]
        given = list[int]()
        plainly = packed_layers.product
        monkeypatch.setattr(
            packed_layers, "product", lambda x, *more: given.append(len(x)) or plainly(x, *more)
        )
        layers.read(torch.full((2, 5), 7), None)
        assert not given
        monkeypatch.setattr(packed_layers, "MANY", 10)
        layers.read(torch.full((2, 5), 7), None)
        assert set(given) == {10, 4}  # the last tokens, filled up


def test_a_way_to_read_many_tokens_that_differs_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama", 4)
    monkeypatch.setattr(packed_layers, "prefers_columns", lambda: True)
    monkeypatch.setattr(packed_layers, "LARGE", 60 * 32)
    made = PackedLayers._stack

    def wrong(self: Any, trunk: Any, *, laid_out: bool) -> Any:
        found = made(self, trunk, laid_out=laid_out)
        if not laid_out:
            found.layers[0] = found.layers[0]._replace(between=found.layers[0].between + 1)
        return found

    with torch.no_grad():
        assert by_itself(model, 16) is not None
        monkeypatch.setattr(PackedLayers, "_stack", wrong)
        with pytest.warns(patches.AccelWarning, match="prompt_reading is off"):
            assert by_itself(model_of("llama", 4), 16) is None


def test_what_prompts_keep_holds_nothing_else() -> None:
    """Keys and values of all layers wait for their slots; queries beside them would be as much again, or
    several times as much where heads share keys and values."""
    with torch.no_grad():
        layers = Step(model_of("llama", 2), 16).whole
        assert layers is not None
        _, kept = layers.read(torch.tensor([[3, 4, 5], [6, 7, 8]]), None)
    sides = [side for pair in kept for side in pair]
    held = {side.untyped_storage().data_ptr(): side.untyped_storage().nbytes() for side in sides}
    assert sum(held.values()) == sum(side.nbytes for side in sides)


def test_a_reading_that_differs_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    plainly = packed_layers._attended

    def without_the_first(*given: Any, **more: Any) -> torch.Tensor:
        return plainly(*given, **more) * 1.1

    monkeypatch.setattr(packed_layers, "_attended", without_the_first)
    model = model_of("llama", 4)
    with torch.no_grad():
        assert fits(model)  # steps do not read so
        with pytest.warns(patches.AccelWarning, match="prompt_reading is off"):
            assert by_itself(model, 16) is None


def test_a_step_calls_nothing_of_the_model_or_is_not_one_by_itself() -> None:
    model = model_of("llama", 4)
    with torch.no_grad():
        step = by_itself(model, 16)
        assert step is not None
        assert step.by_itself
        with patches.disabled("prompt_reading"):
            assert by_itself(model, 16) is None
        with patches.disabled("cpu_linear"):
            assert by_itself(model, 16) is None
        hook = model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: None)
        assert by_itself(model, 16) is None
        hook.remove()
        assert by_itself(model, 16) is not None
        model.lm_head.register_forward_pre_hook(lambda *_: None)
        assert by_itself(model, 16) is None


def test_a_head_of_another_kind_is_called_and_nothing_is_laid_out_in_vain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of("llama", 4)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", patches.AccelWarning)
        assert fits(model)
        monkeypatch.setattr(decode_step, "Step", None)  # which would be made
        assert by_itself(model, 16) is None


def test_large_matrices_stay_as_the_model_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("qwen2", 2)
    assert packed_layers.laid_out(model, 0) == (True, True)
    layers = sum(p.nbytes for p in model.model.layers.parameters() if p.dim() == 2)
    monkeypatch.setattr(cpu_linear, "memory", lambda: 0)
    monkeypatch.setattr(cpu_linear, "PACKED_AT_MOST", layers)
    assert packed_layers.laid_out(model, 64) == (True, False)
    monkeypatch.setattr(cpu_linear, "PACKED_AT_MOST", 1)
    assert packed_layers.laid_out(model, 64) == (False, False)
    with torch.no_grad():
        step = by_itself(model, 16)
        assert step is not None
        assert step.whole is not None
        held = [weight.data_ptr() for weight, _ in step.whole.layers[0].qkv._parts]
    own = model.model.layers[0].self_attn
    assert held == [part.weight.data_ptr() for part in (own.q_proj, own.k_proj, own.v_proj)]


def test_large_matrices_are_laid_out_for_many_steps_where_there_is_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of("qwen2", 2)
    size = sum(p.nbytes for p in [*model.model.layers.parameters(), model.lm_head.weight] if p.dim() == 2)
    monkeypatch.setattr(cpu_linear, "PACKED_AT_MOST", 1)
    monkeypatch.setattr(cpu_linear, "memory", lambda: 8 * size)
    with torch.no_grad():
        for steps, expected in ((31, False), (32, True)):
            assert packed_layers.laid_out(model, steps) == (expected, expected)
            step = by_itself(model, 64, steps)
            assert step is not None
            slots, given = Slots(2, 64, torch.device("cpu"), None), torch.tensor([[5, 6, 7], [8, 9, 7]])
            logits, kept = step.read(given, None)
            slots.take(kept, [3, 3], [0, 1])
            whole, newest = model(given).logits, given
            for number in range(cpu_linear.AFTER + 2):  # the large ones of a reply that turns out to be long
                assert step.whole is not None
                assert (len(step.whole.layers[0].qkv._parts) == 1) is (
                    expected and number >= cpu_linear.AFTER
                )
                torch.testing.assert_close(logits, whole[:, -1], rtol=1e-4, atol=1e-4)
                newest = torch.cat([newest, logits.argmax(-1, keepdim=True)], dim=1)
                slots.make_room()
                logits, whole = step(newest[:, -1], slots), model(newest).logits
                slots.step()
        with patches.disabled("linear_layouts"):
            assert packed_layers.laid_out(model, 32) == (False, False)
    monkeypatch.setattr(cpu_linear, "memory", lambda: 8 * size - 8)
    assert packed_layers.laid_out(model, 32) == (True, False)


def test_each_row_reads_its_own_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(5, 3, size, 8, generator=generator) for size in (1, 12, 12))
    starts, column = torch.tensor([4, 0, 9, 7, 4]), 9
    seen = torch.arange(column + 1) >= starts[:, None]
    expected = scaled_dot_product_attention(
        q, k[:, :, : column + 1], v[:, :, : column + 1], attn_mask=seen[:, None, None], scale=0.5
    ).reshape(5, -1)
    for tensor in (k, v):  # what is not a row's own is not looked at
        tensor[:, :, column + 1 :] = float("nan")
        for row, start in enumerate(starts.tolist()):
            tensor[row, :, :start] = float("nan")
    spans = Spans(starts, column, 3, 12)
    for _ in range(2):  # layers have them in common
        torch.testing.assert_close(spans.attend(q[:, :, 0], k, v, 0.5), expected)


def test_spans_are_for_many_rows_of_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = Slots(20, 300, torch.device("cpu"))
    kept = torch.zeros(20, 2, 4, 8)
    slots.take([(kept, kept)], [4] * 20, range(20))
    assert spans_of(slots, 2) is not None
    assert spans_of(slots, 4) is None  # heads share keys and values
    with patches.disabled("row_attention"):
        assert spans_of(slots, 2) is None
    monkeypatch.setattr(row_attention, "MOST", 4)
    assert spans_of(slots, 2) is None
    monkeypatch.undo()
    slots.keep(torch.arange(20) < 15)
    assert spans_of(slots, 2) is None
