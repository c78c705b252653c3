"""What a model's files say of it: read from folders that hold only what `save_pretrained` writes."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from keel.data import chat
from keel.models.facts import facts_of, read_facts
from keel.models.load import load_tokenizer
from keel.models.save import save

SPECIALS = ("<eos>", "<pad>", "<bos>", "<|start|>", "<|stop|>", "<|call|>", "<think>", "</think>")
SIZES = {
    "vocab_size": 272,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n<think>\n{% endif %}"
)


def make_tokenizer(template=TEMPLATE):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>"
    )
    tokenizer.chat_template = template
    return tokenizer


def make_config(**more):
    return AutoConfig.for_model("llama", **{**SIZES, "max_position_embeddings": 64, **more})


def folder_with(tmp_path, config, generation=None):
    config.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return str(tmp_path)


def texts(tokens):
    return [text for _, text in tokens]


def test_every_eos_of_the_files_and_the_templates_end_stop_a_rollout(tmp_path):
    call = make_tokenizer().convert_tokens_to_ids("<|call|>")
    path = folder_with(tmp_path, make_config(eos_token_id=256), {"eos_token_id": [256, call]})
    facts = read_facts(path)
    assert texts(facts.eos) == ["<eos>", "<|call|>"]
    assert facts.reply_end[1] == "<|stop|>"
    assert texts(facts.stops) == ["<eos>", "<|call|>", "<|stop|>"]
    assert chat.stop_ids(load_tokenizer(path), ()) == tuple(i for i, _ in facts.stops)


def test_a_default_eos_id_that_is_an_ordinary_token_ends_nothing(tmp_path):
    """A config that nobody has adapted says 2, which here is a character."""
    path = folder_with(tmp_path, make_config(eos_token_id=2))
    assert texts(read_facts(path).eos) == ["<eos>"]


def test_a_tokenizer_without_a_model_has_its_own_eos(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    assert chat.eos_ids(load_tokenizer(str(tmp_path))) == (256,)


def test_facts_in_plain_words(tmp_path):
    path = folder_with(tmp_path, make_config(eos_token_id=256))
    told = "\n".join(read_facts(path).describe())
    for words in (
        "model type llama",
        "context: 64 tokens",
        "272 rows of embeddings, 264 tokens; 8 rows stand for no token",
        "a reply ends with <|stop|> (260), which is trained; a rollout stops at <eos> (256) as well",
        "pad: <pad> (257)",
        "to plain text the tokenizer adds none; the template writes it",
        "opens a thought (<think>)",
        "special tokens in replies: </think> <think>",
    ):
        assert words in told


@pytest.mark.parametrize(
    ("kind", "more", "window"),
    [
        ("mistral", {"sliding_window": 8}, 8),
        ("mistral", {"sliding_window": None}, None),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": False}, None),
        (
            "gemma3_text",
            {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8},
            8,
        ),
        ("gemma3_text", {"sliding_window": 8, "layer_types": ["full_attention"] * 2, "head_dim": 8}, None),
    ],
)
def test_windows_are_those_of_the_layers_that_have_one(kind, more, window):
    config = AutoConfig.for_model(kind, **SIZES, **more)
    assert facts_of(config, make_tokenizer()).window == window


@pytest.mark.parametrize(
    ("kind", "more", "carries"),
    [
        ("llama", {}, False),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, True),
        ("lfm2", {"layer_types": ["full_attention", "full_attention"]}, False),
        ("qwen3_5_text", {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8}, True),
        ("mamba2", {"num_heads": 4, "head_dim": 8}, True),
        ("falcon_h1", {}, True),  # both in each layer
        ("rwkv", {}, True),  # names no kinds of layers: its class tells
        ("gemma3_text", {"head_dim": 8}, False),
    ],
)
def test_what_layers_that_carry_a_state_mean_is_said(kind, more, carries):
    config = AutoConfig.for_model(kind, **SIZES, **more)
    facts = facts_of(config, make_tokenizer())
    told = "\n".join(facts.describe())
    assert facts.carries_state == carries
    assert ("packing is refused" in told) == carries
    assert ("rollouts: by the cache that the model makes itself" in told) == carries


def test_a_state_in_the_text_part_of_a_nested_config_is_found():
    text = {**SIZES, "layer_types": ["linear_attention", "full_attention"], "head_dim": 8}
    assert facts_of(AutoConfig.for_model("qwen3_5", text_config=text), make_tokenizer()).carries_state


def test_a_window_and_packing_are_said():
    config = make_config()
    assert not any("packing" in line for line in facts_of(config, make_tokenizer()).describe())
    windowed = AutoConfig.for_model("mistral", **SIZES, sliding_window=8)
    assert any(
        line.startswith("packing: examples of more than 8 tokens")
        for line in facts_of(windowed, make_tokenizer()).describe()
    )


def test_the_text_part_of_a_nested_config_is_asked():
    text = {**SIZES, "head_dim": 8, "max_position_embeddings": 96, "sliding_window": 8}
    config = AutoConfig.for_model("gemma3", text_config=text)
    facts = facts_of(config, make_tokenizer())
    assert (facts.context, facts.embeddings, facts.window) == (96, 272, 8)


def test_a_template_that_cannot_be_used_is_said():
    broken = make_tokenizer("{% for m in messages %}{{ m.content[:3] }}{% endfor %}")
    facts = facts_of(make_config(), broken)
    assert "cannot be used" in "\n".join(facts.describe())
    assert texts(facts.stops) == ["<eos>"]


def test_a_saved_model_names_every_end_and_the_pad(tmp_path):
    """Another engine must stop where a rollout of keel stops."""
    torch.manual_seed(0)
    model, tokenizer = (
        AutoModelForCausalLM.from_config(make_config(eos_token_id=256, pad_token_id=None)),
        make_tokenizer(),
    )
    save(model, tokenizer, tmp_path / "model", "card")
    for name in ("config.json", "generation_config.json"):
        written = json.loads((tmp_path / "model" / name).read_text())
        assert written["eos_token_id"] == list(chat.stop_ids(tokenizer, ()))
        assert written["pad_token_id"] == tokenizer.pad_token_id
    assert chat.eos_ids(load_tokenizer(str(tmp_path / "model"))) == chat.stop_ids(tokenizer, ())
