"""fsdp: the first rank alone opens a model; each has its parts of the weights as if it had opened it, too."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from keel.distributed import group, launch, sharded

RANK = """
import sys
import torch
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM
from keel.distributed import group, sharded

with group.joined("cpu", "fsdp", 30):
    def work():
        assert group.is_first(), "another rank opens the model"
        return LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)

    model = sharded.opened(work)
    plain = LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)  # what it must be
    assert all(p.is_meta != group.is_first() for p in model.parameters())
    sharded.shard(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for (name, own), (other, whole) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert name == other and isinstance(own, DTensor) and own.shape == whole.shape
        chunks = whole.detach().chunk(group.size(), 0)
        mine = chunks[group.rank()] if group.rank() < len(chunks) else whole.detach()[:0]
        assert torch.equal(own.detach().to_local(), mine), name
        assert own.requires_grad
    for (name, own), (_, whole) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(own, whole), name
    ids = torch.arange(5)[None]
    assert torch.equal(model(input_ids=ids).logits.detach(), plain(input_ids=ids).logits.detach())
    back = sharded.whole(model)
    if group.is_first():
        assert all(torch.equal(a, b) for a, b in zip(back.parameters(), plain.parameters(), strict=True))
"""


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_model_that_one_rank_opens_is_cut_as_if_all_had(
    ranks: int, tied_model: Path, tmp_path: Path
) -> None:
    """Tied weights, and a number of rows that the ranks do not share evenly."""
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, str(tmp_path / "rank.py"), str(tied_model)]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    outcome = launch.run(command, ranks, environment)
    assert outcome.code == 0, outcome.line


class Unsendable(torch.nn.Linear):
    """Holds a function that is defined within a function."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.scaled = lambda x: 2 * x


def test_modules_that_cannot_be_sent_are_opened_by_each(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[bytes | None] = []
    for rank in range(2):
        monkeypatch.setattr(group, "_group", group.Group(rank, 2, "fsdp"))
        monkeypatch.setattr(group, "from_first", lambda work: said[0] if said else said.append(work()))
        model = sharded.opened(Unsendable)
        assert said == [None]
        assert not model.weight.is_meta
        assert not sharded.is_from_first(model)
