"""What the processor computes fast in bfloat16, and how much memory there is beside it.

It is what torch says that the processor can, and what the machine has, never a measurement: a run that is
resumed on the same kind of machine computes in the same precision, by the same products.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch


@cache
def has_half_tiles() -> bool:
    """Whether this processor multiplies tiles of bfloat16 (AMX)."""
    return multiplies_half(_of_cpu()) == "tiles"


@cache
def has_half_products() -> bool:
    """Whether products of bfloat16 are twice as fast here as those of float32, or faster."""
    return multiplies_half(_of_cpu()) is not None and torch.backends.mkldnn.is_available()


def cache_dtype(device: torch.device) -> torch.dtype:
    """What keys and values are kept in while a model samples with its products in bfloat16. On a CPU without
    AMX attention of one token a row takes three times as long in bfloat16 as in float32, since torch's kernel
    converts every number."""
    return torch.float32 if device.type == "cpu" and not has_half_tiles() else torch.bfloat16


def multiplies_half(has: Mapping[str, Any]) -> str | None:
    """By what a processor with these capabilities multiplies in bfloat16: `tiles` (AMX, several times as fast
    as in float32), `vectors` (AVX-512 BF16: twice as fast), or None: it converts every number."""
    if has.get("amx_bf16"):
        return "tiles"
    return "vectors" if has.get("avx512_bf16") else None


def memory() -> int:
    """Bytes for this process: those of the machine, or of the control groups (Docker, Kubernetes, Slurm) that
    it is in, shared with the other ranks there; 0 where the system does not say."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    return _memory() // max(1, int(ranks) if ranks.isdecimal() else 1)


@cache
def _memory() -> int:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return min([whole, *_granted(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))])
    return 0


def _granted(root: Path, groups: Path) -> list[int]:
    """What the control groups of a process, and those they stand in, may have; nothing where none has a
    limit. groups: the file of the system that names them (cgroups(7)), absent on others."""
    named = [""]
    with contextlib.suppress(OSError):
        named += [line.split(":", 2)[-1] for line in groups.read_text().splitlines()]
    found: list[int] = []
    for mount, name in ((root, "memory.max"), (root / "memory", "memory.limit_in_bytes")):
        places = [mount / path.lstrip("/") for path in named]
        for group in {above for place in places for above in (place, *place.parents)}:
            with contextlib.suppress(OSError, ValueError):  # not there, or "max"
                found.append(int((group / name).read_text()))
    return found


def _of_cpu() -> Mapping[str, Any]:
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
