"""The rows of a model's embeddings: as many as the vocabulary needs, every one of them trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from keel.accel.modules import plain_class
from keel.data.batches import derive_seed
from keel.errors import UsageError
from keel.models.seeding import seeded


def adopt_vocabulary(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, init: Mapping[str, Any]
) -> None:
    size = len(tokenizer)
    if init.get("vocab_size", size) < size:
        raise UsageError(f"model.init.vocab_size {init['vocab_size']} is smaller than the tokenizer's {size}")
    config.get_text_config().vocab_size = init.get("vocab_size", size)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = (
        tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    )


def with_whole_embeddings(model: nn.Module) -> Any:
    """The model with every row of its embeddings trained. Torch keeps a pad token's row from learning, and
    the pad token may be EOS [trl PR 5303]; real pads get no gradient in any case, since masks here come from
    lengths. Embeddings whose own forward counts from the pad's id (ProphetNet's positions) stay as they
    are."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            forward = plain_class(module).forward
            if forward is nn.Embedding.forward or "padding_idx" not in forward.__code__.co_names:
                module.padding_idx = None
    return model


def resized(model: Any, rows: int | None) -> Any:
    """The model with at least so many rows in its embeddings, and in its head where it has one. New rows are
    the mean of the old ones with a hundredth of their spread as noise, the same whenever and by whomever the
    model is opened. None: as it is."""
    had = model.config.get_text_config().vocab_size
    if rows is None or rows <= had:
        return model
    with seeded(derive_seed("new rows", rows)), torch.no_grad():
        model.resize_token_embeddings(rows, mean_resizing=False)
        parts = (model.get_input_embeddings(), model.get_output_embeddings())
        tensors = {id(part.weight): part.weight for part in parts if part is not None}
        biases = [part.bias for part in parts if getattr(part, "bias", None) is not None]
        for weight in tensors.values():
            old = weight[:had].float()
            noise = torch.randn(rows - had, old.shape[1]).to(old) * old.std(dim=0) / 100
            weight[had:rows] = (old.mean(dim=0) + noise).to(weight)
        for bias in biases:
            bias[had:rows] = bias[:had].float().mean().to(bias)
    return model
