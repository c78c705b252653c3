"""Shapes: exact parameter counts, of common models by hub id and of any configuration of a known family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from keel.models.load import count_parameters
from keel.models.lora import Adapters, add_adapters
from keel.plan import model_shapes

# as their model cards and the hub's file metadata have it; of an encoder without pooler and head
PUBLISHED = {
    "openai-community/gpt2": 124_439_808,
    "openai-community/gpt2-medium": 354_823_168,
    "openai-community/gpt2-large": 774_030_080,
    "openai-community/gpt2-xl": 1_557_611_200,
    "distilbert/distilgpt2": 81_912_576,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "EleutherAI/pythia-14m": 14_067_712,
    "EleutherAI/pythia-70m": 70_426_624,
    "EleutherAI/pythia-160m": 162_322_944,
    "EleutherAI/pythia-410m": 405_334_016,
    "EleutherAI/pythia-1b": 1_011_781_632,
    "EleutherAI/pythia-1.4b": 1_414_647_808,
    "EleutherAI/pythia-2.8b": 2_775_208_960,
    "EleutherAI/pythia-6.9b": 6_857_302_016,
    "EleutherAI/pythia-12b": 11_846_072_320,
    "google-bert/bert-base-uncased": 108_891_648,
    "distilbert/distilbert-base-uncased": 66_362_880,
    "FacebookAI/roberta-base": 124_055_040,
}


def test_every_model_of_the_table_is_tested():
    assert set(PUBLISHED) == set(model_shapes.KNOWN)


@pytest.mark.parametrize("name", PUBLISHED)
def test_common_models_have_their_published_number_of_parameters(name):
    shape = model_shapes.KNOWN[name]
    assert shape.parameters("none" if shape.is_encoder else "lm") == PUBLISHED[name]


@pytest.mark.parametrize("kind", model_shapes.FAMILIES)
@pytest.mark.parametrize("head", ["lm", "score", "none"])
def test_parameters_are_those_of_the_model_that_transformers_builds(config_of, kind, head):
    config = config_of(kind, num_labels=3)
    family: Any = AutoModelForSequenceClassification
    if head != "score":
        family = AutoModelForMaskedLM if kind in model_shapes.ENCODERS else AutoModelForCausalLM
    with torch.device("meta"):
        model: Any = family.from_config(config)
    built = count_parameters(model)
    if head == "none":
        built = count_parameters(model.base_model)
    shape = model_shapes.of_config(config)
    assert shape is not None
    assert shape.parameters(head, labels=3) == built


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("gpt2", {"n_inner": 100}),
        ("gpt_neox", {"tie_word_embeddings": True}),
    ],
)
def test_options_of_a_family_are_counted(config_of, kind, more):
    config = config_of(kind, **more)
    with torch.device("meta"):
        built = count_parameters(AutoModelForCausalLM.from_config(config))
    shape = model_shapes.of_config(config)
    assert shape is not None
    assert shape.parameters() == built


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("llama", "all-linear"),
        ("llama", ["q_proj", "v_proj"]),
        ("phi3", "all-linear"),
        ("gpt_neox", "all-linear"),
    ],
)
def test_adapters_are_as_many_as_peft_adds(config_of, kind, targets):
    config = config_of(kind)
    model = add_adapters(AutoModelForCausalLM.from_config(config), Adapters(r=5, target_modules=targets), 0)
    shape = model_shapes.of_config(config)
    assert shape is not None
    assert shape.adapter_parameters(5, targets) == count_parameters(model, trainable=True)


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("gpt2", "openai-community/gpt2"),
        ("meta-llama/Llama-2-70b-chat-hf", "meta-llama/Llama-2-70b-hf"),
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B"),
        ("google/gemma-2-9b-it", "google/gemma-2-9b"),
        ("EleutherAI/pythia-1.4b-deduped", "EleutherAI/pythia-1.4b"),
    ],
)
def test_tuned_variants_have_the_shape_of_their_base(name, same):
    assert model_shapes.known(name) == model_shapes.KNOWN[same]


@pytest.mark.parametrize("name", ["google-bert/bert-base-cased", "Qwen/Qwen2.5-99B", "somebody/gpt2-tiny"])
def test_a_model_that_is_not_in_the_table_is_unknown(name):
    assert model_shapes.known(name) is None
