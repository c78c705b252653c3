"""Weights that a model uses in two places, under adapters. An adapter on one of the two changes that one
alone: merged into the shared weights it would change the other too, so they are untied first."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from keel.errors import UsageError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel

TIE = "tie_word_embeddings"


def check(model: PeftModel) -> None:
    """UsageError where an adapter is on weights that another part of the model uses, unless they are those of
    embeddings and head and the model can be saved with the two apart."""
    for name, module, attribute in _adapted_and_shared(model):
        if not _is_embedding_or_head(model.get_base_model(), module):
            raise UsageError(
                f"lora: the model uses {name}.{attribute} in several layers, so an adapter on one of them "
                "cannot be merged; leave it out of `target_modules`"
            )
        if not _can_be_apart(model.get_base_model()):
            raise UsageError(
                "lora: the model's head is its embeddings, and a "
                f"{type(model.get_base_model()).__name__} cannot have the two apart, as an adapter on {name} "
                "needs; leave it out of `target_modules`"
            )


def untie(model: PeftModel) -> None:
    """Give what adapters are on weights of its own, and note in the config that head and embeddings differ,
    so that a merge changes what was trained and nothing else."""
    found = list(_adapted_and_shared(model))
    for _, module, attribute in found:
        weight = getattr(module, attribute)
        own = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        setattr(module, attribute, own)
    if found:
        plain = model.get_base_model()
        _set_tie(plain.config, False)
        plain.all_tied_weights_keys = {}


def _adapted_and_shared(model: PeftModel) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, module, attribute) of each parameter under an adapter that another module has, too."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in vars(module)["_parameters"].values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + (parameter is not None)
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            base = layer.get_base_layer()
            for attribute, parameter in list(base.named_parameters(recurse=False)):
                if owners[id(parameter)] > 1:
                    yield name.removeprefix("base_model.model."), base, attribute


def _is_embedding_or_head(model: PreTrainedModel, module: nn.Module) -> bool:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return any(module is getattr(end, "base_layer", end) for end in ends)


def _can_be_apart(model: PreTrainedModel) -> bool:
    """Whether a model of this class has a head of its own when its config says so."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    _set_tie(config, False)
    with torch.device("meta"):
        apart: Any = type(model)._from_config(config)
    head = apart.get_output_embeddings()
    return head is not None and head.weight is not apart.get_input_embeddings().weight


def _set_tie(config: PreTrainedConfig, tied: bool) -> None:
    """In a config and in the part of it that is about text."""
    for part in (config, config.get_text_config()):
        if hasattr(part, TIE):
            setattr(part, TIE, tied)
