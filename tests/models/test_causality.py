"""Models that see what stands behind a token are refused before they are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from keel.errors import UsageError
from keel.models.causality import require_causal
from keel.models.load import ModelSource, causal_lm, context_length
from keel.models.row_trial import check_rows

SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
XLNET: dict[str, Any] = {"vocab_size": 60, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}


def _saved(folder: Path, kind: str, **settings: Any) -> ModelSource:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    model.save_pretrained(folder)
    return ModelSource(str(folder))


def test_an_encoder_that_reads_both_ways_is_refused_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"bert.* is no causal language model.*`is_decoder: true`"):
        causal_lm(_saved(tmp_path, "bert", **SIZES), 0)


def test_an_encoder_that_is_a_decoder_is_opened(tmp_path: Path) -> None:
    assert causal_lm(_saved(tmp_path, "bert", is_decoder=True, **SIZES), 0).config.is_decoder


def test_a_decoder_that_attends_both_ways_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"xlnet.* is no causal language model"):
        causal_lm(_saved(tmp_path, "xlnet", attn_type="bi", **XLNET), 0)


def test_a_new_model_is_tried_too() -> None:
    with pytest.raises(UsageError, match="a new bert"):
        causal_lm(ModelSource(init={"model_type": "bert", **SIZES}), 0)


def test_no_limit_is_no_context() -> None:
    assert context_length(AutoConfig.for_model("xlnet")) is None


def test_a_model_that_returns_router_logits_can_be_tried_twice() -> None:
    """It makes its balancing loss of what hooks of transformers record, which are put on once."""
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 2}
    source = ModelSource(init={"model_type": "mixtral", **SIZES, **experts, "output_router_logits": True})
    model = causal_lm(source, 0)
    require_causal(model, "again")
    check_rows(model)
