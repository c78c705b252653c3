"""How fast this machine multiplies matrices and reads memory: what a run's time is held against.

`keel doctor --bench` measures it with care and keeps it in the user's cache, by processor, torch, device,
threads and the library that keel multiplies by; a run takes what is kept. Where nothing is, it measures in
some hundredths of a second, which on a busy machine says less than the machine can.
"""

from __future__ import annotations

import datetime
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from keel import user_cache
from keel.accel import cpu_products
from keel.accel.processor import has_half_products

KEPT = "machine.json"  # in the user's cache
SIDE, TRIES = {"cuda": 8192}, 3  # of the matrices that are multiplied to find out; elsewhere 1024
# bytes of a block that is read to find out: what fits a core's cache, what the cores share, and what neither
# holds
BLOCKS = (2**20, 2**23, 2**26, 2**28)
BENCH_TRIES = 25
NOISE = 0.9  # of the speed of a larger block, below which a smaller one's is no accident
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class Speed:
    """What the machine reaches."""

    flops: float  # FLOP/s of a product of large matrices, in the dtype of the run
    # by the size of the block that is read
    bytes_per_second: Mapping[int, float] = field(default_factory=dict)
    kept: bool = False  # whether `keel doctor --bench` measured it

    def seconds(self, flops: float, moved: float, passed: float) -> float:
        """What so many FLOP and so many bytes take at least, where both go on at once. passed: the bytes of
        one pass, which decide whether they come from a cache or from memory."""
        return max(flops / self.flops, moved / self.reading(passed) if moved else 0.0)

    def reading(self, size: float) -> float:
        """Bytes a second of a block of this size, by the next larger one that was measured; of what no block
        is large enough for, the largest's."""
        known = sorted(self.bytes_per_second)
        if not known:
            return float("inf")
        return self.bytes_per_second[next((one for one in known if one >= size), known[-1])]


def speed(device: torch.device, dtype: torch.dtype) -> Speed:
    """The machine's, with the threads of the moment: what is kept, else what is measured now."""
    kept = user_cache.read(KEPT).get(_key(device, torch.get_num_threads()))
    name = str(dtype).removeprefix("torch.")
    try:
        assert kept is not None
        rates = {int(size): float(rate) for size, rate in kept["bytes_per_second"].items()}
        found = Speed(float(kept["flops"][name]), rates, kept=True)
        assert all(0 < rate < math.inf for rate in (found.flops, *rates.values()))
        return found
    except (AssertionError, KeyError, TypeError, ValueError, AttributeError):
        return Speed(fastest(device, dtype), {size: reading(device, size) for size in BLOCKS[1:3]})


def bench(device: torch.device) -> dict[str, Any]:
    """Measure with care and keep it; what is kept, with the file's path as `kept_in` (None where it cannot be
    written). `busy`: what speaks against an idle machine. Takes some seconds."""
    load = _load()
    found: dict[str, Any] = {
        "processor": processor(device),
        "torch": torch.__version__,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "measured": datetime.date.today().isoformat(),
        "flops": {name: fastest(device, getattr(torch, name), _tries(device, name)) for name in DTYPES},
        "bytes_per_second": {str(size): reading(device, size, BENCH_TRIES) for size in BLOCKS},
    }
    found["busy"] = _busy(found, load)
    whole = user_cache.read(KEPT) | {_key(device, found["threads"]): found}
    place = user_cache.write(KEPT, whole)
    return {**found, "kept_in": None if place is None else str(place)}


def _tries(device: torch.device, dtype: str) -> int:
    """How often a product is tried beside the first time: never where the processor converts every number, so
    that one takes seconds and nobody asks for it."""
    slow = dtype == "bfloat16" and device.type == "cpu" and not has_half_products()
    return 0 if slow else BENCH_TRIES


def _load() -> float:
    """Processes that want a core, over the last minute; 0 where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _busy(found: Mapping[str, Any], load: float) -> list[str]:
    """What speaks against an idle machine: more processes than cores, or a block of memory that was read
    slower than a larger one (of those with a MiB and more for each thread, on a processor)."""
    cores, reasons = os.cpu_count() or 1, list[str]()
    if load > cores:
        reasons.append(f"{load:.1f} processes wanted one of {cores} cores")
    sizes = [size for size in BLOCKS if size >= found["threads"] * 2**20 and found["device"] == "cpu"]
    rates = [found["bytes_per_second"][str(size)] for size in sizes]
    slower = [i for i in range(1, len(rates)) if rates[i - 1] < NOISE * rates[i]]
    reasons += [f"{sizes[i - 1] >> 20} MiB were read slower than {sizes[i] >> 20}" for i in slower]
    return reasons


def fastest(device: torch.device, dtype: torch.dtype, tries: int = TRIES) -> float:
    """FLOP/s that a product of large matrices reaches here with the threads of the moment, the best of a few:
    what a model's utilisation is a share of. Measured once a process for each number of threads, and for
    each library that keel multiplies by."""
    ours = dtype == torch.float32 and _by_onednn(device)
    return _fastest(device, dtype, tries, torch.get_num_threads(), ours)


def _side(device: torch.device) -> int:
    return SIDE.get(device.type, 1024)


def _by_onednn(device: torch.device) -> bool:
    """Whether keel multiplies large matrices in float32 by oneDNN here and now, not by torch's own."""
    side = _side(device)
    return device.type == "cpu" and cpu_products.faster(side, torch.empty(side, side, device="meta"))


@cache
def _fastest(device: torch.device, dtype: torch.dtype, tries: int, threads: int, by_onednn: bool) -> float:
    side = _side(device)
    a, b, c = torch.ones(3, side, side, device=device, dtype=dtype)  # c: memory that is there already
    seconds = _best(lambda: torch.mm(a, b, out=c), device, tries)
    if by_onednn:
        seconds = min(seconds, _best(lambda: cpu_products.product(a, b), device, tries))
    return 2 * side**3 / seconds


def reading(device: torch.device, size: int, tries: int = TRIES) -> float:
    """Bytes a second at which a block of `size` bytes is read, again and again; the best of a few."""
    return _reading(device, size, tries, torch.get_num_threads())


@cache
def _reading(device: torch.device, size: int, tries: int, threads: int) -> float:
    a, b = torch.ones(2, size // 8, device=device)
    return size / _best(lambda: torch.dot(a, b), device, tries)


def processor(device: torch.device) -> str:
    """The name of what computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _best(work: Callable[[], object], device: torch.device, tries: int) -> float:
    """The seconds of the fastest of some tries, after one that does not count; without tries its own."""
    seconds: list[float] = []
    for _ in range(tries + 1):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return max(min(seconds[1:] or seconds), 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _key(device: torch.device, threads: int) -> str:
    """What a measurement holds for."""
    library = " | oneDNN" if _by_onednn(device) else ""
    return f"{processor(device)} | torch {torch.__version__} | {device.type} | {threads} threads{library}"
