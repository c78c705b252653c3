"""Advice: in the order of what it costs, no more than needed, and accepted by the config."""

from __future__ import annotations

from typing import Any

import pytest

from keel.config import parse
from keel.plan import card_fit, model_shapes, stage_memory
from keel.plan.model_memory import Lora
from keel.plan.stage_memory import Lengths, ModelRef, StageModels

LLAMA = model_shapes.KNOWN["meta-llama/Llama-2-7b-hf"]


def _stage(**settings: Any) -> Any:
    stage = {"kind": "sft", "model": "./model", "data": "rows.jsonl", **settings}
    return parse({"name": "tiny", "stages": {"one": stage}}).stages["one"]


def _fits(stage: Any, name: str, length: int) -> tuple[dict[int, card_fit.Fit], Any]:
    cast, lengths = StageModels(ModelRef(model_shapes.KNOWN[name])), Lengths(0, length)

    def peak(stage: Any) -> float:
        within = lengths.within(stage.max_length)
        return max(phase.total for phase in stage_memory.phases(stage, cast, within, "cuda"))

    return {fit.gb: fit for fit in card_fit.fits(stage, peak, length)}, peak


def test_a_smaller_micro_batch_comes_first_and_no_smaller_than_needed():
    stage = _stage(batch_size=64)
    found, peak = _fits(stage, "openai-community/gpt2", 512)
    fit = next(fit for fit in found.values() if not fit.fits)
    assert fit.settings is not None
    assert set(fit.settings) == {"micro_batch"}
    size = fit.settings["micro_batch"]
    assert peak(card_fit._with(stage, {"micro_batch": size})) <= fit.gb * card_fit.GB
    assert peak(card_fit._with(stage, {"micro_batch": 2 * size})) > fit.gb * card_fit.GB


def test_a_model_whose_optimizer_does_not_fit_is_told_to_use_lora_in_16_bit():
    found, _ = _fits(_stage(batch_size=8), "meta-llama/Llama-2-7b-hf", 512)
    assert found[24].settings is not None
    assert "lora" in found[24].settings
    assert found[24].settings["model.dtype"] == "bfloat16"


def test_ppo_that_does_not_fit_is_told_to_share_a_base_and_then_to_quantise_it():
    stage = _stage(kind="ppo", reward="r", data="rows.jsonl", batch_size=8, updates=1)
    cast = StageModels(ModelRef(LLAMA), rewards={"r": ModelRef(LLAMA, adapter=Lora())})

    def peak(stage: Any) -> float:
        return max(phase.total for phase in stage_memory.phases(stage, cast, Lengths(64, 64), "cuda"))

    found = {fit.gb: fit.settings for fit in card_fit.fits(stage, peak, 128)}
    assert found[16] is not None
    assert found[16]["sharing"] == "adapters"
    assert found[12] is not None
    assert found[12]["model.quantize"] == "4bit"
    assert found[8] is not None


@pytest.mark.parametrize("gb", card_fit.CARDS)
def test_advice_is_accepted_and_fits(gb):
    stage = _stage(batch_size=16)
    found, peak = _fits(stage, "meta-llama/Llama-2-7b-hf", 1024)
    settings = found[gb].settings
    if settings:
        changed = card_fit._with(stage, settings)
        assert changed is not None
        assert peak(changed) <= gb * card_fit.GB


def test_what_can_never_fit_is_said():
    found, _ = _fits(_stage(batch_size=1), "meta-llama/Llama-2-70b-hf", 512)
    assert found[8].settings is None
    assert "8 GB: not by any setting" not in card_fit.as_text([found[141]])
    assert "not by any setting" in card_fit.as_text(list(found.values()))
