"""The recorded step against the lean one, on the CPU. In the place of a graph stands a tape: it replays
torch's operations on the tensors that they worked on when they were recorded, and runs nothing of Python that
was in between."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from keel.accel import decode_graphs, decode_static
from keel.accel.kv_slots import Slots
from keel.algorithms.masked import token_logp
from keel.models import precision
from keel.models.lora import Adapters, add_adapters
from keel.rollout import stream
from keel.rollout.engine import KeelEngine, TokenCount, generate
from keel.rollout.protocol import GenerationRequest, NextTurn
from keel.types import Completion, Sampling

EOS, PAD, NEVER = 1, 0, 10**6
SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": EOS,
    "eos_token_id": EOS,
}
ARCHITECTURES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(sliding_window=None, **SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=16, **SIZES)),
}
# of different lengths, some several times, more of them than slots
DIFFERENT = [[5, 6, 7], [9], [40, 41, 42, 43, 44, 45, 46], [8, 8], [50, 3], [2] * 12]
PROMPTS = [prompt for i, prompt in enumerate(DIFFERENT) for _ in range(1 + 3 * (i % 2))]
STOPS = [EOS, *range(20, 24)]  # so that responses end early and late


def tiny(architecture: str = "llama") -> Any:
    torch.manual_seed(1)
    return ARCHITECTURES[architecture]().eval()


class Tape(TorchDispatchMode):
    """What a CUDA graph is, on the CPU: operations, and the places that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        with torch.autocast("cpu", enabled=False):  # casts are among the operations
            for func, args, kwargs, out in self.operations:
                for place, result in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(place, torch.Tensor) and place.data_ptr() != result.data_ptr():
                        place.copy_(result)


class Recorder:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(decode_graphs, "recorder", lambda device: self)

    def __call__(self, function: Any) -> Any:
        self.shapes.append(function.args)
        function()  # warms up
        with Tape() as tape:
            function()
        return tape.replay

    def off(self) -> None:
        self.monkeypatch.setattr(decode_graphs, "recorder", lambda device: None)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Steps are recorded, in widths so small that a few tokens need several."""
    for module in (decode_graphs, decode_static):
        monkeypatch.setattr(module, "COLUMNS", 8)
    monkeypatch.setattr(decode_graphs, "_kept", weakref.WeakKeyDictionary())
    return Recorder(monkeypatch)


def sampled(model: Any, prompts: list[list[int]] = PROMPTS, **options: Any) -> list[Completion]:
    defaults: dict[str, Any] = {"stop_ids": STOPS, "pad_id": PAD, "seed": 3, "batch_size": 5}
    sampling = Sampling(options.pop("tokens", 16), temperature=options.pop("temperature", 1.5))
    return generate(model, prompts, sampling, **{**defaults, **options})


def assert_same(ours: list[Completion], theirs: list[Completion]) -> None:
    assert [(c.prompt_ids, c.ids, c.stop_reason) for c in ours] == [
        (c.prompt_ids, c.ids, c.stop_reason) for c in theirs
    ]
    for a, b in zip(ours, theirs, strict=True):
        assert a.logp == pytest.approx(b.logp, abs=1e-5)


def assert_as_exact(recorded: list[Completion], lean: list[Completion], model: Any) -> None:
    """The same tokens, and log-probabilities that are as near to those of a forward in float64 as the lean
    step's.

    For models whose weights are so large that rounding in float32 shows: on one processor, with weights × 1.3
    or strong adapters, either step is off by 1.1e-5 to 1.3e-5, which is more than `assert_same` allows
    between the two.
    """
    assert [c.ids for c in recorded] == [c.ids for c in lean]
    exact, errors = copy.deepcopy(model).double(), list[float]()
    for done in (recorded, lean):
        gaps = []
        for c in done:
            ids, before = torch.tensor([[*c.prompt_ids, *c.ids]]), len(c.prompt_ids) - 1
            with torch.no_grad():
                logits = exact(input_ids=ids).logits[:, before:-1]
            expected = token_logp(logits, ids[:, before + 1 :], 1.5)[0]
            gaps.append(float((torch.tensor(c.logp, dtype=torch.float64) - expected).abs().max()))
        errors.append(max(gaps))
    assert errors[0] <= 2 * errors[1] + 1e-6
    assert errors[1] < 5e-5  # rounding, and no more


@pytest.mark.parametrize(
    ("slots", "temperature", "architecture"),
    [
        pytest.param(slots, temperature, name, marks=() if (one + other) % 2 else pytest.mark.slow)
        for one, (slots, temperature) in enumerate([(1, 1.5), (5, 0), (5, 1.5), (64, 1.5)])
        for other, name in enumerate(ARCHITECTURES)
    ],
)
def test_recorded_steps_sample_what_the_lean_step_samples(
    architecture: str, slots: int, temperature: float, recorder: Recorder
) -> None:
    model = tiny(architecture)
    recorded = sampled(model, batch_size=slots, temperature=temperature)
    assert 1 < len(recorder.shapes) == len(set(recorder.shapes)) <= 16
    recorder.off()
    plain = sampled(model, batch_size=slots, temperature=temperature)
    assert_same(recorded, plain)
    assert len({c.stop_reason for c in plain}) > 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_the_head_was_given_comes_with_each_token_though_hooks_do_not_run(
    architecture: str, recorder: Recorder
) -> None:
    model = tiny(architecture)
    recorded = sampled(model, hidden=True)
    assert recorder.shapes
    recorder.off()
    for ours, theirs in zip(recorded, sampled(model, hidden=True), strict=True):
        assert ours.hidden is not None
        torch.testing.assert_close(ours.hidden, theirs.hidden, rtol=1e-4, atol=1e-4)
    assert_same(recorded, sampled(model))


def test_a_cache_that_is_shifted_when_it_is_full_and_when_most_of_it_is_behind(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    shifts: list[bool] = []
    close_up = Slots.close_up

    def watched(slots: Slots) -> None:
        shifts.append(slots.column == slots.columns)
        close_up(slots)

    monkeypatch.setattr(Slots, "close_up", watched)
    monkeypatch.setattr(stream, "SPARE_COLUMNS", 1)
    model, options = tiny(), {"tokens": 40, "batch_size": 3, "temperature": 2.0, "stop_ids": [20]}
    recorded = sampled(model, PROMPTS * 3, **options)
    assert {True, False} == set(shifts)
    recorder.off()
    assert_same(recorded, sampled(model, PROMPTS * 3, **options))


def test_conversations_go_on_in_recorded_steps(recorder: Recorder) -> None:
    """Whose cache is the steps' own: what a row keeps is a copy."""
    model = tiny()

    def talk() -> list[Any]:
        found: list[Any] = []

        def answer(row: int, turn: Any) -> NextTurn | None:
            found.append((row, turn.ids))
            whole = (*turn.prompt_ids, *turn.ids, *range(30, 31 + turn.ids[0] % 7))
            left = 44 - (len(whole) - len(PROMPTS[row]))
            return NextTurn(whole, left) if left > 0 else None

        asked = GenerationRequest(PROMPTS, Sampling(max_new_tokens=44, temperature=2.0), STOPS, 0, 3)
        KeelEngine(model, batch_size=4).converse(asked, answer)
        return found

    recorded = talk()
    assert recorder.shapes
    recorder.off()
    assert recorded == talk()
    assert len(recorded) > 2 * len(PROMPTS)


def test_shapes_are_few_and_depend_on_the_call_alone(recorder: Recorder) -> None:
    """Or a run that was killed and goes on would compute in other shapes than one that was not, and round
    otherwise."""

    def used(model: Any) -> list[tuple[int, int]]:
        found = list[tuple[int, int]]()
        (steps,) = decode_graphs._kept.values()
        record, steps._record = steps._record, lambda function: found.append(function.args) or function
        steps.replays.clear()
        sampled(model)
        steps._record = record
        return found

    fresh, veteran = tiny(), tiny()
    sampled(fresh)
    alone = used(fresh)
    del fresh
    gc.collect()
    sampled(veteran, PROMPTS * 2, tokens=40, batch_size=20)
    assert used(veteran) == alone
    assert {rows for rows, _ in alone} <= {5, 3, 2, 1}
    assert {width for _, width in alone} <= {8, 16, 24, 32, 48, 64}


@pytest.mark.parametrize(
    ("column", "width"),
    [(0, 128), (127, 128), (128, 256), (300, 384), (400, 512), (600, 768), (1000, 1024), (1100, 1152)],
)
def test_widths_grow_by_a_half_or_a_third_up_to_the_columns_there_are(column: int, width: int) -> None:
    slots = Slots(4, 1152, torch.device("cpu"))
    slots.column = column
    assert decode_static.width_of(slots) == width


def test_recorded_steps_are_used_again_and_see_what_training_did_to_the_weights(recorder: Recorder) -> None:
    model = tiny()
    before = sampled(model)
    assert sampled(model) == before
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    after = sampled(model)
    assert len(recorder.shapes) == len(set(recorder.shapes))  # none of them twice
    recorder.off()
    assert_as_exact(after, sampled(model), model)
    assert [c.ids for c in after] != [c.ids for c in before]


def test_nothing_recorded_is_used_after_weights_were_replaced_or_the_cache_was_too_small(
    recorder: Recorder,
) -> None:
    model = tiny()
    sampled(model)
    first = len(recorder.shapes)
    sampled(model, batch_size=3, tokens=8)  # a smaller one has room in the first
    (steps,) = decode_graphs._kept.values()
    cache = steps.static.cache[0][0]
    assert cache.shape[:3] == (5, 2, 64)  # 12 + 16 + 32 columns, in multiples of 8
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 1.3)
    of_new_weights = sampled(model)
    (steps,) = decode_graphs._kept.values()
    assert steps.static.cache[0][0] is not cache
    assert recorder.shapes[0] in recorder.shapes[first:]  # again
    before = len(recorder.shapes)
    of_more = sampled(model, PROMPTS * 2, batch_size=9, tokens=24)
    assert steps.static.cache[0][0].shape[0] == 9
    assert len(recorder.shapes) > before
    recorder.off()
    assert_same(of_new_weights, sampled(model))
    assert_same(of_more, sampled(model, PROMPTS * 2, batch_size=9, tokens=24))


def test_rows_of_which_nobody_reads_anything_stay_finite_and_nan_does_not_outlive_a_call(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = decode_static.Static.take

    def watched(self: Any, *given: Any, **named: Any) -> None:
        take(self, *given, **named)
        assert bool((self.starts <= self.column).all())  # each row has a column to look at

    monkeypatch.setattr(decode_static.Static, "take", watched)
    model = tiny()
    expected = sampled(model)
    (steps,) = decode_graphs._kept.values()
    assert all(bool(held.isfinite().all()) for layer in steps.static.cache for held in layer)
    first = model.model.layers[0].input_layernorm.weight
    kept = first.clone()
    steps.static.starts.fill_(10**6)  # as of rows that are gone, before everything moved to the left
    sampled(model, DIFFERENT[:2])
    with torch.no_grad():  # a policy that went astray, and is put back
        first.fill_(torch.nan)
        sampled(model)
        assert any(bool(held.isnan().any()) for layer in steps.static.cache for held in layer)
        first.copy_(kept)
    assert_same(sampled(model), expected)
    assert decode_graphs._kept[model] is steps


@pytest.mark.parametrize(
    "architecture", ["llama", "qwen2"]
)  # without and with biases and one matrix for both ends
@pytest.mark.parametrize("adapted", [False, True])
def test_in_bfloat16_weights_are_cast_once_a_call_and_left_alone(
    architecture: str, adapted: bool, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "fast_in_bfloat16", lambda device: True)
    model = precision.prepare_model(tiny(architecture), "auto")
    if adapted:
        model = add_adapters(model, Adapters(r=4), 0).eval()
        model.keel_auto = True
    own = {name: (id(p), p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    for factor in (1.0, 1.2):  # the second time with weights that were changed in place
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor)
        for c in sampled(model, DIFFERENT, temperature=1.0):
            ids, before = torch.tensor([[*c.prompt_ids, *c.ids]]), len(c.prompt_ids) - 1
            with torch.no_grad(), precision.computing(model, ids.device):
                logits = model(input_ids=ids).logits[:, before:-1]
            assert logits.dtype == torch.bfloat16  # what was meant to be tested
            torch.testing.assert_close(
                torch.tensor([c.logp]), token_logp(logits, ids[:, before + 1 :]), rtol=0, atol=0.15
            )
        assert own == {name: (id(p), p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    (steps,) = decode_graphs._kept.values()
    assert {copy.dtype for copy in steps.casts.tensors} == {torch.bfloat16}
    assert steps.static.logits.dtype == steps.static.cache[0][0].dtype == torch.bfloat16
    assert len(recorder.shapes) == len(set(recorder.shapes))  # the casts stay where they are


class Product(torch.nn.Module):
    """A linear layer, and none to those who look at its class."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.weight = layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight)


def test_no_cast_is_recorded_that_autocast_keeps(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "fast_in_bfloat16", lambda device: True)
    model = precision.prepare_model(tiny(), "auto")
    for layer in model.model.layers:
        layer.mlp.up_proj = Product(layer.mlp.up_proj)
    sampled(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    recorded, shapes = sampled(model, temperature=0), list(recorder.shapes)
    decode_graphs._forget(model)
    assert [c.ids for c in sampled(model, temperature=0)] == [c.ids for c in recorded]
    assert len(shapes) == len(set(shapes)) < len(recorder.shapes)


def test_adapters_are_in_a_recorded_step_and_it_is_recorded_anew_without_them(recorder: Recorder) -> None:
    model = add_adapters(tiny(), Adapters(r=4), 0).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5, generator=generator)
    adapted = sampled(model)
    assert recorder.shapes
    with model.disable_adapter():
        bare = sampled(model)
    recorder.off()
    assert_as_exact(adapted, sampled(model), model)
    assert_same(bare, sampled(tiny()))
    assert [c.ids for c in adapted] != [c.ids for c in bare]


@pytest.mark.parametrize("adapted", [False, True])
def test_what_was_recorded_goes_with_its_model(adapted: bool, recorder: Recorder) -> None:
    gc.collect()
    model = add_adapters(tiny(), Adapters(r=4), 0).eval() if adapted else tiny()
    sampled(model)
    (steps,) = decode_graphs._kept.values()
    gone = [weakref.ref(model), weakref.ref(steps), weakref.ref(steps.static.cache[0][0])]
    del model, steps
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3
    assert not decode_graphs._kept


def test_no_more_is_kept_than_a_part_of_the_card(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = tiny(), tiny("qwen2")
    expected = sampled(one)
    (steps,) = decode_graphs._kept.values()
    held = steps.bytes
    assert held > sum(k.nbytes + v.nbytes for k, v in steps.static.cache)
    monkeypatch.setattr(decode_graphs, "_may_stay", lambda device: held)
    sampled(two)  # both together are too much
    assert not decode_graphs._kept
    monkeypatch.setattr(decode_graphs, "_may_stay", lambda device: held - 1)
    freed = weakref.ref(steps.static.cache[0][0])
    del steps
    assert freed() is None
    assert_same(sampled(one), expected)
    assert not decode_graphs._kept


def test_keys_and_values_that_are_not_kept_are_gone_when_the_engine_returns(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not when Python's collector comes."""
    monkeypatch.setattr(decode_graphs, "_may_stay", lambda device: 0)
    model = tiny()
    sampled(model)
    gc.collect()
    gc.disable()
    try:
        before = sum(type(o) is torch.Tensor for o in gc.get_objects())
        sampled(model)
        assert sum(type(o) is torch.Tensor for o in gc.get_objects()) <= before
    finally:
        gc.enable()


def test_steps_that_cannot_be_recorded_are_taken_without_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, recorder: Recorder
) -> None:
    attempts: list[Any] = []

    def failing(function: Any) -> Any:
        attempts.append(function)
        if len(attempts) > 2:  # in the middle of a call
            raise RuntimeError("operation not permitted when stream is capturing")
        return recorder(function)

    model = tiny()
    monkeypatch.setattr(decode_graphs, "recorder", lambda device: failing)
    with pytest.warns(UserWarning, match="could not be recorded .* not permitted"):
        first = sampled(model, hidden=True)
    assert sampled(model) == sampled(model)  # a warning would be an error
    assert len(attempts) == 3
    assert not decode_graphs._kept
    recorder.off()
    plain = sampled(model, hidden=True)
    assert_same(first, plain)
    for ours, theirs in zip(first, plain, strict=True):
        assert ours.hidden is not None
        torch.testing.assert_close(ours.hidden, theirs.hidden, rtol=1e-4, atol=1e-4)


def test_a_cache_that_could_not_be_made_is_made_the_next_time(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(decode_static.Static, "_step", full)
        with pytest.raises(torch.OutOfMemoryError):
            sampled(model)
    recorded = sampled(model)
    assert recorder.shapes
    recorder.off()
    assert_same(recorded, sampled(model))


def test_models_that_decide_on_the_cpu_are_not_recorded(recorder: Recorder) -> None:
    assert decode_graphs.fits(tiny())
    hooked = tiny()
    hooked.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    assert not decode_graphs.fits(hooked)
    sampled(hooked)
    assert not recorder.shapes
    read = tiny()
    read.lm_head.register_forward_pre_hook(lambda *_: None)
    assert decode_graphs.fits(read, reading=True)
    assert not decode_graphs.fits(read)
    read.lm_head.register_forward_pre_hook(lambda *_: None)
    assert not decode_graphs.fits(read, reading=True)
    moved = tiny()
    moved.model.norm._hf_hook = None
    assert not decode_graphs.fits(moved)
    quantised = tiny()
    kind = type("Linear4bit", (torch.nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    quantised.model.layers[1].mlp.down_proj.__class__ = kind
    assert not decode_graphs.fits(quantised)
    half = add_adapters(tiny().bfloat16(), Adapters(r=4), 0).eval()  # its hooks only cast
    half.enable_input_require_grads()
    assert decode_graphs.fits(half)
    assert_same_tokens_without(half, recorder)


def assert_same_tokens_without(model: Any, recorder: Recorder) -> None:
    recorded = sampled(model, temperature=0)
    assert recorder.shapes
    recorder.off()
    assert [c.ids for c in recorded] == [c.ids for c in sampled(model, temperature=0)]


def test_rows_that_nobody_reads_are_counted_as_computed(recorder: Recorder) -> None:
    work, plain = TokenCount(), TokenCount()
    sampled(tiny(), [[5, 6, 7]] * 7, stop_ids=[NEVER], tokens=4, batch_size=4, work=work)
    # the prompt twice; three steps of four rows, and three of the three that are left, for which four are
    # computed
    assert work.computed == 2 * 3 + 3 * 4 + 3 * 4
    recorder.off()
    sampled(tiny(), [[5, 6, 7]] * 7, stop_ids=[NEVER], tokens=4, batch_size=4, work=plain)
    assert plain.computed == 2 * 3 + 3 * 4 + 3 * 3
    assert work.useful == plain.useful
