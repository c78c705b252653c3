"""Examples in one row are what each is alone, in whichever way a model allows, or it is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from keel.errors import UsageError
from keel.models import packing
from keel.models.lora import Adapters, add_adapters
from keel.stages import language, sft

sys.path.insert(0, str(Path(__file__).parents[1] / "architectures"))
import zoo

LONG, SHORT = 40, 7  # tokens: beyond the windows of `zoo`, and within them
WAYS = {  # of examples beyond and within a window
    "llama": ("mask", "mask"),
    "gpt2": ("mask", "mask"),
    "mistral": ("positions", "mask"),
    "gemma3_text": ("positions", "mask"),
    "gemma3": ("positions", "mask"),  # its text part is a config within the config
    "llama4_text": ("positions", "mask"),  # chunks
    "gpt_oss": ("masks", "mask"),  # does not hand its positions on
}
REFUSED = (
    "lfm2", "qwen3_5_text", "mamba", "mamba2", "falcon_h1", "recurrent_gemma", "rwkv", "minimax", "bloom",
)  # fmt: skip


def example(length: int, seed: int) -> language.LanguageRow:
    ids = torch.randint(1, 250, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return language.LanguageRow(ids, [True] * length)


def loss_of(model, rows: list[language.LanguageRow]) -> torch.Tensor:
    return language.loss(model, rows, zoo.PAD, 100)[0]


@pytest.mark.parametrize("kind", WAYS)
def test_packed_examples_are_what_each_is_alone(kind: str) -> None:
    model = zoo.build(kind)
    for way, lengths in zip(WAYS[kind], ((SHORT, LONG, LONG), (SHORT, SHORT + 2)), strict=True):
        model = zoo.build(kind)
        rows = [example(length, seed) for seed, length in enumerate(lengths)]
        others = [example(SHORT, 9), *rows[1:]]
        # two rows, one of which is padded and holds a single example
        batch = [sft._pack(rows), sft._pack(others[1:2])]
        packed, alone = loss_of(model, batch), sum(loss_of(model, [row]) for row in [*rows, others[1]])
        assert packing.way_of(model, max(lengths)) == way
        torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)
        packed.backward()
        slopes = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        sum(loss_of(model, [row]) for row in [*rows, others[1]]).backward()
        expected = [p.grad for p in model.parameters() if p.grad is not None]
        torch.testing.assert_close(slopes, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_whose_examples_would_see_each_other_is_refused_by_name(kind: str) -> None:
    model = zoo.build(kind)
    with pytest.raises(UsageError, match=rf"^{kind} cannot read .* set packing: false$"):
        packing.way_of(model, LONG)
    with pytest.raises(UsageError, match="packing: false"):
        loss_of(model, [sft._pack([example(SHORT, 0), example(SHORT, 1)])])


def test_a_longer_example_is_tried_anew() -> None:
    model = zoo.build("mistral")
    assert [packing.way_of(model, length) for length in (SHORT, LONG, SHORT)] == [
        "mask",
        "positions",
        "positions",
    ]


def test_a_trial_leaves_the_model_as_it_was() -> None:
    model = add_adapters(zoo.build("llama").train(), Adapters(r=2), 0)
    state = torch.get_rng_state()
    packing.way_of(model, LONG)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert bool((torch.get_rng_state() == state).all())


def test_a_mask_that_leaks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial can fail: attention over the whole row is what no way may give."""
    monkeypatch.setattr(packing, "WAYS", ("mask",))
    monkeypatch.setattr(packing, "packed_mask", lambda segments, dtype: causal(segments.shape[1], dtype))
    with pytest.raises(UsageError, match="states behind one neighbour and another differ"):
        packing.way_of(zoo.build("llama"), LONG)


def causal(length: int, dtype: torch.dtype) -> torch.Tensor:
    unseen = ~torch.ones(length, length, dtype=torch.bool).tril()
    return torch.zeros(length, length, dtype=dtype).masked_fill(unseen, torch.finfo(dtype).min)[None, None]


def test_positions_begin_anew_with_each_example() -> None:
    segments = torch.tensor([[0, 0, 0, 1, 1, -1], [0, 1, 2, 2, 2, 2]])
    assert packing.positions_in(segments).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 2, 3]]
