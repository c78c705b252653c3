"""`keel doctor` without a model: what is installed, what the machine has, and what keel does about it."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import keel
from keel import accel, plugins
from keel.models import machine_speed

NEEDED = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "pyarrow",
    "pydantic",
    "typer",
    "rich",
    "plotly",
    "jinja2",
    "markupsafe",
    "pyyaml",
    "numpy",
    "pandas",
)


def facts() -> dict[str, Any]:
    """Versions, hardware, what other packages add, what is `missing`, and the fast paths (`accel`)."""
    found: dict[str, Any] = {
        "keel": keel.__version__,
        "python": platform.python_version(),
        **{package: _installed(package) for package in NEEDED},
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "hub offline": os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "True"),
        "disk_free_gib": round(shutil.disk_usage(".").free / 2**30, 1),
        **{group: list(plugins.names(group)) for group in plugins.GROUPS},
    }
    missing = [package for package in NEEDED if found[package] is None]
    return {**found, "missing": missing, "accel": accel.table()}


def bench(threads: int | None = None) -> dict[str, Any]:
    """How fast this machine multiplies and reads memory, measured now and kept for the runs to come. threads:
    of the processor; None: as many as torch takes."""
    if threads is not None:
        torch.set_num_threads(threads)
    return machine_speed.bench(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def bench_text(found: dict[str, Any]) -> str:
    """What `bench` measured, for people."""
    lines = [f"{name:<20} {found[name]}" for name in ("processor", "torch", "device", "threads")]
    lines += [f"{f'product, {name}':<20} {rate / 1e9:,.0f} GFLOP/s" for name, rate in found["flops"].items()]
    lines += [
        f"{f'reading {int(size) / 2**20:.0f} MiB':<20} {rate / 1e9:,.1f} GB/s"
        for size, rate in found["bytes_per_second"].items()
    ]
    lines += [f"look: {reason}; measure again on an idle machine" for reason in found["busy"]]
    place = found["kept_in"]
    lines.append(f"kept in {place}" if place else "not kept: the cache folder cannot be written (KEEL_CACHE)")
    return "\n".join(lines)


def as_text(found: dict[str, Any]) -> str:
    """The facts for people."""
    shown = {
        name: ", ".join(value) or None if isinstance(value, list) else value
        for name, value in found.items()
        if name not in ("missing", "accel")
    }
    lines = [f"{name:<20} {'none' if value is None else value}" for name, value in shown.items()]
    missing = ", ".join(found["missing"])
    lines.append(f"missing: {missing}" if missing else "all that keel needs is here")
    lines.append(
        "\nWhat computes in a model's place, once a trial on it agrees (KEEL_ACCEL=0: nothing does):"
    )
    lines += [f"{path['name']:<20} {path['state']:<4} {path['replaces']}" for path in found["accel"]]
    return "\n".join(lines)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
