"""In which precision a model computes. Weights that learn stay in float32; where the hardware is fast in
bfloat16, the matrix products are taken in it (`dtype: auto`)."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from keel import accel
from keel.accel import processor
from keel.accel.cpu_linear import cast_cache

M = TypeVar("M", bound=nn.Module)
P = ParamSpec("P")
R = TypeVar("R")


@cache
def fast_in_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are much faster here than in float32: on CUDA from Ampere on, and
    on CPUs with AMX or AVX-512 BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and processor.has_half_products()


def weights(dtype: str) -> torch.dtype:
    """The dtype of a model's weights in memory: float32 for `auto`."""
    return torch.float32 if dtype == "auto" else getattr(torch, dtype)


def mark_precision(model: M, dtype: str) -> M:
    """The model, marked with whether `computing` chooses its precision (`dtype: auto`)."""
    setattr(model, "keel_auto", dtype == "auto")  # noqa: B010  torch types attributes as modules
    return model


def prepare_model(model: M, dtype: str) -> M:
    """The model, marked, and prepared for speed as `computing` would at its first forward."""
    return accel.prepare(mark_precision(model, dtype))


@contextlib.contextmanager
def computing(model: object, device: torch.device) -> Iterator[None]:
    """The context that every forward of a model on `device` runs in: bfloat16 for a model opened with `dtype:
    auto` on hardware that is fast in it, where weights are cast once in a context. A model that comes here
    for the first time is prepared for speed (`keel.accel.prepare`)."""
    if isinstance(model, nn.Module):
        accel.prepare(model)
    if not autocast_on(model, device):
        yield
        return
    with torch.autocast(device.type, torch.bfloat16), cast_cache():
        yield


def as_here(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which computes wherever it is called as it would here and now: with or without gradient,
    in this autocast, with the casts that are kept here."""
    context, gradient = contextvars.copy_context(), torch.is_grad_enabled()
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    casts = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds]

    def called(*args: P.args, **more: P.kwargs) -> R:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(gradient))
            for kind, dtype, on in casts:
                stack.enter_context(torch.autocast(kind, dtype, enabled=on))
            return context.run(function, *args, **more)

    return called


def autocast_on(model: object, device: torch.device) -> bool:
    """Whether `computing` takes a model's products in bfloat16."""
    return getattr(model, "keel_auto", False) and fast_in_bfloat16(device) and not _is_double(model)


@contextlib.contextmanager
def in_own_precision(model: object) -> Iterator[None]:
    """For trials: within it `computing` takes the model's products in the dtype of its weights, so that what
    differs is no rounding."""
    module = model if isinstance(model, nn.Module) else None
    chosen = getattr(module, "keel_auto", False)
    if module is not None and chosen:
        mark_precision(module, str(next(module.parameters()).dtype))
    try:
        yield
    finally:
        if module is not None and chosen:
            mark_precision(module, "auto")


def compute_dtype(model: nn.Module, device: torch.device) -> torch.dtype:
    """What `computing` multiplies matrices in."""
    if autocast_on(model, device):
        return torch.bfloat16
    return next(model.parameters()).dtype


def _is_double(model: Any) -> bool:
    """Whether somebody asked for more than float32 since the model was opened."""
    parameter = next(iter(model.parameters()), None) if hasattr(model, "parameters") else None
    return parameter is not None and parameter.dtype == torch.float64


@contextlib.contextmanager
def keep_bf16_copies(model: nn.Module) -> Iterator[None]:
    """For many forwards in one `computing` without gradient: torch keeps the cast only of weights that want
    one."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.dtype == torch.float32]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
