"""Preparing a model for speed, and undoing it. A model is loaded as transformers makes it; what changes it is
here."""

from __future__ import annotations

from typing import TypeVar
from weakref import WeakSet

import torch
from torch import nn

from keel.accel.attention import patch_attention, restore_attention
from keel.accel.cpu_linear import patch_linears
from keel.accel.half_embedding import patch_embeddings
from keel.accel.modules import restore_classes
from keel.accel.norm_and_rope import patch_norms_and_rope
from keel.accel.patches import enabled, forget_verdicts

M = TypeVar("M", bound=nn.Module)
PREPARING = ("norm_and_rope", "cpu_linear", "half_embedding", "attention")  # the paths that change modules
_prepared: WeakSet[nn.Module] = WeakSet()


def prepare(model: M) -> M:
    """Give a model the attention kernel, linear layers, norms, rotations and embeddings of this package, each
    where it computes what the model's own does; the same model. What is prepared already, or switched off,
    stays as it is.

    A prepared model can be copied, pickled and differentiated like any other. `restore` undoes it.
    """
    if model not in _prepared:
        with torch.inference_mode(False):
            if enabled("norm_and_rope"):
                patch_norms_and_rope(model)
            if enabled("cpu_linear"):
                patch_linears(model)
            if enabled("half_embedding"):
                patch_embeddings(model)
            if enabled("attention"):
                patch_attention(model)
        if all(map(enabled, PREPARING)):  # else again when they are on
            _prepared.add(model)
    return model


def restore(model: M) -> M:
    """Give a model back its own classes, kernel and forwards, as transformers made them; the same model. It
    may be prepared again, and is tried anew then."""
    restore_classes(model)
    restore_attention(model)
    forget_verdicts(model)
    for module in model.modules():
        _prepared.discard(module)
    return model
