"""What a module is: whether it draws at random, and how to make it draw nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig, PreTrainedModel


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """In evaluation mode, and back: no dropout is drawn, and a model with gradient checkpointing keeps a
    cache."""
    training = getattr(model, "training", False)
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def has_dropout(model: nn.Module) -> bool:
    """Whether a forward in train mode draws anything at random; False after `disable_dropout`."""
    saved = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)
    for module in model.modules():
        config = vars(module).get("config")
        own = module is not saved and isinstance(config, PreTrainedConfig) and dropout_rates(config)
        if own or dropout_rates(module) or (isinstance(module, _DropoutNd) and module.p > 0):
            return True
    return False


def dropout_rates(owner: Any) -> list[str]:
    """Attributes that are the rate of some dropout, and not 0."""
    return [
        name
        for name, value in vars(owner).items()
        if "drop" in name and isinstance(value, float) and 0 < value <= 1
    ]
