"""One frozen base under the adapters of several roles.

Every role has modules of its own on the same parameters, instead of one model whose adapters are switched:
with a switch, activations that are recomputed in the backward pass (gradient checkpointing) would go through
the adapter of whoever came last, and peft's switch also turns gradients on and off.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from keel.data.batches import derive_seed
from keel.errors import UsageError
from keel.models.embeddings import with_whole_embeddings
from keel.models.load import (
    ModelSource,
    causal_lm,
    disable_dropout,
    score_head,
    scorer,
    scorer_without_weights,
)
from keel.models.precision import mark_precision, weights
from keel.models.seeding import seed_head

# by which transformers and peft know a quantised model
QUANTISED = ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method", "hf_quantizer")


@dataclass(frozen=True, slots=True)
class Base:
    """Weights that nobody trains. `model` is the plain language model, which is the reference, too; no
    adapter is put on it."""

    model: Any
    source: ModelSource

    def language_model(self) -> Any:
        """The language model for a role to put an adapter on. What `merged` makes of it has weights of its
        own."""
        model = on_the_same_weights(self.model)
        model.keel_afresh = partial(causal_lm, replace(self.source, quantize=None), 0)
        return model

    def scorer(self, seed: int) -> Any:
        """A sequence classifier with one output on the base, its head as `load.scorer` seeds it. UsageError
        where none fits."""
        model, lm = scorer_without_weights(self.source), on_the_same_weights(self.model)
        prefix, head = model.base_model_prefix, score_head(model)
        backbone = getattr(lm, prefix, None)
        if head is None or type(backbone) is not type(getattr(model, prefix, None)):
            raise UsageError(
                f"sharing: adapters: no score head fits the base of a {type(self.model).__name__}; set "
                "sharing: separate or trunk"
            )
        device = next(self.model.parameters()).device
        setattr(model, prefix, backbone)
        own = nn.Linear(head.in_features, 1, bias=head.bias is not None, device=device)
        model.score = own.to(weights(self.source.dtype))
        seed_head(model.score, derive_seed("head", seed))
        for name in QUANTISED:
            if hasattr(lm, name):
                setattr(model, name, getattr(lm, name))
        model.keel_afresh = partial(scorer, replace(self.source, quantize=None), seed)
        return mark_precision(with_whole_embeddings(model).requires_grad_(False), self.source.dtype)


def open_base(source: ModelSource, seed: int, device: torch.device) -> Base:
    """The language model of a source as a base: frozen, without dropout."""
    model = causal_lm(source, seed).to(device).eval().requires_grad_(False)
    disable_dropout(model)
    return Base(model, source)


def on_the_same_weights(model: nn.Module) -> Any:
    """The modules of a model a second time, with the same parameters and buffers. Quantised layers are the
    same modules: they keep parts of their weights in attributes."""
    same = [*model.parameters(), *model.buffers()]
    same += [module for module in model.modules() if type(module).__module__.startswith("bitsandbytes.")]
    return copy.deepcopy(model, {id(part): part for part in same})
