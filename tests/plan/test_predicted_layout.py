"""What is foreseen of a forward against what a model is given."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from keel.accel import batch_layout, last_layer
from keel.accel.attention import rows_of
from keel.data.batches import pad
from keel.models import logprobs
from keel.plan import model_shapes, predicted_layout
from keel.plan.model_memory import Forward, Lora, Model
from keel.plan.predicted_layout import Row

pytestmark = pytest.mark.usefixtures("accel_on")  # a plan reckons with the fast paths


def _given(model: Any, look: Any, ids: Tensor, index: Tensor) -> Forward:
    """What the model's trunk is really given by `look`."""
    trunk, seen = logprobs.backbone(model), list[Forward]()
    layers = getattr(trunk, "layers", None)
    positions: list[int] = []

    def see(_: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids, mask = inputs[0] if inputs else named["input_ids"], named.get("attention_mask")
        rows = rows_of(mask)
        if rows is None:
            seen.append(Forward(*ids.shape, mask is not None))
        else:
            seen.append(Forward(rows.rows, rows.width, unpadded=ids.numel()))

    def count(_: Any, inputs: tuple[Tensor, ...]) -> None:
        positions.append(inputs[0].numel() // inputs[0].shape[-1])

    hooks = [trunk.register_forward_pre_hook(see, with_kwargs=True)]
    if layers is not None:
        hooks.append(layers[-1].mlp.register_forward_pre_hook(count))
    look(model, ids, index)
    for hook in hooks:
        hook.remove()
    whole = not positions or positions[-1] == seen[-1].tokens
    return seen[-1] if whole else replace(seen[-1], looked=positions[-1])


def _batch(draws: random.Random, *, scored: bool) -> tuple[Tensor, Tensor, list[Row]]:
    """Rows of a few prompts at random, two of each or more of one length: ids, the positions asked for, and
    what is known of them beforehand. (Of others it would depend on their order which are put together.)"""
    rows, known, index = [], list[Row](), list[tuple[int, range]]()
    prompts = [[draws.randrange(1, 101) for _ in range(draws.randrange(1, 16))] for _ in range(3)]
    for prompt in range(len(prompts)):
        prompts[prompt][0] = 1 + prompt  # no two begin alike by chance
        branches, each = draws.randrange(1, 5), draws.randrange(1, 31)
        for branch in range(branches):
            own = each if branches > 2 else draws.randrange(1, 31)
            answer = [40 + branch, *(draws.randrange(1, 101) for _ in range(own - 1))]
            start, length = len(prompts[prompt]), len(prompts[prompt]) + len(answer)
            asked = range(length - 1, length) if scored else range(start - 1, length - 1)
            index.append((len(rows), asked))
            rows.append(prompts[prompt] + answer)
            known.append(
                (predicted_layout.scored if scored else predicted_layout.answer)(prompt, start, len(answer))
            )
    ids, _ = pad(rows, 0)
    where = [row * ids.shape[1] + at for row, asked in index for at in asked]
    return ids, torch.tensor(where), known


@pytest.mark.parametrize(
    ("kind", "scored"),
    [
        pytest.param(kind, scored, marks=() if (number + scored) % 2 else pytest.mark.slow)
        for number, kind in enumerate(["llama", "qwen3", "gpt2", "gpt_neox", "mistral"])
        for scored in (False, True)
    ],
)
def test_it_is_what_the_model_is_given(config_of, kind, scored):
    config = config_of(kind, num_labels=1)  # a Mistral's window is wider than its rows here, but there is one
    family: Any = AutoModelForSequenceClassification if scored else AutoModelForCausalLM
    model = family.from_config(config).eval()
    shape = model_shapes.of_config(config)
    assert shape is not None
    planned, draws, together, narrow = Model(shape, device="cpu"), random.Random(0), 0, 0
    look = logprobs.scores_at if scored else logprobs.head_inputs
    with torch.no_grad():
        look(model, *_batch(draws, scored=scored)[:2])  # tries out its head, and whether it takes masks
        for _ in range(30):
            ids, index, rows = _batch(draws, scored=scored)
            read = _given(model, look, ids, index)
            found = predicted_layout.forward(planned, rows)
            assert replace(found, most=0, scores=0) == read
            together += read.masked or (read.unpadded or read.cells) < sum(row.end for row in rows)
            narrow += read.looked is not None
    assert 5 < together < 30
    assert (narrow > 0) is (kind in ("llama", "qwen3"))


PAIR = [predicted_layout.answer(0, 100, 20), predicted_layout.answer(0, 100, 16)]
LLAMA = model_shapes.KNOWN["HuggingFaceTB/SmolLM2-135M"]


def test_by_hand():
    """The prompt of 100 once, and both answers without their last token; the prompt's last position is wanted
    by both."""
    assert predicted_layout.forward(Model(LLAMA), PAIR) == Forward(1, 134, masked=True, looked=35, most=35)
    ends = [predicted_layout.scored(0, 100, 20), predicted_layout.scored(0, 100, 16)]
    assert predicted_layout.forward(Model(LLAMA), ends) == Forward(1, 136, masked=True, looked=2, most=2)
    other = [predicted_layout.answer(0, 100, 20), predicted_layout.answer(1, 100, 16)]
    assert predicted_layout.forward(Model(LLAMA), other) == Forward(2, 120, looked=36, most=20)


@pytest.mark.parametrize(
    "model",
    [
        Model(
            replace(LLAMA, kind="gemma3", known=False)
        ),  # of which nobody has tested whether it takes masks
        Model(replace(LLAMA, draws=True), trained=True, dropout=True),
        Model(LLAMA, trained=True, lora=Lora(dropout=True)),
        Model(replace(LLAMA, window=115)),  # no wider than a sequence
    ],
)
def test_what_cannot_be_read_together_or_not_be_known_is_read_apart(model):
    read = predicted_layout.forward(model, PAIR)
    assert (read.rows, read.length, read.masked) == (2, 120, False)


@pytest.mark.parametrize(
    "model",
    [
        Model(replace(LLAMA, kind="gpt2")),
        Model(LLAMA, "int4"),
        Model(replace(LLAMA, window=4096)),
        Model(replace(LLAMA, attention_dropout=True), trained=True, dropout=True),
    ],
)
def test_where_the_last_layer_may_be_whole_it_is_taken_to_be(model):
    assert predicted_layout.forward(model, PAIR).looked is None


def test_parts_are_those_of_the_loops():
    rows = [predicted_layout.answer(i // 2, 10, 5) for i in range(12)]
    assert [[row.begins for row in part] for part in predicted_layout.parts(rows, 8)] == [
        [0, 0, 1, 1, 2, 2, 3, 3], [4, 4, 5, 5],
    ]  # fmt: skip
    assert [len(part) for part in predicted_layout.parts(rows, 5)] == [4, 4, 4]  # no pair is cut
    assert [len(part) for part in predicted_layout.parts(rows, None, 46)] == [2] * 6


def test_types_that_are_said_to_take_masks_and_to_have_such_layers_are_known_and_exist(config_of):
    assert {*batch_layout.KINDS} | {*last_layer.KINDS} <= {*model_shapes.FAMILIES}
    for kind in model_shapes.FAMILIES:
        if kind not in model_shapes.ENCODERS:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config_of(kind))
            layers = getattr(model.base_model, "layers", [None])
            assert isinstance(layers[-1], last_layer.LAYERS) is (kind in last_layer.KINDS)
