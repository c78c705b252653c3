"""The device that a run computes on, and the kernels and threads it computes with."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from keel.distributed import group
from keel.errors import UsageError

if TYPE_CHECKING:  # what a run's config looks like changes no number here
    from keel.config import RunConfig


_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "meta")


def device_of(config: RunConfig) -> torch.device:
    """The device the config means; of several ranks each one's own card. UsageError if it is not there."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"  # sampling needs float64, which mps lacks
    if name == "cuda" and group.size() > 1:
        name = f"cuda:{torch.cuda.current_device()}"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        if name.partition(":")[0] not in _DEVICES:
            raise UsageError(f"there is no device {name!r}; write auto, cpu, cuda, cuda:1 or mps") from None
        raise UsageError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware(config: RunConfig) -> dict[str, Any]:
    """The machine, for the manifest."""
    device = device_of(config)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    processor = platform.processor() or platform.machine()
    return {
        "device": str(device),
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        "cores": os.cpu_count(),
        "threads": config.threads or torch.get_num_threads(),
        "memory_gib": round(memory / 2**30, 1),
        "system": platform.platform(),
    }


@contextlib.contextmanager
def deterministic(config: RunConfig) -> Iterator[None]:
    """Deterministic kernels and a fixed number of threads, as long as the run lasts."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(config.threads or threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = (  # pyright: ignore[reportAttributeAccessIssue]
        False  # costs time, and nothing here reads memory it has not written
    )
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)
