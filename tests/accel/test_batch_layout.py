"""Sequences that begin alike read as one, and without padding, against the same read one by one."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from keel.accel import AccelWarning, attention, batch_layout, refusals
from keel.accel.attention import Rows
from keel.accel.batch_layout import BatchLayout, Group, arranged, counting, grouped, worth_it
from keel.data.batches import by_length, pad
from keel.models import logprobs, precision
from keel.models.load import checkpoint_activations, disable_dropout
from keel.models.lora import Adapters, add_adapters
from keel.models.precision import prepare_model
from keel.models.roles import AdaptersOff

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHARED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "mixtral": {"num_local_experts": 4},
    "gpt_neox": {},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
}
APART = {"bloom": {}, "mamba": {}}  # positions from the mask; no attention
TOGETHER_TOKENS = 19  # with each prompt once, and no row's last
APART_TOKENS = 32
PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12, 13]]
ROWS = [
    PROMPTS[0] + [20, 21, 22],
    PROMPTS[1] + [23, 24],
    PROMPTS[0] + [20, 25],
    PROMPTS[0] + [26],
    PROMPTS[1] + [27, 28, 29, 30],
    [40, 41, 42, 43],
]


def model_of(kind: str, more: dict[str, Any], auto: Any = AutoModelForCausalLM) -> Any:
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(kind, **{**SIZES, **more}))
    disable_dropout(model)
    return model.to(torch.float32 if kind == "mixtral" else torch.float64).eval()


def asked() -> tuple[Tensor, Tensor]:
    """The rows, and every position but each row's last."""
    ids, lengths = pad(ROWS, 0)
    index = [row * ids.shape[1] + i for row, n in enumerate(lengths.tolist()) for i in range(n - 1)]
    return ids, torch.tensor(index)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading together is taken to pay, however small the model."""
    monkeypatch.setattr(batch_layout, "DEARER", 0)


def apart(monkeypatch: pytest.MonkeyPatch, *, padded: bool = True) -> None:
    monkeypatch.setattr(batch_layout, "WORTH", 0.0)
    if padded:
        monkeypatch.setattr(batch_layout, "LAYING_OUT", math.inf)


def gradients(model: Any, found: Tensor) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    (found * torch.linspace(-1, 2, found.numel(), dtype=found.dtype).view_as(found)).sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same(model: Any, read: Any, monkeypatch: pytest.MonkeyPatch, *, fewer: bool = True) -> None:
    with counting() as count:
        together = read()
        tokens = count()
    found = gradients(model, together)
    apart(monkeypatch)
    with counting() as count:
        plain = read()
        assert (tokens < count()) is fewer
    close = {"rtol": 1e-4, "atol": 1e-5}  # norms and rotations are float32 whatever the weights are
    torch.testing.assert_close(together, plain, **close)
    expected = gradients(model, plain)
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-9 + 1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("kind", SHARED)
def test_states_and_gradients_are_those_of_sequences_read_apart(
    kind: str, always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (ids, index) = model_of(kind, SHARED[kind]), asked()
    assert_same(model, lambda: logprobs.head_inputs(model, ids, index).values, monkeypatch)


@pytest.mark.parametrize("kind", SHARED)
def test_rows_without_padding(kind: str, always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by itself, and each token up to the last that is asked for once; with padding where attention is
    not torch's."""
    model, (ids, index) = model_of(kind, SHARED[kind]), asked()
    apart(monkeypatch, padded=False)
    with counting() as count:
        logprobs.head_inputs(model, ids, index)
        assert count() == (ids.numel() if kind in ("gemma2", "gpt_neo") else APART_TOKENS)
    can = kind not in ("gemma2", "gpt_neo")
    assert_same(model, lambda: logprobs.head_inputs(model, ids, index).values, monkeypatch, fewer=can)


def test_rows_without_padding_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, index) = model_of("llama", {}).float(), asked()
    prepare_model(model, "auto")
    monkeypatch.setattr(precision, "fast_in_bfloat16", lambda device: True)
    with counting() as count:
        ours = logprobs.head_inputs(model, ids, index).values
        assert count() < APART_TOKENS
    found = gradients(model, ours)
    apart(monkeypatch)
    plain = logprobs.head_inputs(model, ids, index).values
    torch.testing.assert_close(ours, plain, rtol=0.05, atol=0.02 * float(plain.abs().max()))
    for a, b in zip(found, gradients(model, plain), strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.05 * float(b.abs().max()))


def test_rows_are_laid_out_and_taken_back_with_their_gradients() -> None:
    where = torch.tensor([0, 1, 4, 5, 6, 8])  # rows of 2, 3 and 1 tokens
    rows = Rows.of(where, 3, 4, torch.device("cpu"))
    assert rows.padding.tolist() == [2, 3, 7, 9, 10, 11]
    x = torch.arange(1.0, 13.0, dtype=torch.float64).view(1, 6, 2).requires_grad_()
    laid = rows.laid_out(x)
    assert laid.shape == (3, 4, 2)
    assert laid.view(12, 2)[where].equal(x[0])
    torch.testing.assert_close(rows.taken(laid), x)
    # what padding would be given goes nowhere, as nobody sees it
    pull = torch.rand(3, 4, 2, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(laid, x, pull)
    assert gradient[0].equal(pull.view(12, 2)[where])
    y = torch.rand(3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rows.taken, y)


def test_padding_is_read_where_there_is_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_layout, "LAYING_OUT", 1.1)
    found = [
        arranged([[i] * n for i, n in enumerate(lengths)], 1000, 4, None) for lengths in ([50, 48], [50, 40])
    ]
    assert [(way.unpadded, way.tokens) for way in found] == [(False, 98), (True, 90)]
    assert not arranged([[1] * 50, [2] * 40], 1000, 4, window=49).unpadded
    assert arranged([[1] * 50, [2] * 40, []], 1000, 4, window=50).tokens == 90


def test_more_rows_share_a_forward_where_they_need_no_padding() -> None:
    llama, gpt2 = model_of("llama", {}), model_of("gpt2", {**SHARED["gpt2"]})
    assert batch_layout.best_rows_of(llama) == batch_layout.best_rows_of(gpt2) == batch_layout.MANY
    eager = model_of("llama", {})
    eager.config._attn_implementation = "eager"
    drops = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", **{**SIZES, **SHARED["gpt2"]})
    ).train()
    apart = [model_of(kind, SHARED[kind]) for kind in ("gpt_neo", "gemma2")]
    assert {batch_layout.best_rows_of(model) for model in (eager, drops, *apart)} == {batch_layout.FEW}


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (  # scales by the row's own positions
            "llama4_text",
            {"num_local_experts": 2, "head_dim": 8, "intermediate_size_mlp": 48, "pad_token_id": None},
        ),
        # turns by the longest
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    ],
)
def test_models_for_which_the_length_of_a_row_means_something_keep_their_padding(
    kind: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    apart(monkeypatch, padded=False)
    model, (ids, index) = model_of(kind, more), asked()
    with counting() as count:
        logprobs.head_inputs(model.float(), ids, index)
        assert count() == ids.numel()
    assert batch_layout.best_rows_of(model) == batch_layout.FEW


@pytest.mark.parametrize("large", [0.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reading_that_is_wrong_is_found_out(
    large: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one channel is much larger than all others."""
    ids, index = asked()
    model = model_of("gpt_neox", {}).to(dtype)
    with torch.no_grad():
        model.gpt_neox.final_layer_norm.bias[0] = large
    right = model_of("gpt_neox", {}).to(dtype)
    right.load_state_dict(model.state_dict())
    monkeypatch.setattr(attention, "rows_of", lambda mask: None)  # every token sees every token
    with pytest.warns(AccelWarning, match="batch_layout is off for Linear"):
        logprobs.head_inputs(model, ids, index)
    assert "batch_layout" in refusals(model)
    monkeypatch.undo()
    logprobs.head_inputs(right, ids, index)
    assert not refusals(right)


@pytest.mark.parametrize("kind", APART)
def test_a_model_that_cannot_read_them_together_reads_them_apart(
    kind: str, always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (ids, index) = model_of(kind, APART[kind]), asked()
    assert_same(model, lambda: logprobs.head_inputs(model, ids, index).values, monkeypatch, fewer=False)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_scores_of_a_critic(kind: str, always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(kind, {**SHARED[kind], "num_labels": 1}, AutoModelForSequenceClassification)
    ids, index = asked()
    assert_same(model, lambda: logprobs.scores_at(model, ids, index), monkeypatch)


def test_adapters_the_policy_without_them_and_recomputed_activations(
    always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, index = asked()
    model = add_adapters(model_of("llama", {}), Adapters(4, 8, 0.0, "all-linear"), 0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert_same(model, lambda: logprobs.head_inputs(model, ids, index).values, monkeypatch)
    monkeypatch.undo()
    monkeypatch.setattr(batch_layout, "DEARER", 0)
    with torch.no_grad():
        off = logprobs.head_inputs(AdaptersOff(model), ids, index).values
        plain = logprobs.head_inputs(model_of("llama", {}), ids, index).values
    torch.testing.assert_close(off, plain, rtol=1e-4, atol=1e-5)
    again = model_of("llama", {})
    checkpoint_activations(again)
    again.train()
    assert_same(again, lambda: logprobs.head_inputs(again, ids, index).values, monkeypatch)


def test_rows_of_other_lengths_and_positions_that_nobody_asks_for(
    always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (ids, index) = model_of("llama", {}), asked()
    some = index[(index % ids.shape[1] > 2) & (index // ids.shape[1] != 1)]  # nothing of row 1
    assert_same(model, lambda: logprobs.head_inputs(model, ids, some).values, monkeypatch)


def in_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """What begins alike stands side by side in a row, under a mask."""
    monkeypatch.setattr(batch_layout, "LAYING_OUT", math.inf)
    monkeypatch.setattr(batch_layout, "BRANCHING", math.inf)


def test_dropout_and_windows_are_read_apart(always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, index = asked()
    torch.manual_seed(0)
    drops = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **{**SIZES, **SHARED["gpt2"]}))
    for training, expected in ((True, ids.numel()), (False, TOGETHER_TOKENS)):
        with counting() as count:
            logprobs.head_inputs(drops.train(training), ids, index)
        assert count() == expected
    window = model_of("mistral", {"sliding_window": 8})  # the widest group has 10 tokens, a sequence 8
    with counting() as count:
        logprobs.head_inputs(window, ids, index)
    assert count() == TOGETHER_TOKENS
    narrow = model_of("mistral", {"sliding_window": 4})  # narrower than the rows
    with counting() as count:
        logprobs.head_inputs(narrow, ids, index)
    assert count() == ids.numel()
    in_one_row(monkeypatch)
    with counting() as count:
        logprobs.head_inputs(window, ids, index)
    assert TOGETHER_TOKENS < count() < ids.numel()


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_a_row_longer_than_the_window_beside_rows_that_begin_alike(
    kind: str, always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap of our own: the mask that lets some rows be read together let the long one see everything."""
    model = model_of(kind, {**SHARED[kind], "sliding_window": 8})
    rows = [[5, 6, 7, 20 + i, 30 + i] for i in range(4)] + [list(range(40, 60))]
    ids, lengths = pad(rows, 0)
    index = torch.tensor([row * 20 + i for row, n in enumerate(lengths.tolist()) for i in range(n)])
    assert not arranged(rows, 1000, 4, window=8).together
    assert arranged(rows, 1000, 4, window=20).together
    assert_same(model, lambda: logprobs.head_inputs(model, ids, index).values, monkeypatch, fewer=False)


def test_a_long_start_is_read_under_a_mask_where_it_would_be_attended_to_again_in_each_row() -> None:
    """A kernel that is given 16 rows of 716 tokens reads nine times the scores of one of 956."""

    def found(start: int) -> BatchLayout:
        rows = [[*range(start), *[-1 - i] * 16] for i in range(16)]
        return arranged(rows, 3088, 4, None)

    short, long = found(400), found(700)
    assert (short.unpadded, short.tokens) == (True, 656)
    assert (long.unpadded, long.tokens) == (False, 956)
    huge = found(2000)  # whose mask would take more than masks may
    assert (huge.unpadded, huge.tokens) == (True, 2256)


def test_what_is_worth_reading_together() -> None:
    prompt = list(range(50))
    rows = [prompt + [100 + i] * 30 for i in range(4)] + [[7] * 60, [8] * 5]
    groups = grouped(rows, weight=2000, widest=1000)
    assert sorted((sorted(g.rows), g.common, g.width) for g in groups) == [
        ([0, 1, 2, 3], 50, 170), ([4], 60, 60), ([5], 5, 5),
    ]  # fmt: skip
    assert max(len(g.rows) for g in grouped(rows, weight=2000, widest=120)) == 2  # 50 + 2 × 30 is 110
    wide = [[1, 2, *[i] * 100] for i in range(3, 6)]  # where attention is all there is, a wide row is dear
    assert all(len(g.rows) == 1 for g in grouped(wide, weight=10, widest=1000))
    alike = [[1, 2, 3], [1, 2, 3], [1, 2]]
    assert [(sorted(g.rows), g.common, g.width) for g in grouped(alike, 1e6, 100)] == [([0, 1, 2], 2, 4)]


def test_the_masks_of_a_forward_have_a_limit(always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, index) = model_of("llama", {}), asked()
    in_one_row(monkeypatch)
    monkeypatch.setattr(batch_layout, "MASK_AT_MOST", 6 * 8 * 8**2)  # six rows of 8 tokens in float64
    with counting() as count:
        logprobs.head_inputs(model, ids, index)
    assert TOGETHER_TOKENS < count() < ids.numel()
    monkeypatch.setattr(batch_layout, "MASK_AT_MOST", 0)
    with counting() as count:
        logprobs.head_inputs(model, ids, index)
    assert count() == ids.numel()


def test_rows_of_one_prompt_share_a_part() -> None:
    lengths, prompts = [5, 3, 9, 8, 5, 7], ["a", "b", "a", "b", "a", "b"]
    assert by_length(lengths, together=prompts) == [[1, 5, 3, 0, 4, 2]]
    assert by_length(lengths, 3, together=prompts) == [[1, 5, 3], [0, 4, 2]]
    assert by_length(lengths, 4, together=prompts) == [
        [1, 5, 3],
        [0, 4, 2],
    ]  # a group is not cut for a single row
    assert by_length(lengths, 2, together=prompts) == [[1, 5], [3, 0], [4, 2]]
    assert by_length(lengths, tokens=24, together=prompts) == [[1, 5, 3], [0, 4], [2]]


def test_rows_are_padded_to_the_widest_group_and_that_must_pay_too() -> None:
    prompt = list(range(50))
    rows = [prompt + [100 + i] * 50 for i in range(4)] + [[i] * 100 for i in range(200, 204)]
    lengths = [len(row) for row in rows]
    groups = grouped(rows, 1e6, 1e6)
    assert max(group.width for group in groups) == 250  # five rows of 250 are more than eight of 100
    assert worth_it(groups, lengths, 1e6) == []
    alike = grouped([row + row[-1:] * 1 for row in rows[:4]], 1e6, 1e6)
    assert worth_it(alike, [101] * 4, 1e6) == alike
    pairs = [Group([0, 1], 90, 110), Group([2, 3], 90, 110), Group([4, 5], 10, 190)]
    found = worth_it(pairs, [100] * 6, 1e6)
    assert sorted(group.width for group in found) == [100, 100, 110, 110]  # the widest is taken apart


def test_every_forward_is_counted_whatever_the_model() -> None:
    model, (ids, index) = model_of("llama", {}), asked()
    headless = model_of("llama", {})
    headless.forward = lambda *a, **k: model(*a, **k)  # its own head is not what makes these logits
    with counting() as count, pytest.warns(AccelWarning, match="head is off"):
        logprobs.head_inputs(headless, ids, index)
    assert count() == ids.numel()
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with counting() as count:
        logprobs.head_inputs(model, ids, index, inputs={"position_ids": positions})
    assert count() == ids.numel()


def test_a_model_whose_layers_differ_in_size_is_read_apart() -> None:
    config = SimpleNamespace(hidden_size=32, intermediate_size=[48, 48])  # Gemma 3n
    assert batch_layout._weight(config) is None
