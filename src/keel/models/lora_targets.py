"""Which weights adapters can reach. `all-linear` means every linear layer that is one: routers that subclass
it and return more than a product, and layers whose weight the model reads around their forward (as the fused
kernels of Mamba mixers do), would break or silently do without their adapter."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from keel.errors import UsageError

ALL_LINEAR, EXPERTS = "all-linear", "experts"
EXPERT_COUNTS = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts",
)  # fmt: skip


def left_out(model: nn.Module) -> list[str]:
    """The names of linear layers that `all-linear` leaves out."""
    names: list[str] = []
    for prefix, parent in model.named_modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and (_is_more(child) or _read_around(type(parent), name)):
                names.append(f"{prefix}.{name}" if prefix else name)
    return names


def _is_more(layer: nn.Linear) -> bool:
    """Whether a subclass of a linear layer with a forward of its own makes something else than a product: it
    is tried. Without weights (meta) its shape is looked at."""
    kind = getattr(layer, "keel_plain", type(layer))  # of a layer that is prepared for speed
    if not kind.__module__.startswith("transformers.models.") or kind.forward is nn.Linear.forward:
        return False
    x = torch.linspace(-1, 1, 2 * layer.in_features).view(1, 2, -1).to(layer.weight)
    was = layer.training
    try:
        with torch.no_grad():
            found, expected = layer.eval()(x.clone()), nn.functional.linear(x, layer.weight, layer.bias)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return True
    finally:
        layer.train(was)
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
        return True
    return not found.is_meta and not torch.allclose(found, expected, rtol=1e-2, atol=1e-3)


@cache
def _read_around(kind: type[nn.Module], name: str) -> bool:
    """Whether a module's own code reads the weight of its child `name` as numbers."""
    plain = getattr(kind, "keel_plain", kind)
    if not plain.__module__.startswith("transformers.models."):
        return False
    try:
        source = inspect.getsource(plain)
    except (OSError, TypeError):
        return False
    return re.search(rf"self\.{re.escape(name)}\.weight(?!\.(dtype|device|shape))\b", source) is not None


def check_names(model: nn.Module, targets: str | Sequence[str]) -> None:
    """UsageError where the model has no module of one of these names; it lists those that it has."""
    linear = {
        name.rpartition(".")[2] for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D, nn.Embedding)) or "Linear" in type(module).__name__
    }  # fmt: skip
    known = ", ".join(sorted(name for name in linear if not name.isdigit())) or "none"
    if targets == ALL_LINEAR:
        if not any(isinstance(module, (nn.Linear, Conv1D)) for module in model.modules()):
            raise UsageError(f"lora: a {type(model).__name__} has no linear layer for an adapter")
        return
    names = [name for name, _ in model.named_modules()]
    for target in [targets] if isinstance(targets, str) else targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise UsageError(
                f"lora: target_modules: a {type(model).__name__} has no {target!r}; it has {known}"
            )


def expert_parameters(model: Any) -> list[str]:
    """The names of weights that hold one matrix for each expert, which no linear layer is made of."""
    return [name for name, _ in _experts(model)]


def target_parameters(model: Any, asked: str | Sequence[str] | None) -> list[str] | None:
    """What peft's `target_parameters` is for a setting: the last two parts of names. UsageError for `experts`
    of a model without any."""
    if asked != EXPERTS:
        return None if asked is None else [asked] if isinstance(asked, str) else list(asked)
    names = sorted({".".join(name.split(".")[-2:]) for name in expert_parameters(model)})
    if not names:
        raise UsageError(
            f"lora: target_parameters: experts has no effect: a {type(model).__name__} holds none in weights "
            "of their own"
        )
    return names


def frozen_experts(model: Any) -> str | None:
    """A line on the experts that no adapter reaches, with their share of all weights; None where there are
    none. model: with or without adapters."""
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    found = dict(_experts(plain))
    reached = {id(p) for p in _under_adapters(model)}
    frozen = {name: p for name, p in found.items() if id(p) not in reached}
    if not frozen:
        return None
    total = sum(p.numel() for name, p in plain.named_parameters() if "lora_" not in name)
    share = sum(p.numel() for p in frozen.values()) / total
    return (
        f"lora: {share:.0%} of all weights stay frozen without an adapter: those of the experts; "
        "`lora.target_parameters: experts` puts adapters on them too"
    )


def _experts(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    config = model.config.get_text_config()
    counts = {getattr(config, name, None) for name in EXPERT_COUNTS} - {None}
    for prefix, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and parameter.shape[0] in counts:
                yield (f"{prefix}.{name}" if prefix else name).replace(".base_layer", ""), parameter


def _under_adapters(model: Any) -> Iterator[nn.Parameter]:
    """The parameters that peft's wrappers of parameters are on."""
    for module in model.modules():
        if hasattr(module, "parameter_name") and hasattr(module, "get_param"):
            yield module.get_param()
