"""The switch, the self-tests against a transformers that changed, and what a prepared model is to others."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers.models.llama import modeling_llama

from keel import accel
from keel.accel import (
    AccelWarning,
    attention,
    batch_layout,
    cpu_linear,
    decode_graphs,
    decode_step,
    last_layer,
    modules,
    patches,
)
from keel.accel.cpu_linear import cast_cache, grads_in_place, patch_linears
from keel.models import logprobs, optim, precision
from keel.models.load import ModelSource, causal_lm
from keel.models.save import save
from keel.rollout import GenerationRequest, KeelEngine
from keel.rollout.engine import generate
from keel.rollout.reference_engine import ReferenceEngine
from keel.types import Sampling

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 60,
    "hidden_size": 64,
    "intermediate_size": 600,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
PROMPTS = [[5, 6, 7], [9], [40, 41, 42, 43, 44], [5, 6, 7], [8, 8]]
IDS = torch.tensor([[5, 6, 7, 8, 20, 21, 22], [5, 6, 7, 8, 30, 0, 0], [9, 10, 11, 12, 13, 14, 0]])
INDEX = torch.tensor([3, 4, 5, 7 + 3, 14 + 4])
TOKENS = torch.tensor([20, 21, 22, 30, 14])


def plain_model() -> Any:
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def keels(model: Any) -> tuple[Tensor, list[Tensor], list[tuple[int, ...]]]:
    """Log-probabilities of some tokens, their gradients, and greedy samples, as keel computes them."""
    model.zero_grad()
    inputs = logprobs.head_inputs(model, IDS, INDEX)
    logp = logprobs.token_logprobs(inputs, TOKENS).logp
    optim.backward(logp.sum())
    gradients = [p.grad.clone() for p in model.parameters()]
    done = generate(model, PROMPTS, Sampling(6, temperature=0), stop_ids=[99], pad_id=0, seed=0)
    return logp.detach(), gradients, [c.ids for c in done]


def transformers_own(model: Any) -> tuple[Tensor, list[Tensor], list[tuple[int, ...]]]:
    """The same by a forward of each row by itself."""
    model.zero_grad()
    parts = []
    for row, position in ((int(i) // 7, int(i) % 7) for i in INDEX):
        logits = model(input_ids=IDS[row : row + 1, : position + 1], use_cache=False).logits[0, -1]
        parts.append(logits.log_softmax(-1)[TOKENS[len(parts)]])
    logp = torch.stack(parts)
    logp.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    samples = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        samples.append(tuple(ids[len(prompt) :]))
    return logp.detach(), gradients, samples


def assert_agree(one: Any, other: Any) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-5)
    for a, b in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()) + 1e-6)
    assert one[2] == other[2]


# ---------------------------------------------------------------- a transformers that changed


def scaled_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = modeling_llama.LlamaDecoderLayer.forward
    monkeypatch.setattr(
        modeling_llama.LlamaDecoderLayer,
        "forward",
        lambda self, *given, **more: 1.1 * forward(self, *given, **more),
    )


def scaled_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        modeling_llama.LlamaRMSNorm,
        "forward",
        lambda self, x: x * self.weight / (1 + x.pow(2).mean(-1, keepdim=True)).sqrt(),
    )


def other_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    rotate = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(
        modeling_llama,
        "apply_rotary_pos_emb",
        lambda q, k, cos, sin, **more: rotate(1.2 * q, k, cos, sin, **more),
    )


def scaled_mlp(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: 0.8 * forward(self, x))


CHANGES: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], set[str]]] = {
    "layer": (scaled_layer, {"last_layer", "decode_step"}),
    "norm": (scaled_norm, {"norm_and_rope", "decode_step"}),
    "rotation": (other_rotation, {"norm_and_rope", "last_layer", "decode_step"}),
    "mlp": (scaled_mlp, {"cpu_linear", "decode_step"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_transformers_is_noticed_and_its_own_numbers_are_used(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, off = CHANGES[change]
    unchanged = keels(plain_model())
    make(monkeypatch)
    model = plain_model()
    theirs = transformers_own(copy.deepcopy(model))
    with pytest.warns(AccelWarning) as said:
        ours = keels(model)
    named = [re.search(r"accel: (\w+) is off for \w+", str(line.message)) for line in said]
    assert sorted(match.group(1) for match in named if match) == sorted(off)  # one line each
    assert_agree(ours, theirs)
    assert not torch.allclose(ours[0], unchanged[0], atol=1e-2)  # the change is one that shows
    keels(model)  # nothing is said again: a warning would be an error


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_a_changed_layer_of_another_family_is_noticed(
    family: str, config_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config_of(family, vocab_size=60, sliding_window=None)).eval()
    layer: Any = type(model.model.layers[-1])
    forward = layer.forward

    @functools.wraps(forward)  # with its signature: what a cache is called differs between releases
    def scaled(self: Any, *given: Any, **more: Any) -> Any:
        return 1.1 * forward(self, *given, **more)

    monkeypatch.setattr(layer, "forward", scaled)
    theirs = transformers_own(copy.deepcopy(model))
    with pytest.warns(AccelWarning) as said:
        ours = keels(model)
    assert {str(line.message).split()[1] for line in said} == {"last_layer", "decode_step"}
    assert_agree(ours, theirs)


@pytest.mark.parametrize("change", CHANGES)
def test_samples_and_scores_of_a_changed_transformers_are_its_own(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn, not only likeliest, tokens; and what a reward model or a critic says, with its gradient."""
    CHANGES[change][0](monkeypatch)
    model, config = plain_model(), LlamaConfig(**SIZES, pad_token_id=0)
    config.num_labels = 1
    request = GenerationRequest(PROMPTS, Sampling(6), [99], 0, 3)
    with accel.disabled():
        drawn = ReferenceEngine(copy.deepcopy(model)).generate(request)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccelWarning)
        ours = KeelEngine(model).generate(request)
    assert [c.ids for c in ours] == [c.ids for c in drawn]
    for one, other in zip(ours, drawn, strict=True):
        assert one.logp == pytest.approx(other.logp, abs=1e-4)
    scorer = LlamaForSequenceClassification(config).eval()
    twin: Any = copy.deepcopy(scorer)
    with pytest.warns(AccelWarning):
        scores = logprobs.scores_at(scorer, IDS, INDEX)
    optim.backward(scores.sum())
    theirs = torch.stack(
        [
            twin.score(twin.model(input_ids=IDS[i // 7 : i // 7 + 1, : i % 7 + 1]).last_hidden_state[0, -1])
            for i in INDEX.tolist()
        ]
    ).squeeze(-1)
    theirs.sum().backward()
    torch.testing.assert_close(scores, theirs, rtol=1e-4, atol=1e-5)
    for a, b in zip(scorer.parameters(), twin.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4 * float(b.grad.abs().max()) + 1e-6)


def test_a_trial_that_passes_says_nothing_and_the_paths_are_used() -> None:
    model = plain_model()
    with batch_layout.counting() as count:
        ours = keels(model)
        assert count() < IDS.numel()
    assert not accel.refusals(model)
    assert decode_step.fits(model)
    assert_agree(ours, transformers_own(plain_model()))


def test_the_recorded_step_has_a_trial_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_step, "fits", decode_step.has_shape)
    assert decode_graphs.fits(plain_model())
    scaled_layer(monkeypatch)
    with pytest.warns(AccelWarning, match="decode_graphs is off"):
        assert not decode_graphs.fits(plain_model())


def test_a_wrong_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain_model()
    theirs = transformers_own(copy.deepcopy(model))
    monkeypatch.setattr(attention, "rows_of", lambda mask: None)
    with pytest.warns(AccelWarning, match="batch_layout is off"):
        ours = keels(model)
    assert_agree(ours, theirs)


def test_a_path_with_right_values_and_wrong_gradients_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", _norm_without_gradient_of_its_scale)
    with pytest.warns(AccelWarning, match="norm_and_rope is off for LlamaRMSNorm.*gradients"):
        precision.prepare_model(plain_model(), "float32")


def _norm_without_gradient_of_its_scale(self: Any, x: Tensor) -> Tensor:
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).detach())


def test_a_trial_leaves_no_trace() -> None:
    model = plain_model().train()
    model.model.layers[0].eval()
    modes, seen = [m.training for m in model.modules()], list[Any]()
    model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(0))
    model.lm_head.weight.register_hook(lambda gradient: seen.append(1))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    hooks = [len(m._forward_hooks) for m in model.modules()]
    accel.prepare(model)
    layer, kept = model.model.layers[1], [id(p) for p in model.parameters()]
    assert patches.trusted("kv_slots", layer, lambda: None)
    with torch.no_grad(), logprobs.computing(model, CPU):
        assert logprobs.head_of(model) is not None
        assert batch_layout._ways_of(model.lm_head, model, lambda **given: model.model(**given)[0]).together
        assert decode_step.keeps_slots(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert [id(p) for p in model.parameters()] == kept
    assert all(bool((p.grad == 7).all()) for p in model.parameters())
    assert not seen


def test_running_out_of_memory_says_nothing_of_a_model() -> None:
    layer = nn.Linear(2, 2)

    def full() -> str | None:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        patches.trusted("head", layer, full)
    assert patches.trusted("head", layer, lambda: None)


# ---------------------------------------------------------------- what others see


def test_another_model_of_the_class_gives_the_bytes_it_gave(tmp_path: Path) -> None:
    plain_model().save_pretrained(tmp_path)

    def alone() -> tuple[Tensor, list[Tensor], Any]:
        model: Any = LlamaForCausalLM.from_pretrained(tmp_path)
        result = transformers_own(model)
        done = model.generate(IDS[:, :4], max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert not any(isinstance(m, modules.Patched) for m in model.modules())
        assert model.config._attn_implementation == "sdpa"
        return result[0], result[1], done

    before = alone()
    keels(causal_lm(ModelSource(str(tmp_path)), 0))
    after = alone()
    assert torch.equal(before[0], after[0])
    assert all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    assert torch.equal(before[2], after[2])


def test_loading_leaves_a_model_plain_and_so_does_saving(tmp_path: Path, tokenizer: Any) -> None:
    plain_model().save_pretrained(tmp_path / "a")
    model = causal_lm(ModelSource(str(tmp_path / "a")), 0)

    def is_plain() -> bool:
        return model.config._attn_implementation == "sdpa" and not any(
            isinstance(m, modules.Patched) for m in model.modules()
        )

    assert is_plain()
    expected = model(IDS).logits
    accel.prepare(model)
    assert not is_plain()
    assert accel.prepare(model) is model
    assert accel.restore(model) is model
    assert is_plain()
    assert torch.equal(model(IDS).logits, expected)
    accel.prepare(model)
    save(model, tokenizer, tmp_path / "b", "card")
    assert is_plain()
    assert "keel" not in (tmp_path / "b" / "config.json").read_text()


@pytest.mark.parametrize("way", ["torch", "pickle", "deepcopy", "copy"])
def test_prepared_models_are_copied_and_pickled(way: str) -> None:
    model = accel.prepare(plain_model())
    buffer = io.BytesIO()
    if way == "torch":
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        twin = copy.deepcopy(model) if way == "deepcopy" else copy.copy(model)
    assert isinstance(twin.model.norm, modules.Patched) == (way in ("deepcopy", "copy"))
    torch.testing.assert_close(twin(IDS).logits, model(IDS).logits)
    assert_agree(keels(twin), keels(model))
    if way == "deepcopy":
        with torch.no_grad():
            twin.lm_head.weight.zero_()
        assert float(model(IDS).logits.abs().max()) > 0


def loss_of(model: Any) -> Tensor:
    logits = model(IDS).logits
    return (logits * torch.linspace(-1, 2, logits.numel()).view_as(logits)).mean()


@pytest.mark.parametrize("half", [False, True])
def test_autograd_is_plain_outside_of_keels_loops(half: bool) -> None:
    model, plain = accel.prepare(plain_model()), plain_model()
    names = ["lm_head.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"]
    found: list[list[Tensor]] = []
    for each in (model, plain):
        asked = [each.get_parameter(name) for name in names]
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = loss_of(each)
        gradients = list(torch.autograd.grad(loss, asked, retain_graph=True))
        assert all(p.grad is None for p in each.parameters())
        loss.backward(inputs=asked[:1])
        assert [name for name, p in each.named_parameters() if p.grad is not None] == names[:1]
        torch.testing.assert_close(asked[0].grad, gradients[0])
        found.append(gradients)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-3, atol=(5e-2 if half else 1e-4) * float(theirs.abs().max())
        )


def test_functional_calls_and_their_gradients() -> None:
    model, plain = accel.prepare(plain_model()), plain_model()
    found = []
    for each in (model, plain):
        weights = {name: 1.1 * p.detach() for name, p in each.named_parameters()}
        found.append(
            torch.func.grad(
                lambda w, each=each: (torch.func.functional_call(each, w, (IDS,)).logits ** 2).mean()
            )(weights)
        )
        traced = {name: w.requires_grad_() for name, w in weights.items()}
        (torch.func.functional_call(each, traced, (IDS,)).logits ** 2).mean().backward()
        for name, gradient in found[-1].items():
            torch.testing.assert_close(traced[name].grad, gradient, rtol=1e-3, atol=1e-6)
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name])


def test_a_weight_that_is_used_twice_gets_both_gradients_in_place_and_not() -> None:
    layer: Any = nn.Linear(256, 256, bias=False)
    x = torch.randn(5, 256)
    (expected,) = torch.autograd.grad(layer(layer(x)).sum(), layer.weight)
    model: Any = patch_linears(nn.Sequential(layer))
    (found,) = torch.autograd.grad(model(model(x)).sum(), layer.weight)
    torch.testing.assert_close(found, expected)
    for _ in range(2):
        loss = model(model(x)).sum()
        with grads_in_place():
            loss.backward()
    torch.testing.assert_close(layer.weight.grad, 2 * expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- casts


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_no_step_of_an_optimiser_is_hidden_by_a_cast(kind: Any) -> None:
    model: Any = patch_linears(nn.Sequential(nn.Linear(64, 32)))
    optimizer = kind(model.parameters(), lr=0.5, **({"fused": True} if kind is torch.optim.AdamW else {}))
    x = torch.randn(4, 64)
    with cast_cache(), torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        before.float().pow(2).sum().backward()
        optimizer.step()
        after = model(x)
        with torch.no_grad():
            packed = model(x)
        fresh = nn.functional.linear(x, model[0].weight, model[0].bias)
    assert not torch.allclose(after, before, atol=0.1)
    torch.testing.assert_close(after, fresh, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(packed, fresh, rtol=2e-2, atol=2e-2)


# ---------------------------------------------------------------- the switch


def test_values_of_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = frozenset(accel.PATCHES)
    for text, off in [
        ("", set()),
        ("1", set()),
        ("on", set()),
        ("0", everything),
        ("OFF", everything),
        ("-head, -last_layer", {"head", "last_layer"}),
    ]:
        assert patches.parse_switch(text) == off
    for text in ("2", "head", "-heads"):
        with pytest.raises(ValueError, match=r"head|expected 0, 1"):
            patches.parse_switch(text)
    token = patches._off.set(None)
    try:
        monkeypatch.setenv("KEEL_ACCEL", "-head")
        assert accel.state() == "on without head"
        with accel.disabled("last_layer"):
            assert accel.state() == "on without head, last_layer"
        with accel.disabled():
            assert accel.state() == "off"
    finally:
        patches._off.reset(token)
    assert accel.state() == "on"
    with pytest.raises(ValueError, match="no path 'nothing'"), accel.disabled("nothing"):
        pass


def test_the_table_names_every_path_and_where_it_is() -> None:
    import importlib

    for row in accel.table():
        source = Path(str(importlib.import_module(row["where"]).__file__)).read_text()
        used = source + Path(str(decode_step.__file__)).read_text()  # which tries the slots
        assert f'"{row["name"]}"' in used
        assert all(row.values())


@pytest.mark.parametrize("prepared", [False, True])
def test_off_is_transformers_own_code_and_agrees(prepared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain_model()
    if prepared:
        accel.prepare(model)
    on = keels(plain_model())
    for forbidden in (cpu_linear._Product, cpu_linear._Gated):
        monkeypatch.setattr(forbidden, "apply", None)
    with accel.disabled(), batch_layout.counting() as count:
        off = keels(model)
        assert count() == IDS.numel()
        assert logprobs.head_of(model) is None
        assert not decode_step.keeps_slots(model)
    assert_agree(on, off)
    assert_agree(off, transformers_own(plain_model()))


@pytest.fixture(scope="module")
def on() -> Any:
    """What keel computes with every path."""
    with patches.all_enabled():
        return keels(plain_model())


@pytest.mark.parametrize("name", accel.PATCHES)
def test_each_path_can_be_off_by_itself(name: str, on: Any) -> None:
    with accel.disabled(name):
        assert_agree(keels(plain_model()), on)


@pytest.mark.parametrize("changed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_without_agrees_and_is_another_run(
    changed: bool, whole: dict[str, Any], run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """changed: also where transformers is not what the paths were written for."""
    if changed:
        scaled_layer(monkeypatch)
    names = ("base", "sft", "reward", "ppo")
    stages = copy.deepcopy({name: whole["stages"][name] for name in names})
    for name in names:
        stages[name] |= {"updates": 1} if name == "ppo" else {"max_steps": 1}
    with pytest.warns(AccelWarning, match="last_layer") if changed else contextlib.nullcontext():
        on = run({"stages": stages, "accel": True}, tmp_path / "on")
    off = run({"stages": stages, "accel": False}, tmp_path / "off")
    assert on.config.accel == "on"
    assert off.config.accel == "off"
    assert on.fingerprint("base") != off.fingerprint("base")
    for name in names:
        lines = [
            json.loads((pipeline.stage_directory(name) / "metrics.jsonl").read_text().splitlines()[0])
            for pipeline in (on, off)
        ]
        compared = {
            key
            for key, value in lines[0].items()
            if "loss" in key or "grad_norm" in key or ("kl" in key and isinstance(value, float))
        }
        assert compared
        for key in compared & lines[1].keys():
            assert lines[1][key] == pytest.approx(lines[0][key], rel=1e-3, abs=1e-5), (name, key)


# ---------------------------------------------------------------- what others put around modules


def on_attention(model: Any) -> None:
    attention = model.model.layers[-1].self_attn
    attention.register_forward_hook(lambda _, __, output: (3 * output[0], *output[1:]))


def around_attention(model: Any) -> None:
    attention = model.model.layers[-1].self_attn
    forward = attention.forward

    def scaled(*given: Any, **more: Any) -> Any:
        output = forward(*given, **more)
        return (3 * output[0], *output[1:])

    attention.forward = scaled


def on_norm(model: Any) -> None:
    model.model.layers[0].input_layernorm.register_forward_hook(lambda _, __, output: output.flip(-1))


def on_last_norm(model: Any) -> None:
    model.model.norm.register_forward_hook(lambda _, __, output: output.flip(-1))


def around_product(model: Any) -> None:
    product = model.model.layers[0].mlp.gate_proj
    forward = product.forward
    product.forward = lambda x: 3 * forward(x)


def on_logits(model: Any) -> None:
    def negated(_: Any, __: Any, output: Any) -> Any:
        output.logits = -output.logits
        return output

    model.register_forward_hook(negated)


def on_gate(model: Any) -> None:
    """A hook on what gates a feed-forward part, of the last layer, which `last_layer` calls too."""
    model.model.layers[-1].mlp.act_fn.register_forward_hook(lambda _, __, output: output * 0.5)


AROUND = (on_attention, around_attention, on_norm, on_last_norm, around_product, on_gate, on_logits)


@pytest.mark.parametrize(
    ("put", "used_before"),
    [
        pytest.param(put, used, marks=() if (number + used) % 2 else pytest.mark.slow)  # each once by default
        for number, put in enumerate(AROUND)
        for used in (False, True)
    ],
)
def test_hooks_and_forwards_of_others_stay_in_effect(put: Callable[[Any], None], used_before: bool) -> None:
    model = plain_model()
    unchanged = keels(copy.deepcopy(model))
    if used_before:
        keels(model)
    put(model)
    theirs = plain_model()
    put(theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccelWarning)
        ours = keels(model)
    assert_agree(ours, transformers_own(theirs))
    assert not torch.allclose(ours[0], unchanged[0], atol=1e-2)


def test_backward_hooks_of_a_product_are_called() -> None:
    model, seen = accel.prepare(plain_model()), list[int]()
    model.model.layers[0].mlp.gate_proj.register_full_backward_hook(lambda *_: seen.append(1))
    model(input_ids=IDS).logits.sum().backward()
    assert seen == [1]


def test_hidden_states_that_were_asked_for_once_turn_nothing_off() -> None:
    model = plain_model()
    model(input_ids=IDS, output_hidden_states=True)
    keels(model)
    assert last_layer._last_of(model) is not None
    assert decode_step.fits(model)


# ---------------------------------------------------------------- inference mode, compilers


@pytest.mark.parametrize("made_in_it", [False, True])
def test_a_prepared_model_works_in_inference_mode(made_in_it: bool) -> None:
    with torch.inference_mode(made_in_it):
        model = plain_model()
    expected = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccelWarning)
        accel.prepare(model)
    for half in (False, True):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half), cast_cache():
            ours, theirs = (m(input_ids=IDS, use_cache=False).logits for m in (model, expected))
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=5e-2 if half else 1e-5)


def test_a_path_that_is_first_used_in_inference_mode_stays_on() -> None:
    """Trap of our own: its trial failed there, since nothing can be saved for a backward, for good."""
    model = plain_model()
    accel.prepare(model)
    index = torch.arange(IDS.numel())
    with torch.inference_mode():
        logprobs.head_inputs(model, IDS, index)
    assert accel.refusals(model) == {}
    logprobs.head_inputs(model, IDS, index)
    assert accel.refusals(model) == {}


def test_a_prepared_model_is_traced_like_its_own() -> None:
    model = plain_model()
    expected = model(input_ids=IDS, use_cache=False).logits
    accel.prepare(model)
    whole = nn.Module()
    whole.model = model
    whole.forward = lambda ids: model(input_ids=ids, use_cache=False).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced: Any = torch.jit.trace(whole, IDS)
    torch.testing.assert_close(traced(IDS), expected, rtol=0, atol=1e-5)


def test_another_model_of_the_same_config_keeps_its_kernel() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    ours, other = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = other(input_ids=ids).logits
        accel.prepare(ours)
        assert ours.config._attn_implementation == "keel_sdpa"
        assert other.config._attn_implementation == config._attn_implementation == "sdpa"
        assert torch.equal(other(input_ids=ids).logits, before)
