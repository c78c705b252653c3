"""fsdp: models on one base keep their parts of it once, whole or in use by any of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from keel.distributed import launch

RANK = """
import sys
import torch
from keel.distributed import group, sharded
from keel.models.load import ModelSource
from keel.models.lora import Adapters, add_adapters
from keel.models.shared_base import open_base
from keel.stages.supervised_loop import among_ranks

def parts(model):  # what a rank holds of the frozen weights, each storage once
    frozen = [p.to_local() for p in model.parameters() if not p.requires_grad]
    return {x.untyped_storage().data_ptr(): x.numel() for x in frozen if x.numel()}

with group.joined("cpu", "fsdp", 30):
    base = open_base(ModelSource(sys.argv[1], dtype="float32"), 0, torch.device("cpu"))
    count = sum(p.numel() for p in base.model.parameters())
    settings = Adapters(r=2)
    policy = add_adapters(base.language_model(), settings, 1)
    critic = add_adapters(base.scorer(2), settings, 2, train_head=True)
    ids = torch.arange(7)[None]
    before = [m(input_ids=ids).logits.detach() for m in (policy, base.model)]
    trunk = lambda: critic.get_base_model().base_model(input_ids=ids).last_hidden_state
    before.append(trunk().detach())
    shared = sharded.SharedParts(base.model.parameters())
    for model in (policy, critic, base.model):
        among_ranks(model, shared)
    # the same storages: the base is there once, and of adapters each its own
    assert parts(base.model).items() <= parts(policy).items()
    trunks = {key: size for key, size in parts(critic).items() if key in parts(base.model)}
    assert sum(parts(base.model).values()) <= count // group.size() + 64 * len(parts(base.model))
    assert len(trunks) >= len(parts(base.model)) - 1  # it has no head of a language model
    after = [m(input_ids=ids).logits for m in (policy, base.model)] + [trunk()]
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other.detach())
    with sharded.whole_here(policy):  # one of them whole, and another computes
        assert torch.equal(policy(input_ids=ids).logits.detach(), before[0])
    assert torch.equal(base.model(input_ids=ids).logits, before[1])
    (after[0].sum() + trunk().sum()).backward()
    optimizer = torch.optim.AdamW([p for m in (policy, critic) for p in m.parameters() if p.requires_grad])
    optimizer.step()
    assert torch.equal(base.model(input_ids=ids).logits, before[1])  # nobody trains the base
    assert not torch.equal(policy(input_ids=ids).logits.detach(), before[0])
    assert parts(base.model).items() <= parts(policy).items()
"""


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [2, 3])
def test_roles_on_one_base_hold_their_parts_of_it_once(
    ranks: int, tiny_model: Path, tied_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "KEEL_TRACEBACK": "1"}
    for model in (tiny_model, tied_model):
        outcome = launch.run([sys.executable, str(tmp_path / "rank.py"), str(model)], ranks, environment)
        assert outcome.code == 0, outcome.line
