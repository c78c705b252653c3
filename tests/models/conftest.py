"""Small configurations of every family of models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import AutoConfig

SIZES = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 101,
    "max_position_embeddings": 48,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 101, "n_positions": 48, "bos_token_id": 0, "eos_token_id": 0},
    "gpt_neox": SIZES,
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 24},
    "gemma2": {**GROUPED, "head_dim": 24},
    "phi3": {**GROUPED, "pad_token_id": 0, "eos_token_id": 0},
    "bert": SIZES,
    "roberta": SIZES,
    "distilbert": {"dim": 64, "hidden_dim": 160, "n_layers": 3, "n_heads": 4, "vocab_size": 101, "max_position_embeddings": 48},
}  # fmt: skip


@pytest.fixture(scope="session")
def config_of() -> Callable[..., Any]:
    """A configuration of a family that keel knows block by block, small, with settings of one's own."""
    return lambda kind, **more: AutoConfig.for_model(kind, **{**CONFIGS[kind], **more})
