"""Frozen models that wait on the CPU between uses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def offload(model: Any, device: torch.device) -> None:
    """From now on the model lies on the CPU, and comes to `device` while it is `on_device`."""
    model.keel_works_on = device
    model.to("cpu")


@contextlib.contextmanager
def on_device(model: Any) -> Iterator[None]:
    """For a model that rests: on its device meanwhile. Others stay where they are."""
    device = getattr(model, "keel_works_on", None)
    if device is None:
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to("cpu")
