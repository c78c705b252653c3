"""A language model whose rows are not what each is alone is refused by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from keel.errors import UsageError
from keel.models.logprobs import head_inputs
from keel.models.lora import Adapters, add_adapters
from keel.models.roles import AdaptersOff
from keel.models.row_trial import check_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "architectures"))
import zoo

IDS, INDEX = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]]), torch.tensor([0, 2, 4])


def test_a_model_that_looks_ahead_is_refused_by_name() -> None:
    model = zoo.build("prophetnet")
    with pytest.raises(UsageError, match=r"^this prophetnet model cannot read rows beside each other"):
        head_inputs(model, IDS, INDEX)


@pytest.mark.parametrize("how", ["behind", "beside"])
def test_what_stands_behind_a_token_and_beside_a_row_must_not_matter(how: str) -> None:
    """A llama whose embeddings are shifted by what stands elsewhere."""
    model = zoo.build("llama")
    axis, embed = 1 if how == "behind" else 0, model.get_input_embeddings()
    plain = embed.forward
    embed.forward = lambda ids: plain(ids) + 0.1 * plain(ids).mean(axis, keepdim=True)
    with pytest.raises(UsageError, match="differ by"):
        check_rows(model)


def test_a_forward_that_fails_is_named() -> None:
    model = zoo.build("llama")
    model.lm_head = nn.Linear(7, zoo.VOCAB)
    with pytest.raises(UsageError, match=r"^this llama model cannot read a row of text: RuntimeError"):
        check_rows(model)


def test_a_policy_without_its_adapters_is_tried_as_the_policy() -> None:
    policy = add_adapters(zoo.build("llama"), Adapters(r=2), 0)
    check_rows(policy)
    check_rows(AdaptersOff(policy))
