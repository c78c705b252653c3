"""Models in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from keel.models.load import (
    Adapters,
    ModelSource,
    add_adapters,
    causal_lm,
    context_length,
    merged,
    save,
    scorer,
)
from keel.models.tokenizer import train_tokenizer
from keel.types import UsageError

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def same(one: Any, other: Any) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_trap_24_a_new_model_and_its_head_depend_on_their_seed_and_on_nothing_before(
    tiny_model: Path, tiny_bert: Path
) -> None:
    """[trl PR 4887] A language model, a decoder's score head, an encoder's pooler and classifier."""
    makers = [
        lambda seed: causal_lm(ModelSource(init=LLAMA | {"vocab_size": 50}), seed),
        lambda seed: scorer(ModelSource(init=LLAMA | {"vocab_size": 50}), seed),
        lambda seed: scorer(ModelSource(str(tiny_model)), seed),
        lambda seed: scorer(ModelSource(str(tiny_bert)), seed),
        lambda seed: add_adapters(causal_lm(ModelSource(str(tiny_model)), 0), Adapters(r=2), seed),
    ]
    for make in makers:
        torch.manual_seed(1)
        first = make(7)
        torch.manual_seed(2)
        torch.rand(3)
        before = torch.get_rng_state()
        second = make(7)
        assert torch.equal(torch.get_rng_state(), before)  # and it leaves the caller's random state alone
        assert same(first, second)
        assert not same(first, make(8))


def test_a_new_head_has_the_spread_of_the_paper_and_a_trained_one_is_kept(
    tiny_model: Path, tiny_reward: Path
) -> None:
    heads = torch.cat([scorer(ModelSource(str(tiny_model)), seed).score.weight for seed in range(30)])
    assert heads.std().item() == pytest.approx(33**-0.5, rel=0.1)  # 1/√(d+1), 2009.01325
    kept = scorer(ModelSource(str(tiny_reward)), 99).score.weight
    assert torch.equal(kept, AutoModelForSequenceClassification.from_pretrained(tiny_reward).score.weight)


def test_adapters_start_as_the_model_itself_and_end_merged_into_it(
    tiny_model: Path, tokenizer: Any, tmp_path: Path
) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    model = add_adapters(causal_lm(ModelSource(str(tiny_model)), 0), Adapters(r=2), 3).eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
        for name, p in model.named_parameters():
            assert p.requires_grad == ("lora" in name)
            if p.requires_grad:
                p.add_(0.1)
        expected = model(ids).logits
        assert not torch.allclose(expected, plain(ids).logits, atol=1e-3)
        save(merged(model), tokenizer, tmp_path / "model", "card")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        torch.testing.assert_close(again(ids).logits, expected, rtol=0, atol=1e-5)
    assert again.state_dict().keys() == plain.state_dict().keys()


def test_saving_replaces_the_whole_folder_and_leaves_nothing_beside_it(
    tiny_model: Path, tokenizer: Any, tmp_path: Path
) -> None:
    target, model = tmp_path / "model", causal_lm(ModelSource(str(tiny_model)), 0)
    for left_over in (".model.partial", ".model.old"):
        (tmp_path / left_over).mkdir()
        (tmp_path / left_over / "half").touch()
    target.mkdir()
    (target / "stale").touch()
    save(model, tokenizer, target, "the card")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (target / "stale").exists()
    assert (target / "README.md").read_text() == "the card"
    assert same(AutoModelForCausalLM.from_pretrained(target), model)
    assert AutoTokenizer.from_pretrained(target).get_vocab() == tokenizer.get_vocab()
    assert AutoTokenizer.from_pretrained(target).chat_template == tokenizer.chat_template


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (ModelSource("nowhere/no-such-model"), "'nowhere/no-such-model' cannot be loaded"),
        (ModelSource(init={"model_type": "lama"}), "'lama' cannot be loaded"),
        (ModelSource(init=LLAMA | {"hiden_size": 3}), "llama has no setting 'hiden_size'"),
        (
            ModelSource(init=LLAMA | {"hidden_size": 30, "num_attention_heads": 4}),
            r"hidden size \(30\) is not a multiple",
        ),
    ],
)
def test_a_model_that_cannot_be_is_a_clear_error(source: ModelSource, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        causal_lm(source, 0)


def test_a_new_model_takes_vocabulary_and_special_tokens_from_the_tokenizer(tokenizer: Any) -> None:
    config = causal_lm(ModelSource(init=LLAMA), 0, vocab=tokenizer).config
    assert config.vocab_size == len(tokenizer)
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    with pytest.raises(UsageError, match="vocab_size 10 is smaller"):
        causal_lm(ModelSource(init=LLAMA | {"vocab_size": 10}), 0, vocab=tokenizer)


def test_weights_that_are_not_safetensors_are_not_loaded(tiny_model: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match="cannot be loaded"):
        causal_lm(ModelSource(str(tmp_path)), 0)


def test_a_trained_tokenizer_encodes_any_text_and_gives_it_back() -> None:
    tokenizer = train_tokenizer(["the cat is red", "the dog is blue"] * 5, 300, 32)
    for text in ("the cat", "Ünïcödé 🦊\n\ttabs", "  two spaces", "<|end|"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_token_id not in ids
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert len(tokenizer("the cat is red")["input_ids"]) == 4


@pytest.mark.parametrize(
    "kind", ["roberta", "xlm-roberta", "camembert", "mpnet", "bert", "electra", "albert", "gpt2", "llama"]
)
def test_the_context_is_the_longest_sequence_that_the_model_takes(kind: str) -> None:
    """RoBERTa and its kin take two tokens fewer than their config has positions."""
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "embedding_size": 16,
    }
    values = {"vocab_size": 60, "max_position_embeddings": 20, "pad_token_id": 1, **sizes}
    if kind in ("gpt2", "llama"):
        values = {"vocab_size": 60, "pad_token_id": 1} | (
            {"n_positions": 20} if kind == "gpt2" else {"max_position_embeddings": 20}
        )
        values |= {"n_embd": 32, "n_layer": 1, "n_head": 2} if kind == "gpt2" else sizes
    config = AutoConfig.for_model(kind, **values)
    limit = context_length(config)
    assert limit is not None
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model(input_ids=torch.full((1, limit), 5), attention_mask=torch.ones(1, limit, dtype=torch.long))
    if kind != "llama":  # its rotations go on for ever
        with pytest.raises((IndexError, RuntimeError)):
            model(
                input_ids=torch.full((1, limit + 1), 5),
                attention_mask=torch.ones(1, limit + 1, dtype=torch.long),
            )
