"""fsdp: the first rank alone opens a model; each has its parts of the weights as if it had opened it, too,
on the device or in host memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from keel.distributed import group, launch, sharded

RANK = """
import sys
import torch
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM
from keel.distributed import group, sharded

offload = sys.argv[2] == "offload"
with group.joined("cpu", "fsdp", 30, offload=offload):
    def work():
        assert group.is_first(), "another rank opens the model"
        return LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)

    model = sharded.opened(work)
    plain = LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)  # what it must be
    assert all(p.is_meta != group.is_first() for p in model.parameters())
    sharded.shard(model)
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    assert len(units) == len(model.model.layers) + 1
    for unit in units:  # as torch was told
        for parameters in unit._get_fsdp_state()._fsdp_param_groups:
            assert isinstance(parameters.offload_policy, CPUOffloadPolicy) == offload
            assert all(parameter.offload_to_cpu == offload for parameter in parameters.fsdp_params)
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
    # a step, with gradient and states beside the parts; and back to what a checkpoint holds
    placing = sharded.Placing({"model": model}, {})
    kept = {name: tensor.full_tensor().clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(input_ids=ids).logits.sum().backward()
    assert all(p.grad.to_local().device.type == "cpu" for p in model.parameters())
    optimizer.step()
    optimizer.zero_grad()
    states = [x for state in optimizer.state.values() for x in state.values()]
    assert states and all(x.device.type == "cpu" for x in states)
    assert not torch.equal(model(input_ids=ids).logits.detach(), plain(input_ids=ids).logits.detach())
    with sharded.whole_here(model):
        assert not any(isinstance(p, DTensor) for p in model.parameters())
    assert all(isinstance(p, DTensor) for p in model.parameters())
    model.load_state_dict({name: placing(("model", name), tensor) for name, tensor in kept.items()})
    assert torch.equal(model(input_ids=ids).logits.detach(), plain(input_ids=ids).logits.detach())
    back = sharded.whole(model)
    if group.is_first():
        assert all(torch.equal(a, b) for a, b in zip(back.parameters(), plain.parameters(), strict=True))
"""


@pytest.mark.ranks
@pytest.mark.parametrize(("ranks", "where"), [(2, "here"), (3, "here"), (2, "offload"), (3, "offload")])
def test_a_model_that_one_rank_opens_is_cut_as_if_all_had(
    ranks: int, where: str, tied_model: Path, tmp_path: Path
) -> None:
    """Tied weights, and a number of rows that the ranks do not share evenly."""
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, str(tmp_path / "rank.py"), str(tied_model), where]
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
