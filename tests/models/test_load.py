"""Models in and out."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from keel.errors import UsageError
from keel.models import load
from keel.models.load import (
    ModelSource,
    causal_lm,
    checkpoint_activations,
    context_length,
    disable_dropout,
    load_tokenizer,
    model_config,
    scorer,
)
from keel.models.lora import Adapters, add_adapters, merged
from keel.models.save import save
from keel.models.tokenizer import train_tokenizer

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


def without(source: Path, folder: Path, key: str) -> ModelSource:
    """A copy of a checkpoint that lacks one of its weights."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    del weights[key]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return ModelSource(str(folder))


@pytest.mark.parametrize("key", ["score.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_trained_reward_model_that_lacks_a_weight_is_refused(
    key: str, tiny_reward: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"no whole reward model: it has no {key}"):
        scorer(without(tiny_reward, tmp_path / "model", key), 0)


def test_a_language_model_that_becomes_a_reward_model_may_lack_a_head_alone(
    tiny_model: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    """A BERT that was pretrained has no pooler either; that one is part of its head."""
    scorer(ModelSource(str(tiny_model)), 0)
    scorer(ModelSource(str(tiny_bert)), 0)
    for source, key in (
        (tiny_model, "model.layers.0.self_attn.q_proj.weight"),
        (tiny_bert, "bert.encoder.layer.1.output.dense.weight"),
    ):
        with pytest.raises(UsageError, match=f"no whole language model: it has no {key}"):
            scorer(without(source, tmp_path / source.name, key), 0)


def test_a_whole_head_is_kept_though_the_config_does_not_say_that_there_is_one(
    tiny_reward: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_reward, tmp_path / "model")
    config = json.loads((tiny_reward / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    kept = scorer(ModelSource(str(tmp_path / "model")), 99).score.weight
    assert torch.equal(kept, load_file(tiny_reward / "model.safetensors")["score.weight"])


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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("which", ["tiny_model", "tiny_bert"])
def test_what_lora_trains_is_float32_on_weights_in_half_precision(
    which: str, dtype: str, request: pytest.FixtureRequest
) -> None:
    """One step of 1e-4 moves a head of that precision by nothing at all in most places."""
    source = ModelSource(str(request.getfixturevalue(which)), dtype=dtype)
    model = add_adapters(scorer(source, 3), Adapters(r=2), 3, train_head=True).train()
    disable_dropout(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {getattr(torch, dtype)}
    ids = torch.tensor([[5, 6, 7, 8]])
    logits = model(input_ids=ids).logits
    assert logits.dtype == torch.float32
    logits.sum().backward()
    before = [p.detach().clone() for p in trained]
    torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0).step()
    moved = [
        (p != b)[p.grad != 0].float().mean() for p, b in zip(trained, before, strict=True) if p.grad.any()
    ]
    assert len(moved) > 4
    assert min(moved) > 0.99
    expected = model(input_ids=ids).logits
    tolerance = 0.05 if dtype == "bfloat16" else 0.01
    torch.testing.assert_close(merged(model)(input_ids=ids).logits, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("bert", {"bert.pooler.dense", "classifier"}),
        ("distilbert", {"pre_classifier", "classifier"}),
        ("roberta", {"classifier.dense", "classifier.out_proj"}),
        ("llama", {"score"}),
    ],
)
def test_lora_trains_the_whole_head_whatever_its_targets(kind: str, head: set[str]) -> None:
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    if kind == "distilbert":
        sizes = {"vocab_size": 50, "dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64}
    targets = ["query"] if kind in ("bert", "roberta") else ["q_lin"] if kind == "distilbert" else ["q_proj"]
    for target_modules in (targets, "all-linear"):
        plain = scorer(ModelSource(init={"model_type": kind, **sizes}), 0)
        model = add_adapters(plain, Adapters(r=2, target_modules=target_modules), 0, train_head=True)
        trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name}
        tidy = {
            name.removeprefix("base_model.model.").replace("modules_to_save.default.", "") for name in trained
        }
        assert {name.rpartition(".")[0] for name in tidy} == head
        assert any("lora" in name for name, p in model.named_parameters() if p.requires_grad)


OFTEN = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DROPOUTS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "vocab_size": 50,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "resid_pdrop": 0.5,
        "embd_pdrop": 0.5,
        "attn_pdrop": 0.5,
        "bos_token_id": 1,
        "eos_token_id": 1,
    },
    "gpt_neox": {**OFTEN, "intermediate_size": 64, "hidden_dropout": 0.5, "attention_dropout": 0.5},
    "falcon": {
        **OFTEN,
        "hidden_dropout": 0.5,
        "attention_dropout": 0.5,
        "bos_token_id": 1,
        "eos_token_id": 1,
    },
    "bloom": {
        "vocab_size": 50,
        "hidden_size": 32,
        "n_layer": 2,
        "n_head": 4,
        "hidden_dropout": 0.5,
        "attention_dropout": 0.5,
    },
    "opt": {**OFTEN, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.5, "layerdrop": 0.5},
    "llama": {**OFTEN, "intermediate_size": 64, "attention_dropout": 0.5},
}


@pytest.mark.parametrize("kind", DROPOUTS)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_trap_15_dropout_is_off_in_every_architecture(kind: str, lora: bool) -> None:
    """Whether a module drops, a number that its layer keeps, or one that the layer reads from the config.
    What is saved with the model keeps its rates."""
    model: Any = causal_lm(ModelSource(init={"model_type": kind, **DROPOUTS[kind]}), 0)
    if lora:
        model = add_adapters(model, Adapters(r=2, dropout=0.5), 0)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.fill_(0.1)
    ids, config = torch.tensor([[5, 6, 7, 8, 9]]), model.config.to_dict()

    def forward(training: bool) -> torch.Tensor:
        with torch.no_grad():
            return model.train(training)(input_ids=ids, use_cache=False).logits

    torch.manual_seed(0)
    assert not torch.equal(forward(True), forward(True))
    disable_dropout(model)
    assert torch.equal(forward(True), forward(True))
    assert torch.equal(forward(True), forward(False))
    assert model.config.to_dict() == config


def test_every_kind_of_dropout_module_is_turned_off() -> None:
    x = torch.ones(3, 4, 5)
    for kind in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout):
        model = nn.Sequential(kind(0.5)).train()
        assert any(not torch.equal(model(x), x) for _ in range(20))
        disable_dropout(model)
        assert all(torch.equal(model(x), x) for _ in range(20))


def test_checkpointing_takes_the_name_that_the_library_knows_and_no_deprecated_one(tiny_model: Path) -> None:
    model = add_adapters(causal_lm(ModelSource(str(tiny_model)), 0), Adapters(r=2), 0).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint_activations(model)
    model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    class Older(nn.Module):
        given: Any = None

        def gradient_checkpointing_enable(self, settings: Any) -> None:
            self.given = settings

        def enable_input_require_grads(self) -> None:
            pass

    older = Older()
    checkpoint_activations(older)
    assert older.given == {"use_reentrant": False}


def test_a_model_that_cannot_recompute_its_activations_is_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = causal_lm(ModelSource(str(tiny_model)), 0)
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(UsageError, match=r"gradient_checkpointing: .*LlamaForCausalLM does not support"):
        checkpoint_activations(model)


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


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma", "gpt2"])
def test_a_tokenizer_of_ones_own_stays_what_it_is_beside_any_model(
    kind: str, tokenizer: Any, tmp_path: Path
) -> None:
    """transformers 5 makes a Qwen2Tokenizer of whatever stands beside a Qwen 2 or 3, with other ids."""
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    found, text = load_tokenizer(str(tmp_path)), "the cat is 123 times red, isn't it?"
    assert len(found) == len(tokenizer)
    assert found(text).input_ids == tokenizer(text).input_ids
    assert (found.eos_token_id, found.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


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


def test_the_context_of_longrope_is_the_one_in_which_rows_do_not_turn_each_other() -> None:
    """Beyond it, transformers chooses the angles of all rows by the longest (Phi-3, Phi-4)."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4}
    sizes = {
        "vocab_size": 50, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1,
        "intermediate_size": 32, "pad_token_id": 0, "max_position_embeddings": 128, "initializer_range": 0.5,
    }  # fmt: skip
    config = AutoConfig.for_model("phi3", **sizes, original_max_position_embeddings=24, rope_parameters=rope)
    limit = context_length(config)
    assert limit == 24
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    rows = torch.randint(1, 50, (2, limit + 1))

    def first(width: int) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=rows[:, :width], use_cache=False).logits[:, :10]

    torch.testing.assert_close(first(limit), first(12))
    assert float((first(limit + 1) - first(12)).abs().max()) > 1e-2


def test_positions_that_count_from_the_id_of_padding_are_still_counted(tmp_path: Path) -> None:
    """ProphetNet's embeddings of positions read their `padding_idx`."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "decoder_ffn_dim": 32, "num_decoder_layers": 1}
    config = AutoConfig.for_model("prophetnet", **sizes, num_decoder_attention_heads=2, pad_token_id=3)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    opened = causal_lm(ModelSource(str(tmp_path)), 0).eval()
    ids = torch.arange(5, 12)[None]
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids, use_cache=False).logits for m in (opened, model))
    torch.testing.assert_close(ours, theirs)
    assert opened.get_input_embeddings().padding_idx is None


def test_a_config_is_read_once_for_as_long_as_its_files_stand(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage asks a dozen times; a look at the headers of seventy billion weights takes a while."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    read, looked = list[str](), load.fault_of_dtypes
    monkeypatch.setattr(load, "fault_of_dtypes", lambda place: read.append(place.name) or looked(place))
    one = model_config(ModelSource(path=str(folder)))
    expected = one.to_dict()
    one.vocab_size = 7  # the caller's own
    other = model_config(ModelSource(path=str(folder)))
    assert (type(other), other.name_or_path) == (type(one), str(folder))
    assert other.to_dict() == expected
    assert read == ["model"]
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"max_position_embeddings": 12345}))
    assert model_config(ModelSource(path=str(folder))).max_position_embeddings == 12345
    save_file({"a.weight": torch.zeros(2, dtype=torch.int8)}, folder / "more.safetensors")
    with pytest.raises(UsageError, match="holds whole numbers"):
        model_config(ModelSource(path=str(folder)))
    (folder / "config.json").unlink()
    with pytest.raises(UsageError, match="cannot be loaded"):
        model_config(ModelSource(path=str(folder)))
