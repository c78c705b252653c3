"""fsdp: what multiplies in bfloat16 is gathered in it. The numbers are those of one process's autocast."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from keel.distributed import launch

RANK = """
import sys
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM
from keel import accel
from keel.distributed import group, half_gather, sharded
from keel.models import precision
from keel.models.load import checkpoint_activations
from keel.models.lora import Adapters, add_adapters

precision.fast_in_bfloat16 = lambda device: True
how, cpu = sys.argv[2], torch.device("cpu")

def work():
    model = LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    if how == "lora":  # and with activations that are computed again
        model = add_adapters(model, Adapters(r=2), 0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
        checkpoint_activations(model)
    return precision.mark_precision(model.train(), "auto")

def backward(model, row):
    with precision.computing(model, cpu):
        logits = model(input_ids=torch.arange(3 + 4 * row)[None] + row, use_cache=False).logits
        loss = logits.float().log_softmax(-1)[..., 3].sum()
    loss.backward()
    return logits.detach()

with group.joined("cpu", "fsdp", 30, offload=how == "offload"), accel.disabled():
    plain = work()
    model = sharded.opened(work) if how == "offload" else work()
    sharded.shard(model, casts=True)
    whole = sum(p.numel() for p in plain.parameters())
    matrices = {
        name + ".weight" for name, m in plain.named_modules()
        if type(m) is torch.nn.Linear and "lora_" not in name
        and m.weight is not plain.get_input_embeddings().weight
    }
    assert len(matrices) >= 14
    with torch.no_grad(), precision.computing(model, cpu):
        model(input_ids=torch.zeros(1, 1, dtype=torch.long))
    with sharded.whole_here(model):
        for (name, own), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
            in_half = name in matrices
            assert own.dtype == (torch.bfloat16 if in_half else torch.float32), name
            assert torch.equal(own.detach(), other.detach().to(own.dtype)), name
    for _ in range(2):
        model.zero_grad()
        plain.zero_grad()
        logits = backward(model, group.rank())
        for row in range(group.size()):
            expected = backward(plain, row)
            if row == group.rank():
                assert torch.equal(logits, expected)
        for (name, own), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
            assert isinstance(own, DTensor) and own.dtype == torch.float32, name
            if not own.requires_grad:
                continue
            assert own.grad.dtype == torch.float32
            # to the bit on two ranks: each adds in float32, in one order
            assert torch.equal(own.grad.full_tensor(), other.grad), name
            halves = other.grad.bfloat16()
            summed_in_half = bool((halves.float() == other.grad).all())
            assert not (name in matrices and other.grad.numel() > 64 and summed_in_half), name
    back = sharded.whole(model)
    if group.is_first():
        assert all(torch.equal(a, b) for a, b in zip(back.parameters(), plain.parameters(), strict=True))

with half_gather.wanted(False), group.joined("cpu", "fsdp", 30), accel.disabled():
    assert not half_gather.matrices(work(), [])
"""


@pytest.mark.ranks
@pytest.mark.parametrize("how", ["plain", "offload", "lora"])
def test_gradients_are_those_of_autocast(
    how: str, tied_model: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Tied weights stay in float32; sums are taken in float32, which bfloat16 could not hold."""
    (tmp_path / "rank.py").write_text(RANK)
    model = tiny_model if how != "offload" else tied_model
    command = [sys.executable, str(tmp_path / "rank.py"), str(model), how]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "KEEL_TRACEBACK": "1"}
    outcome = launch.run(command, 2, environment)
    assert outcome.code == 0, outcome.line
