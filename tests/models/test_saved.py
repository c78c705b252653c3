"""What is saved is what was trained, for keel, transformers and peft alike."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from keel.data import chat
from keel.errors import UsageError
from keel.models import saved_check, ties
from keel.models.embeddings import resized
from keel.models.load import ModelSource, causal_lm, load_tokenizer, scorer
from keel.models.lora import Adapters, add_adapters, files_of
from keel.models.save import save
from keel.models.saved_check import NotSavedError, save_checked
from keel.models.tokenizer import give_own_pad, known_ids, rows_needed, with_own_pad
from keel.rewards import learned
from keel.rl import grpo, ppo
from keel.stages import prepare

SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 48, "initializer_range": 0.1,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48, "initializer_range": 0.1}
OPT = {
    "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "word_embed_proj_dim": 32, "max_position_embeddings": 48, "init_std": 0.1,
}  # fmt: skip
KINDS: dict[str, tuple[Mapping[str, Any], str, str]] = {  # settings, names of embeddings and head
    "llama": (SMALL, "embed_tokens", "lm_head"),
    "gemma2": (SMALL, "embed_tokens", "lm_head"),
    "gpt2": (GPT2, "wte", "lm_head"),
    "gpt_neox": (SMALL, "embed_in", "lm_head"),
    "opt": (OPT, "embed_tokens", "lm_head"),
}
TEXT = torch.arange(20, 36)[None]


def _saved(kind: str, folder: Path, tokenizer: Any, rows: int | None = None, **more: Any) -> ModelSource:
    """A seeded model of a kind in a folder; rows: of its embeddings."""
    torch.manual_seed(0)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(
        kind, **{**KINDS[kind][0], "vocab_size": rows or len(tokenizer), **special, **more}
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelSource(str(folder))


def _trained(model: Any, size: float = 0.2) -> Any:
    """As if it had been trained: whatever is trainable is something else."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TEXT).logits[0]


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        pytest.param(kind, targets, marks=() if (one + other) % 2 else pytest.mark.slow)
        for one, kind in enumerate(KINDS)
        for other, targets in enumerate(["all-linear", "head", "embeddings", "both"])
    ],
)
def test_an_adapter_on_tied_weights_is_the_same_merged_reloaded_and_in_peft(
    kind: str, targets: str, tokenizer: Any, tmp_path: Path
) -> None:
    source = _saved(kind, tmp_path / "base", tokenizer, tie_word_embeddings=True)
    _, embeddings, head = KINDS[kind]
    named = {"head": (head,), "embeddings": (embeddings,), "both": (embeddings, head)}
    adapters = Adapters(r=4, target_modules=named.get(targets, targets))
    model = _trained(add_adapters(causal_lm(source, 0), adapters, 0))
    expected = _logits(model)
    files = files_of(model, source)
    save_checked(model, tokenizer, tmp_path / "out", "card", adapter=files)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(_logits(again), expected, rtol=1e-3, atol=1e-4)
    assert again.config.tie_word_embeddings == (targets == "all-linear")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    on_base = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    torch.testing.assert_close(_logits(on_base), expected, rtol=1e-4, atol=1e-5)


def test_in_half_precision_an_adapter_on_a_tied_head_is_saved_to_rounding(
    tokenizer: Any, tmp_path: Path
) -> None:
    source = ModelSource(
        str(_saved("llama", tmp_path / "base", tokenizer, tie_word_embeddings=True).path), dtype="bfloat16"
    )
    model = _trained(add_adapters(causal_lm(source, 0), Adapters(r=4, target_modules=["lm_head"]), 0))
    expected = _logits(model)
    save_checked(model, tokenizer, tmp_path / "out", "card")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    gap = (_logits(again) - expected).abs().max() / expected.abs().max()
    assert float(gap) < 0.02


def test_an_adapter_on_a_weight_of_several_layers_is_refused(tiny_model: Path) -> None:
    model = causal_lm(ModelSource(str(tiny_model)), 0)
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    with pytest.raises(UsageError, match=r"up_proj.weight in several layers.*target_modules"):
        add_adapters(model, Adapters(r=2, target_modules=["up_proj"]), 0)


def test_a_tie_that_no_config_can_undo_is_refused(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _saved("llama", tmp_path / "base", tokenizer, tie_word_embeddings=True)
    model = causal_lm(source, 0)
    monkeypatch.setattr(type(model), "_from_config", classmethod(lambda cls, config: model))
    with pytest.raises(UsageError, match="cannot have the two apart, as an adapter on lm_head needs"):
        add_adapters(model, Adapters(r=2, target_modules=["lm_head"]), 0)


def test_a_folder_that_is_not_the_trained_model_takes_nothings_place(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged without untying, the model that is saved is another one: an error, and the old folder stays."""
    source = _saved("llama", tmp_path / "base", tokenizer, tie_word_embeddings=True)
    save_checked(causal_lm(source, 0), tokenizer, tmp_path / "out", "the old one")
    model = _trained(add_adapters(causal_lm(source, 0), Adapters(r=4, target_modules=["lm_head"]), 0))
    monkeypatch.setattr(ties, "untie", lambda model: None)
    with pytest.raises(NotSavedError, match=r"not the trained one: read alone, .*% .*checkpoints are kept"):
        save_checked(model, tokenizer, tmp_path / "out", "the new one")
    assert (tmp_path / "out" / "README.md").read_text() == "the old one"


def test_a_stage_whose_model_cannot_be_saved_is_not_done_and_keeps_its_checkpoint(
    tiny_model: Path, data: Any, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = {"kind": "sft", "model": str(tiny_model), "data": str(data.demonstrations), "max_steps": 1}
    with monkeypatch.context() as patch:
        patch.setattr(saved_check, "lost_share", lambda *tensors, coarse: 0.5)
        with pytest.raises(NotSavedError):
            run({"stages": {"sft": stage}}, tmp_path)
    folder = tmp_path / "stages" / "sft"
    assert not (folder / "stage.json").exists()
    assert not (folder / "model").exists()
    assert list((folder / "checkpoints").glob("step-*"))
    run({"stages": {"sft": stage}}, tmp_path)  # which goes on from there
    assert (folder / "stage.json").exists()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1


def test_merging_and_the_check_have_the_memory_that_training_freed(
    tiny_model: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the heap kept of freed memory goes before adapters are merged, which makes weights anew; its
    weights go before the saved ones are read."""
    order, merge = list[Any](), saved_check.merged
    model = causal_lm(ModelSource(str(tiny_model)), 0)
    monkeypatch.setattr(
        saved_check,
        "give_back_freed_memory",
        lambda: order.append({p.device.type for p in model.parameters()}),
    )
    monkeypatch.setattr(saved_check, "merged", lambda model: order.append("merged") or merge(model))
    monkeypatch.setattr(saved_check, "compare", lambda *given: order.append("compared"))
    save_checked(model, tokenizer, tmp_path / "out", "card")
    assert order == [{"cpu"}, "merged", {"meta"}, "compared"]


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_what_training_needed_is_gone_while_models_are_saved(
    kind: str, tiny_model: Path, tiny_reward: Path, data: Any, run: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Optimisers hold the weights, and twice as much of their own."""
    module: Any = {"ppo": ppo, "grpo": grpo}[kind]
    made, alive = list[weakref.ref[Any]](), list[Any]()
    make, save_model = module.make_optimizers, prepare.save_model

    def noted(*given: Any) -> Any:
        optimizers = make(*given)
        made.extend(map(weakref.ref, optimizers))
        return optimizers

    def saved(*given: Any, **more: Any) -> None:
        alive.extend(one() for one in made)
        save_model(*given, **more)

    monkeypatch.setattr(module, "make_optimizers", noted)
    monkeypatch.setattr(prepare, "save_model", saved)
    stage = {
        "kind": kind, "model": str(tiny_model), "reward": str(tiny_reward), "data": str(data.prompts),
        "updates": 1, "batch_size": 4, "samples_per_prompt": 2, "sampling": {"max_new_tokens": 4},
    }  # fmt: skip
    gc.disable()  # nothing may wait for the collector
    try:
        run({"stages": {kind: stage}}, tmp_path)
    finally:
        gc.enable()
    assert alive == [None] * len(made)
    assert made


# ---------------------------------------------------------------- ids, and rows for them


def _gpt2_like() -> Any:
    """A tokenizer with one special token, EOS."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")


@pytest.mark.parametrize(
    ("kind", "spare"),
    [
        pytest.param(kind, spare, marks=() if (number + bool(spare)) % 2 else pytest.mark.slow)
        for number, kind in enumerate(["llama", "gpt2", "gemma2", "gpt_neox", "opt", "qwen2"])
        for spare in (0, 8)
    ],
)
def test_transformers_own_class_scores_as_keel_also_where_pad_was_eos(
    kind: str, spare: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded on the right, on the left where positions are relative, and alone."""
    monkeypatch.setitem(KINDS, "qwen2", (SMALL, "embed_tokens", "lm_head"))
    bare = _gpt2_like()
    source, own = with_own_pad(_saved(kind, tmp_path / "base", bare, len(bare) + spare), copy.deepcopy(bare))
    model = _trained(scorer(source, 0), 0.02)
    reward = learned.RewardModel(model, own)
    texts = [
        {"input_ids": [40, 41, 42, own.eos_token_id]},
        {"input_ids": [40, 43, 44, 45, 46, 47, own.eos_token_id]},
    ]
    with torch.no_grad():
        expected = learned.forward(reward, texts)
    save_checked(model, own, tmp_path / "out", "card")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    saved = load_tokenizer(str(tmp_path / "out"))
    sides = ("right", "left") if kind in ("llama", "gemma2", "gpt_neox", "qwen2") else ("right",)
    for side in sides:
        batch = saved.pad(texts, padding_side=side, return_tensors="pt")
        with torch.no_grad():
            found = theirs(**batch).logits.squeeze(-1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=side)
    alone = [theirs(input_ids=torch.tensor([text["input_ids"]])).logits.item() for text in texts]
    torch.testing.assert_close(torch.tensor(alone), expected, rtol=1e-4, atol=1e-5)


def test_a_pad_of_its_own_is_one_that_is_there_before_a_new_one(tokenizer: Any) -> None:
    for tokens, chosen, new in (
        (["<|reserved_0|>", "<|finetune_right_pad_id|>"], "<|finetune_right_pad_id|>", 0),
        (["<|begin|>", "<|reserved_0|>"], "<|reserved_0|>", 0),
        (["<|begin|>"], "<|pad|>", 1),
    ):
        bare = _gpt2_like()
        bare.add_special_tokens({"extra_special_tokens": tokens})
        had = len(bare)
        assert give_own_pad(bare, had) == had + new == len(bare)
        assert bare.pad_token == chosen
    assert give_own_pad(copy.deepcopy(tokenizer), len(tokenizer)) == len(tokenizer)


def test_a_reward_model_with_a_new_pad_still_reads_the_policys_ids(tmp_path: Path) -> None:
    bare = _gpt2_like()
    source = _saved("gpt2", tmp_path / "base", bare)
    wider, own = with_own_pad(source, copy.deepcopy(bare))
    assert wider.rows == len(bare) + 1 == len(own)
    reward = learned.RewardModel(scorer(wider, 0), own)
    assert learned.reads_ids_of(reward, bare)
    grown = copy.deepcopy(bare)
    grown.add_tokens(["zebra"])
    assert not learned.reads_ids_of(reward, grown)


def test_a_reward_stage_on_a_model_without_pad_saves_one_that_transformers_reads(
    data: Any, run: Any, tmp_path: Path
) -> None:
    bare = _gpt2_like()
    _saved("gpt2", tmp_path / "base", bare)
    stage = {
        "kind": "reward", "model": str(tmp_path / "base"), "data": str(data.pairs), "max_steps": 2,
        "lr": 1e-2, "batch_size": 4, "normalize": 4, "sampling": {"max_new_tokens": 4},
    }  # fmt: skip
    run({"stages": {"reward": stage}}, tmp_path / "run")
    folder = tmp_path / "run" / "stages" / "reward" / "model"
    reward = learned.load(str(folder), device=torch.device("cpu"))
    inputs = [learned.encode(reward, "Say:", text) for text in (" red.", " a blue thing.")]
    assert all(item["input_ids"][-1] == bare.eos_token_id for item in inputs)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = load_tokenizer(str(folder)).pad(inputs, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        found = theirs(**batch).logits.squeeze(-1)
    torch.testing.assert_close(found, learned.score(reward, inputs), rtol=1e-4, atol=1e-5)


def test_saved_configs_name_every_end_and_the_pad(tokenizer: Any, tmp_path: Path) -> None:
    source = _saved("llama", tmp_path / "base", tokenizer)
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"extra_special_tokens": ["<|im_end|>"]})
    end = own.convert_tokens_to_ids("<|im_end|>")
    chat.declare_ends(own, [end])
    ends = [own.eos_token_id, end]
    model = resized(causal_lm(source, 0), len(own))
    model.config.pad_token_id = 7  # of somebody else
    save_checked(model, own, tmp_path / "policy", "card")
    save_checked(scorer(ModelSource(str(source.path), rows=len(own)), 0), own, tmp_path / "reward", "card")
    for folder, files in (
        ("policy", ("config.json", "generation_config.json")),
        ("reward", ("config.json",)),
    ):
        for file in files:
            values = json.loads((tmp_path / folder / file).read_text())
            assert (values["eos_token_id"], values["pad_token_id"]) == (ends, own.pad_token_id), (
                folder,
                file,
            )
    assert chat.eos_ids(load_tokenizer(str(tmp_path / "policy"))) == tuple(ends)


def test_a_generation_config_that_transformers_would_not_save_loses_no_model(
    tokenizer: Any, tmp_path: Path
) -> None:
    model = causal_lm(_saved("llama", tmp_path / "base", tokenizer), 0)
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    model.generation_config.temperature, model.generation_config.do_sample = 0.6, False
    save_checked(model, tokenizer, tmp_path / "out", "card")
    assert GenerationConfig.from_pretrained(tmp_path / "out").temperature == 0.6


def test_a_tokenizer_longer_than_the_embeddings_is_refused_before_any_weights_are_read(
    tokenizer: Any, data: Any, run: Any, tmp_path: Path
) -> None:
    source = _saved("llama", tmp_path / "base", tokenizer)
    longer = copy.deepcopy(tokenizer)
    longer.add_special_tokens({"extra_special_tokens": ["<think>", "</think>"]})
    longer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"never read")
    stage = {"kind": "sft", "model": {"path": str(source.path)}, "data": str(data.demonstrations)}
    rows = len(tokenizer)
    message = rf"{rows + 2} tokens, its embeddings {rows} rows.*<think>.*`model.resize: true`"
    with pytest.raises(UsageError, match=message):
        run({"stages": {"sft": stage}}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_resize_gives_new_tokens_seeded_rows_near_the_mean_which_are_saved(
    tokenizer: Any, data: Any, run: Any, tmp_path: Path
) -> None:
    _saved("llama", tmp_path / "base", tokenizer, tie_word_embeddings=True)
    longer = copy.deepcopy(tokenizer)
    longer.add_special_tokens({"extra_special_tokens": ["<think>", "</think>"]})
    longer.save_pretrained(tmp_path / "base")
    rows = rows_needed(ModelSource(str(tmp_path / "base")), longer, resize=True)
    assert rows == len(longer)
    source = ModelSource(str(tmp_path / "base"), rows=rows)
    weight = causal_lm(source, 3).model.embed_tokens.weight
    assert torch.equal(weight, causal_lm(source, 4).model.embed_tokens.weight)
    old, new = weight[: len(tokenizer)], weight[len(tokenizer) :]
    assert float((new - old.mean(dim=0)).abs().max()) < 0.05 * float(old.std())
    assert not torch.equal(new[0], new[1])
    stage = {
        "kind": "sft", "model": {"path": str(tmp_path / "base"), "resize": True}, "max_steps": 1,
        "data": str(data.demonstrations),
    }  # fmt: skip
    run({"stages": {"sft": stage}}, tmp_path / "run")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "stages" / "sft" / "model")
    assert saved.config.vocab_size == saved.get_input_embeddings().weight.shape[0] == len(longer)


def test_a_token_that_stands_for_images_needs_no_row(tokenizer: Any, tmp_path: Path) -> None:
    source = _saved("llama", tmp_path / "base", tokenizer)
    longer = copy.deepcopy(tokenizer)
    longer.add_special_tokens({"extra_special_tokens": ["<image_soft_token>"]})
    assert rows_needed(source, longer, resize=False) is None
    assert known_ids(longer) == len(tokenizer) + 1


def test_an_adapter_names_its_base_so_that_peft_finds_it_from_anywhere(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its whole path, though the config named it by a relative one."""
    source = _saved("llama", tmp_path / "base", tokenizer, tie_word_embeddings=False)
    monkeypatch.chdir(tmp_path)
    source = replace(source, path="base")
    model = _trained(add_adapters(causal_lm(source, 0), Adapters(r=4), 0))
    expected, files = _logits(model), files_of(model, source)
    save_checked(model, tokenizer, tmp_path / "out", "card", adapter=files)
    monkeypatch.chdir("/")
    settings = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "base")
    found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out" / "adapter").eval()
    torch.testing.assert_close(_logits(found), expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_on_a_model_of_the_hub_names_it_with_its_revision(tiny_model: Path) -> None:
    model = add_adapters(causal_lm(ModelSource(str(tiny_model)), 0), Adapters(r=2), 0)
    files = files_of(model, ModelSource("somebody/model", revision="abc"))
    assert files is not None
    assert files.settings["base_model_name_or_path"] == "somebody/model"
    assert files.settings["revision"] == "abc"


def test_how_a_tokenizer_was_called_last_is_not_saved(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer(["the cat sat on the mat"], truncation=True, max_length=2, padding=True)
    save(causal_lm(ModelSource(str(tiny_model)), 0), tokenizer, tmp_path / "model", "card")
    written = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    assert (written["truncation"], written["padding"]) == (None, None)
