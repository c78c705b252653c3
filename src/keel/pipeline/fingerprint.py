"""What a run depends on besides its config: the device, the machine, the code, the files of models from
outside."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import keel
from keel.config import RunConfig
from keel.errors import UsageError

VERSIONS = ("torch", "transformers", "tokenizers", "peft", "safetensors", "numpy")
WITHOUT_EFFECT = ("api", "cli", "plan", "report")  # code that no result depends on


def versions() -> dict[str, str]:
    """Versions of the libraries that results depend on."""
    found = {package: version(package) for package in VERSIONS}
    with contextlib.suppress(PackageNotFoundError):
        found["bitsandbytes"] = version("bitsandbytes")
    return found


def device_of(config: RunConfig) -> torch.device:
    """The device the config means. UsageError if it is not there."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"  # sampling needs float64, which mps lacks
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def hardware(config: RunConfig) -> dict[str, Any]:
    """The machine, for the manifest."""
    device = device_of(config)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "device": str(device), "name": name, "cores": os.cpu_count(), "threads": config.threads or torch.get_num_threads(),
        "memory_gib": round(memory / 2**30, 1), "system": platform.platform(),
    }  # fmt: skip


@lru_cache(maxsize=1)
def code_print() -> str:
    """A hash of the code that results depend on: all of keel but the report and the other commands."""
    root, digest = Path(keel.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if place.parts[0] not in WITHOUT_EFFECT and place.as_posix() not in WITHOUT_EFFECT:
            digest.update(f"{place}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def folder_print(folder: Path) -> str:
    """A hash of a model folder's content; files above 256 MiB by size and time of change."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        state = path.stat()
        digest.update(f"{path.relative_to(folder)}\0{state.st_size}\0".encode())
        digest.update(str(state.st_mtime_ns).encode() if state.st_size > 2**28 else path.read_bytes())
    return digest.hexdigest()


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
