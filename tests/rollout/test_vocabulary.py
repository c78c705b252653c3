"""Rows of the embeddings that stand for no token are never drawn, and ratios are of what is drawn from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from keel.models.load import ModelSource, causal_lm
from keel.rollout import GenerationRequest, KeelEngine, ReferenceEngine
from keel.rollout.score_responses import score
from keel.types import Sampling

SPARE = 20
PROMPTS = ((5, 6, 7), (8, 9), (10, 11, 12, 13))


@pytest.fixture
def wider(tmp_path: Path, tokenizer: Any) -> Path:
    """A model with more rows than its tokenizer has tokens, which finds those rows the likeliest by far."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer) + SPARE, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=48, initializer_range=0.1,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    with torch.no_grad():  # half of them likely after any text
        model.lm_head.weight[len(tokenizer) :: 2] *= 30
        model.lm_head.weight[len(tokenizer) + 1 :: 2] *= -30
    model.save_pretrained(tmp_path / "wider")
    tokenizer.save_pretrained(tmp_path / "wider")
    return tmp_path / "wider"


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("engine", [KeelEngine, ReferenceEngine])
def test_no_engine_draws_an_id_beyond_the_tokenizer(
    engine: Any, temperature: float, wider: Path, tokenizer: Any
) -> None:
    model = causal_lm(ModelSource(str(wider)), 0).eval()
    free = Sampling(12, temperature=temperature)
    drawn = [
        token
        for completion in engine(model).generate(GenerationRequest(PROMPTS, free, [1], 0, 0))
        for token in completion.ids
    ]
    assert max(drawn) >= len(tokenizer)  # which is what there is to prevent
    request = GenerationRequest.of(tokenizer, PROMPTS, free, 0)
    for completion in engine(model).generate(request):
        assert max(completion.ids) < len(tokenizer)


def test_what_the_trainer_scores_is_the_distribution_that_was_drawn_from(wider: Path, tokenizer: Any) -> None:
    model = causal_lm(ModelSource(str(wider)), 0).eval()
    done = KeelEngine(model).generate(
        GenerationRequest.of(tokenizer, PROMPTS, Sampling(12, temperature=1.5), 0)
    )
    options: dict[str, Any] = {"temperature": 1.5, "pad_id": 0, "device": torch.device("cpu")}
    scored = score(done, model, model, vocab=len(tokenizer), **options)
    for row, completion in enumerate(done):
        found = scored.logp[row, : len(completion.ids)]
        torch.testing.assert_close(found, torch.tensor(completion.logp), rtol=1e-4, atol=1e-4)
    whole = score(done, model, model, **options)
    assert float((whole.logp - scored.logp).abs().max()) > 0.1


@pytest.mark.parametrize("engine", ["keel", "reference"])
def test_ratios_of_a_policy_with_spare_rows_begin_at_one(
    engine: str, wider: Path, data: Any, run: Any, tmp_path: Path
) -> None:
    stage = {
        "kind": "grpo", "model": str(wider), "reward": {"kind": "length", "high": 4, "slack": 4},
        "data": str(data.prompts), "updates": 2, "batch_size": 4, "samples_per_prompt": 2, "epochs": 1,
        "sampling": {"max_new_tokens": 6}, "engine": engine,
    }  # fmt: skip
    run({"stages": {"grpo": stage}}, tmp_path / "run")
    log = (tmp_path / "run" / "stages" / "grpo" / "metrics.jsonl").read_text().splitlines()
    for line in map(json.loads, log):
        assert line["policy/logp_mismatch"] < 1e-3
        assert line["rollout/sampler_drift"] < 1e-3
