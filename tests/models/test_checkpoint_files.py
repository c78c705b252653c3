"""Model folders that are not what they should be: one line that names the file and the remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from keel.errors import UsageError
from keel.models.checkpoint_files import fault_in
from keel.models.load import ModelSource, causal_lm, load_tokenizer, model_config, scorer
from keel.models.lora import settings_of
from keel.models.tokenizer import check_reads

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
WEIGHTS = "model.safetensors"
OPENERS: dict[str, Callable[[str], Any]] = {
    "config.json": lambda path: model_config(ModelSource(path)),
    "generation_config.json": load_tokenizer,
    "tokenizer.json": load_tokenizer,
    "tokenizer_config.json": load_tokenizer,
}


def rewritten(folder: Path, place: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """A copy of a model with other tensors."""
    shutil.copytree(folder, place)
    tensors: dict[str, Any] = dict(load_file(place / WEIGHTS))
    change(tensors)
    save_file(tensors, place / WEIGHTS, metadata={"format": "pt"})
    return str(place)


@pytest.fixture
def tied(tmp_path: Path, tiny_model: Path) -> Path:
    """A Llama whose head is its embeddings, with a tokenizer."""
    folder = tmp_path / "tied"
    shutil.copytree(tiny_model, folder)
    for stale in folder.glob("*.safetensors"):
        stale.unlink()
    config = AutoConfig.from_pretrained(tiny_model)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("file", OPENERS)
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (POINTER, "git lfs pull"),
        (b"[1]", "holds a list where a JSON object belongs"),
        (b"null", "holds null where"),
        (b'"a"', "holds a string where"),
        (b"", "no JSON, or cut short"),
        (b'{"a": [1', "no JSON, or cut short"),
        (b"\xff\xfe\x00a", "no JSON, or cut short"),
    ],
)
def test_a_broken_file_of_a_model_is_named_with_the_remedy(
    tmp_path: Path, tiny_model: Path, file: str, content: bytes, says: str
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_model, folder)
    (folder / file).write_bytes(content)
    with pytest.raises(UsageError) as found:
        OPENERS[file](str(folder))
    assert says in str(found.value)
    assert str(folder / file) in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("opens", [causal_lm, scorer])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda whole: whole[: len(whole) // 2], "is cut short ("),
        (lambda whole: whole[:-1], "is cut short ("),
        (lambda whole: whole[:20], "is cut short or no safetensors file"),
        (lambda whole: b"", "is cut short or no safetensors file (0 bytes)"),
        (lambda whole: POINTER, "git lfs pull"),
    ],
)
def test_broken_weights_are_named_with_the_remedy(
    tmp_path: Path, tiny_model: Path, opens: Any, change: Callable[[bytes], bytes], says: str
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_model, folder)
    (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))
    with pytest.raises(UsageError) as found:
        opens(ModelSource(str(folder)), 0)
    assert says in str(found.value)
    assert str(folder / WEIGHTS) in str(found.value)


def test_whole_files_have_no_fault(tiny_model: Path) -> None:
    assert fault_in(str(tiny_model)) is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda weight: weight.to(torch.int8), r"holds whole numbers \(I8\)"),
        (lambda weight: weight * float("nan"), r"layers\.0\.mlp\.up_proj\.weight is not finite"),
        (lambda weight: weight / 0, r"layers\.0\.mlp\.up_proj\.weight is not finite"),
    ],
)
def test_weights_that_are_none_are_named(
    tmp_path: Path, tiny_model: Path, change: Callable[[torch.Tensor], torch.Tensor], says: str
) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(tiny_model, folder)
    tensors, name = load_file(folder / WEIGHTS), "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: change(tensors[name])}, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=says):
        causal_lm(ModelSource(str(folder)), 0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"hidden_act": "nonsense"}, "nonsense"),
        ({"dtype": "float7", "torch_dtype": "float7"}, "float7"),
    ],
)
def test_a_config_that_breaks_transformers_is_refused_in_a_line(
    tmp_path: Path, tiny_model: Path, settings: dict[str, Any], says: str
) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    with pytest.raises(UsageError, match=f"cannot be loaded: .*{says}"):
        causal_lm(ModelSource(str(folder)), 0)


def test_a_shard_that_is_not_there_is_named(tmp_path: Path, tiny_model: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path / "m", max_shard_size="20KB")
    gone = sorted((tmp_path / "m").glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UsageError, match=f"{gone.name} is not there, which model.safetensors.index.json"):
        causal_lm(ModelSource(str(tmp_path / "m")), 0)


def test_broken_settings_of_an_adapter_are_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("[1]")
    with pytest.raises(UsageError, match=r"adapter_config\.json holds a list"):
        settings_of(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma2"])
def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, kind: str) -> None:
    """transformers makes a tokenizer of special tokens alone for some types, which turns a text into
    nothing."""
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"no token for any text: put the tokenizer's files"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("says_so", [True, False])
def test_a_tied_scorer_is_no_language_model(tied: Path, tmp_path: Path, labels: int, says_so: bool) -> None:
    config = AutoConfig.from_pretrained(tied, num_labels=labels)
    AutoModelForSequenceClassification.from_pretrained(tied, config=config).save_pretrained(tmp_path / "s")
    if not says_so:
        values = json.loads((tmp_path / "s" / "config.json").read_text())
        del values["architectures"]
        (tmp_path / "s" / "config.json").write_text(json.dumps(values))
    with pytest.raises(UsageError, match=r"holds score\.weight.* it is a reward model or a classifier"):
        causal_lm(ModelSource(str(tmp_path / "s")), 0)


@pytest.mark.parametrize("opens", [causal_lm, scorer])
def test_a_checkpoint_with_more_layers_than_its_config_says_is_refused(
    tied: Path, tmp_path: Path, opens: Any
) -> None:
    def add(tensors: dict[str, Any]) -> None:
        tensors["model.layers.9.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].clone()

    with pytest.raises(UsageError, match=r"holds model\.layers\.9\.mlp\.up_proj\.weight.*config\.json"):
        opens(ModelSource(rewritten(tied, tmp_path / "more", add)), 0)


@pytest.mark.parametrize(
    "name",
    [
        "v_head.summary.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.vision_tower.patch.weight",
        "model.mtp.layers.0.weight",
    ],
)
def test_what_a_language_model_may_leave_unused_is_accepted(tied: Path, tmp_path: Path, name: str) -> None:
    def add(tensors: dict[str, Any]) -> None:
        tensors[name] = torch.zeros(4)

    causal_lm(ModelSource(rewritten(tied, tmp_path / "more", add)), 0)


def test_a_tied_checkpoint_that_stores_its_head_alone_is_whole(tied: Path, tmp_path: Path) -> None:
    """By every loader, with the weights that it stores."""

    def rename(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    source, ids = ModelSource(rewritten(tied, tmp_path / "head", rename)), torch.tensor([[5, 6, 7]])
    for found, expected in (
        (causal_lm(source, 0), causal_lm(ModelSource(str(tied)), 0)),
        (scorer(source, 0), scorer(ModelSource(str(tied)), 0)),
        (scorer(source, 0, labels=["a", "b"]), scorer(ModelSource(str(tied)), 0, labels=["a", "b"])),
    ):
        assert torch.equal(found(ids).logits, expected(ids).logits)


def test_a_tokenizer_that_knows_few_of_the_words_of_the_data_is_refused(
    tmp_path: Path, tiny_model: Path, data: Any, run: Any
) -> None:
    """Before anything trains, with the share of what it does not know."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "cat": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    shutil.copytree(tiny_model, tmp_path / "m")
    other = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    other.save_pretrained(tmp_path / "m")
    stage = {"kind": "sft", "model": str(tmp_path / "m"), "data": str(data.demonstrations), "max_steps": 1}
    with pytest.raises(UsageError, match=r"cannot read the data: \d+ of \d+ tokens are <unk>"):
        run({"stages": {"sft": stage}}, tmp_path / "run")


def test_unknown_tokens_are_no_fault_where_they_are_few() -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "cat": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    check_reads(tokenizer, ["cat cat cat dog", ""], "t")
    check_reads(tokenizer, [""], "t")
    with pytest.raises(UsageError, match="2 of 5 tokens are <unk>"):
        check_reads(tokenizer, ["cat cat cat dog", "dog"], "t")
    nothing = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="</s>")
    with pytest.raises(UsageError, match="there is no token"):
        check_reads(nothing, ["cat"], "t")
