"""fsdp: the first rank alone opens a model; each has its parts of the weights as if it had opened it, too,
on the device or in host memory."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from keel.config import parse
from keel.distributed import group, launch, sharded
from keel.stages import prepare

RANK = """
import sys
import torch
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM
from keel.distributed import group, sharded
from keel.models.lora import Adapters, add_adapters

offload = sys.argv[2] == "offload"
with group.joined("cpu", "fsdp", 30, offload=offload):
    def work():
        assert group.is_first(), "another rank opens the model"
        return LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)

    model = sharded.opened(work)
    plain = LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)  # what it must be
    if sys.argv[2] == "lora":
        model, plain = add_adapters(model, Adapters(r=2), 5), add_adapters(plain, Adapters(r=2), 5)
        assert sharded.is_from_first(model)
    assert all(p.is_meta != group.is_first() for p in model.parameters())
    sharded.shard(model)
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    assert len(units) == model.config.num_hidden_layers + 1
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
        assert own.requires_grad == whole.requires_grad
    for (name, own), (_, whole) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(own, whole), name
    ids = torch.arange(5)[None]
    assert torch.equal(model(input_ids=ids).logits.detach(), plain(input_ids=ids).logits.detach())
    # a step, with gradient and states beside the parts; and back to what a checkpoint holds
    placing = sharded.Placing({"model": model}, {})
    kept = {name: tensor.full_tensor().clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(input_ids=ids).logits.sum().backward()
    assert all(p.grad.to_local().device.type == "cpu" for p in model.parameters() if p.requires_grad)
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
@pytest.mark.parametrize(
    ("ranks", "where"), [(2, "here"), (3, "here"), (2, "offload"), (3, "offload"), (2, "lora")]
)
def test_a_model_that_one_rank_opens_is_cut_as_if_all_had(
    ranks: int, where: str, tied_model: Path, tmp_path: Path
) -> None:
    """Tied weights, a number of rows that the ranks do not share evenly, and adapters, which each rank puts
    on what it has."""
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, str(tmp_path / "rank.py"), str(tied_model), where]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    outcome = launch.run(command, ranks, environment)
    assert outcome.code == 0, outcome.line


def test_a_model_that_will_be_cut_is_not_moved_whole(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    """With adapters or without; alone, and where weights are whole, it is."""
    for strategy, adapters in itertools.product(("ddp", "fsdp"), (None, {"r": 2})):
        monkeypatch.setattr(group, "_group", group.Group(0, 2, strategy))
        settings = {"kind": "sft", "model": str(tiny_model), "data": "d", "lora": adapters}
        config: Any = parse({"name": "x", "stages": {"sft": settings}}).stages["sft"]
        elsewhere: Any = SimpleNamespace(device=torch.device("meta"), seed=0, name="sft")
        model = LlamaForCausalLM.from_pretrained(tiny_model)
        made = prepare.to_train(model, config, elsewhere)
        assert any(p.is_meta for p in made.parameters()) == (strategy == "ddp")


def test_a_rank_computes_on_its_own_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "_group", group.Group(1, 2, "fsdp", device_type="cuda"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert sharded.computes_on() == torch.device("cuda", 1)


class Named(torch.nn.Module):
    """Four layers, of which each has experts; transformers' names of them, or none."""

    def __init__(self, names: list[str] | None) -> None:
        super().__init__()
        self._no_split_modules = names
        self.embed = torch.nn.Embedding(8, 2)
        self.layers = torch.nn.ModuleList(Layer() for _ in range(4))


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(6))
        self.norm = torch.nn.LayerNorm(3)


@pytest.mark.parametrize("names", [["Layer"], None, ["NoSuchLayer"]])
def test_layers_are_found_without_their_names(names: list[str] | None) -> None:
    model = Named(names)
    assert sharded._layers(model) == list(model.layers)
    model.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2), Layer()])
    if names is None:  # not of one kind; the experts are few
        model.embed = torch.nn.Embedding(4096, 2)
        assert sharded._layers(model) == []


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
