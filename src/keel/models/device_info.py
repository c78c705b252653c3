"""What the machine can do, and what a run got out of it."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from keel.models.freed_memory import give_back_freed_memory
from keel.models.load import size_of
from keel.models.lora_targets import EXPERT_COUNTS

# what configs call the experts that a token takes
TAKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")


def forward_flops(model: nn.Module) -> float:
    """FLOPs of a token's forward by the weights that it is multiplied with: 2 for each (2001.08361). An
    embedding is only looked up, unless the head is the same matrix; what attention adds with the length of
    the text is left out. Of a mixture's experts those count that a token takes; where the config does not say
    how many, none, since this is what is needed at least."""
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    multiplied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    idle = looked_up - multiplied
    of_all, taken = _experts(model)

    def share(name: str, weight: torch.Tensor) -> float:
        stacked = weight.dim() == 3 and weight.shape[0] == of_all
        return taken if stacked or "experts" in name.split(".") else 1.0

    return 2.0 * sum(
        share(name, p) * size_of(p)
        for name, p in model.named_parameters()
        if p.dim() > 1 and id(p) not in idle
    )


def _experts(model: Any) -> tuple[int | None, float]:
    """How many experts a layer has, and the share of them that a token takes; None and 0 where the config
    does not say."""
    config = model.config.get_text_config() if hasattr(model, "config") else None
    places = [config, getattr(config, "ffn_config", None)]

    def first(names: tuple[str, ...]) -> int | None:
        with contextlib.suppress(RuntimeError):  # by transformers, of numbers that differ by layer
            values = (getattr(place, name, None) for place in places for name in names)
            return next((value for value in values if isinstance(value, int) and value > 0), None)
        return None

    taken, of_all = first(TAKEN), first(EXPERT_COUNTS)
    return (None, 0.0) if taken is None or of_all is None else (of_all, min(1.0, taken / of_all))


def free_memory(device: torch.device) -> int:
    """Bytes that nobody uses: on the card, or in this machine's memory as Linux reckons it (elsewhere half of
    what there is)."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        return min(free, _left_to_container())
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _left_to_container() -> int:
    """Bytes that a control group (Docker, Kubernetes, Slurm) still grants; without a limit more than any
    machine has."""
    group = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            return int((group / limit).read_text()) - int((group / used).read_text())
    return 2**63


def forget_peak(device: torch.device) -> None:
    """Let `peak_memory_mib` begin anew at what is in use now, where the system can do that: on cuda, and on
    Linux. What is kept of freed memory goes back to the system."""
    give_back_freed_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # proc(5)


def peak_memory_mib(device: torch.device) -> float:
    """The most memory that was in use since `forget_peak`, in MiB: on cuda what torch allocated; elsewhere
    the resident memory of this process, libraries and data included, on Linux (elsewhere since the process
    began)."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**10, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(
        peak / (2**20 if sys.platform == "darwin" else 2**10), 1
    )  # bytes there, KiB on other systems
