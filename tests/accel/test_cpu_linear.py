"""Linear layers and gated feed-forward parts, against torch's own modules under autocast and without it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForCausalLM

from keel.accel import cpu_linear, cpu_products
from keel.accel.cpu_linear import PrepackedWeight, cast_cache, lay_out, patch_linears, sized
from keel.accel.modules import is_patched
from keel.accel.patches import disabled
from keel.models.lora import Adapters, add_adapters

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 261,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = torch.arange(3 * 7).view(3, 7) % 261


def model_of(kind: str = "llama", **more: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **more})).eval()


def pulled(model: Any, half: bool, times: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of a function of them after so many micro-batches."""
    model.zero_grad()
    for number in range(times):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = model(IDS + number).logits
        (logits.float() * torch.linspace(-1, 2, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}  # pyright: ignore


def same(one: Tensor, two: Tensor, rough: float) -> None:
    assert one.dtype == two.dtype
    assert one.shape == two.shape
    assert float((one.float() - two.float()).norm() / two.float().norm()) < rough


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gpt_neox", "opt"])
def test_logits_and_gradients_are_those_of_the_layers(kind: str, half: bool) -> None:
    # the middle sequence of sizes: 21 rows are filled up to 24
    sizes = {} if kind not in ("gpt_neox", "opt") else {"ffn_dim": 320, "word_embed_proj_dim": 256}
    plain = model_of(kind, **sizes)
    ours = patch_linears(copy.deepcopy(plain))
    assert any(isinstance(module, cpu_linear._Linear) for module in ours.modules())
    (a, of_plain), (b, of_ours) = pulled(plain, half, 2), pulled(ours, half, 2)
    rough = 2e-2 if half else 1e-5
    same(b, a, rough)
    assert of_ours.keys() == of_plain.keys()
    for name, gradient in of_plain.items():
        same(of_ours[name], gradient, 5 * rough)


def test_only_a_gated_part_with_silu_is_one_step() -> None:
    found = {
        kind: sum(
            is_patched(module, "cpu_linear") and "MLP" in type(module).__name__
            for module in patch_linears(model_of(kind)).modules()
        )
        for kind in ("llama", "qwen3", "gemma", "gpt_neox")
    }
    assert found == {"llama": 2, "qwen3": 2, "gemma": 0, "gpt_neox": 0}


@pytest.mark.parametrize("half", [False, True])
def test_a_frozen_weight_gets_no_gradient_and_adapters_get_theirs(half: bool) -> None:
    plain = add_adapters(model_of(), Adapters(r=4), 0)
    ours = patch_linears(copy.deepcopy(plain))
    (_, of_plain), (_, of_ours) = pulled(plain, half), pulled(ours, half)
    assert set(of_ours) == set(of_plain)
    assert all("lora" in name for name in of_ours)
    for name, gradient in of_plain.items():
        if float(gradient.norm()):
            same(of_ours[name], gradient, 0.1 if half else 1e-4)


@pytest.mark.parametrize("half", [False, True])
def test_a_matrix_that_is_embedding_and_head_gets_both_gradients(half: bool) -> None:
    plain = model_of(tie_word_embeddings=True)
    ours = patch_linears(copy.deepcopy(plain))
    (_, of_plain), (_, of_ours) = pulled(plain, half, 2), pulled(ours, half, 2)
    same(of_ours["model.embed_tokens.weight"], of_plain["model.embed_tokens.weight"], 0.1 if half else 1e-4)


def test_activations_that_are_computed_again_give_the_same_gradients() -> None:
    ours = patch_linears(model_of()).train()
    _, once = pulled(ours, True)
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    _, again = pulled(ours, True)
    for name, gradient in once.items():
        same(again[name], gradient, 1e-6)


@pytest.mark.parametrize("half", [False, True])
def test_where_somebody_waits_for_a_gradient_torch_adds_it(half: bool) -> None:
    """Processes that average their gradients do so in hooks."""
    plain = model_of()
    ours, seen = patch_linears(copy.deepcopy(plain)), dict[str, Tensor]()
    names = ("lm_head.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight")
    for name in names:
        ours.get_parameter(name).register_hook(lambda gradient, name=name: seen.update({name: gradient}))
    (_, of_plain), (_, of_ours) = pulled(plain, half), pulled(ours, half)
    for name in names:
        same(seen[name], of_plain[name], 0.1 if half else 1e-4)
        same(of_ours[name], of_plain[name], 0.1 if half else 1e-4)


def test_a_gated_part_keeps_half_of_what_it_kept() -> None:
    def kept(part: nn.Module, half: bool) -> int:
        seen: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter) and tensor.shape[0] != 320 and tensor.shape != (256, 320):
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(4, 16, 256, requires_grad=True)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
            torch.autocast("cpu", torch.bfloat16, enabled=half),
        ):
            result = part(x)
        assert result.requires_grad
        return sum(seen.values())

    plain = model_of().model.layers[0].mlp
    ours = patch_linears(copy.deepcopy(plain))
    wide = 4 * 16 * 320
    assert kept(ours, False) == 4 * (4 * 16 * 256 + 2 * wide)
    assert kept(ours, False) < 0.65 * kept(plain, False)
    assert kept(ours, True) < 0.65 * kept(plain, True)


# ---------------------------------------------------------------- few shapes


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 64, 65, 100, 128, 129, 1000, 1024, 1025, 5000])
def test_a_size_holds_the_rows_and_little_more(rows: int) -> None:
    assert rows <= sized(rows) <= max(rows + 7, rows * 9 / 8)


def test_there_are_eight_sizes_between_a_power_of_two_and_the_next() -> None:
    assert len({sized(rows) for rows in range(513, 1025)}) == 8
    assert len({sized(rows) for rows in range(1, 65)}) == 8
    assert all(sized(sized(rows)) == sized(rows) for rows in range(1, 3000))


def test_products_in_bfloat16_have_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap of our own: a program of oneDNN for every shape took as long as the products."""
    shapes: set[tuple[int, ...]] = set()
    plain = cpu_products.linear

    def seen(x: Tensor, *rest: Any) -> Tensor:
        shapes.add(tuple(x.shape))
        return plain(x, *rest)

    monkeypatch.setattr(cpu_products, "linear", seen)
    layer = patch_linears(nn.Sequential(nn.Linear(16, 8)))
    for rows in range(65, 129):
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(torch.randn(rows, 16)).shape == (rows, 8)
    assert shapes == {(rows, 16) for rows in range(72, 129, 8)}


# ---------------------------------------------------------------- what is cast once


def test_a_weight_is_cast_once_within_and_again_when_it_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer: Any = patch_linears(nn.Sequential(nn.Linear(16, 8)))[0]  # pyright: ignore[reportIndexIssue]
    x, made, plain = torch.randn(4, 16), list[str](), cpu_linear._CastCache._once
    monkeypatch.setattr(
        cpu_linear._CastCache, "_once",
        lambda self, kind, make, *weights: plain(self, kind, lambda: made.append(kind) or make(), *weights),
    )  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16), cast_cache():
        first = layer(x)
        with cast_cache():
            layer(x)
        assert made == ["cast", "cast"]  # matrix and bias
        with torch.no_grad():
            layer.weight.mul_(2)
        second = layer(x)
        assert made == ["cast"] * 3
        with torch.no_grad():
            layer(x)
            layer.bias.add_(1)
            third = layer(x)
        assert made == ["cast"] * 3 + ["packed"] * 2
    assert not torch.equal(first, second)
    with torch.autocast("cpu", torch.bfloat16):
        same(third, nn.functional.linear(x, layer.weight, layer.bias).detach(), 1e-2)


@pytest.mark.parametrize("half", [False, True])
def test_what_a_layer_makes_may_be_changed_in_place(half: bool) -> None:
    """OLMo clips its queries so."""
    plain = nn.Sequential(nn.Linear(256, 256, bias=False))
    ours, x = patch_linears(copy.deepcopy(plain)), torch.randn(3, 7, 256)
    for model in (plain, ours):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            model(x).clamp_(-0.5, 0.5).float().pow(2).sum().backward()
    same(ours[0].weight.grad, plain[0].weight.grad, 2e-2 if half else 1e-5)  # pyright: ignore


def test_a_gated_part_that_drops_stays_as_it_is() -> None:
    model = model_of("seed_oss", residual_dropout=0.1, head_dim=64)
    before = {type(layer.mlp) for layer in model.model.layers}
    assert {type(layer.mlp) for layer in patch_linears(model).model.layers} == before
    assert {
        type(layer.mlp) for layer in patch_linears(model_of("seed_oss", residual_dropout=0.0)).model.layers
    } != before


def test_a_computed_weight_passes_its_gradient_on() -> None:
    layer: Any = patch_linears(nn.Sequential(nn.Linear(256, 256, bias=False)))[0]  # pyright: ignore[reportIndexIssue]
    parts = layer.weight.detach().clone().requires_grad_()
    torch.func.functional_call(layer, {"weight": 2 * parts}, torch.randn(4, 256)).sum().backward()
    assert float(parts.grad.norm()) > 0  # pyright: ignore[reportOptionalMemberAccess]


def test_a_packed_matrix_gives_the_layers_product() -> None:
    for bias in (True, False):
        layer, x = nn.Linear(32, 16, bias=bias), torch.randn(5, 32).bfloat16()
        own = None if layer.bias is None else layer.bias.bfloat16()
        same(PrepackedWeight(layer)(x), nn.functional.linear(x, layer.weight.bfloat16(), own).detach(), 1e-2)
        full = torch.randn(5, 32)
        same(PrepackedWeight(layer, torch.float32)(full), layer(full).detach(), 1e-5)


def test_without_gradient_the_result_is_the_same() -> None:
    layer = patch_linears(nn.Sequential(nn.Linear(64, 48)))
    x = torch.randn(3, 5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        learning = layer(x)
        with torch.no_grad():
            frozen = layer(x)
    assert not frozen.requires_grad
    same(frozen, learning.detach(), 1e-2)


# ---------------------------------------------------------------- matrices laid out while a model samples


def laid_out_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each product by a matrix that is laid out."""
    monkeypatch.setattr(cpu_linear, "prefers_columns", lambda: False)
    monkeypatch.setattr(cpu_linear, "WORTH", 256 * 256)  # of queries and gated parts, not of keys and values
    monkeypatch.setattr(cpu_linear, "AFTER", 0)
    taken, plainly = list[int](), PrepackedWeight.__call__
    monkeypatch.setattr(PrepackedWeight, "__call__", lambda self, x: taken.append(len(x)) or plainly(self, x))
    return taken


@pytest.mark.parametrize("kind", ["llama", "gemma", "opt"])
def test_few_rows_are_multiplied_with_matrices_that_are_laid_out(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = patch_linears(
        model_of(kind, **({"ffn_dim": 320, "word_embed_proj_dim": 256} if kind == "opt" else {}))
    )
    taken = laid_out_products(monkeypatch)
    with torch.no_grad():
        expected = model(IDS).logits
        with lay_out(model, 8):
            same(model(IDS).logits, expected, 1e-5)
        assert set(taken) == {24}  # 21 rows, filled up
        count = len(taken)
        with lay_out(model, 8), disabled("cpu_linear"):
            model(IDS)
        with disabled("linear_layouts"), lay_out(model, 8):
            model(IDS)
        with lay_out(model, 8):
            model(IDS.repeat(13, 1))  # many rows
            with torch.autocast("cpu", torch.bfloat16):
                count -= len(taken)
                model(IDS)
                count += len(taken)
        model(IDS)
    with lay_out(model, 8):
        model(IDS).logits.sum().backward()
    assert len(taken) == count
    assert any(
        layer.weight.grad is not None for layer in model.modules() if type(layer) is cpu_linear._Linear
    )


def test_a_matrix_is_laid_out_when_it_pays_and_anew_when_it_has_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A reply that may be long is often short. What is multiplied with is what the weight is now."""
    layer: Any = patch_linears(nn.Sequential(nn.Linear(256, 256)))
    taken, x = laid_out_products(monkeypatch), torch.randn(3, 256)
    monkeypatch.setattr(cpu_linear, "AFTER", 2)
    with torch.no_grad(), lay_out(layer, 8):
        for number, expected in enumerate((0, 0, 1, 2)):
            same(layer(x), linear(x, layer[0].weight, layer[0].bias), 1e-5)
            assert len(taken) == expected, number
        layer[0].weight.mul_(2)
        layer[0].bias.add_(1)
        same(layer(x), linear(x, layer[0].weight, layer[0].bias), 1e-5)
        assert len(taken) == 3
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False), lay_out(layer, 8):
        for _ in range(4):
            layer(x)
    assert len(taken) == 3


def test_who_compiles_a_model_gets_one_graph() -> None:
    layer = patch_linears(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    x = torch.randn(3, 64)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


def test_adapters_stay_in_effect_on_matrices_that_are_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = patch_linears(add_adapters(model_of(), Adapters(r=4), 0).eval())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
        expected, taken = model(IDS).logits, laid_out_products(monkeypatch)
        with lay_out(model, 8):
            same(model(IDS).logits, expected, 1e-5)
            with model.disable_adapter():
                assert not torch.allclose(model(IDS).logits, expected)
    assert taken


def test_matrices_that_are_laid_out_take_what_memory_there_is_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = patch_linears(model_of())
    taken = laid_out_products(monkeypatch)
    layers = [layer.weight for layer in model.modules() if type(layer) is cpu_linear._Linear]
    size = sum(weight.nbytes for weight in layers if weight.numel() >= 256 * 256)
    monkeypatch.setattr(cpu_linear, "PACKED_AT_MOST", 1)
    for memory, times, expected in ((8 * size, 31, False), (8 * size - 8, 32, False), (8 * size, 32, True)):
        monkeypatch.setattr(cpu_linear, "memory", lambda memory=memory: memory)
        with torch.no_grad(), lay_out(model, times):
            model(IDS)
        assert bool(taken) is expected
    taken.clear()
    monkeypatch.setattr(cpu_linear, "prefers_columns", lambda: True)  # where small ones are MKL's
    with torch.no_grad(), lay_out(model, 32):
        model(IDS)
    assert not taken
    monkeypatch.setattr(cpu_linear, "LARGE", 256 * 256)
    with torch.no_grad(), lay_out(model, 32):
        model(IDS)
    assert taken
