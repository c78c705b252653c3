"""Texts that are tokenised together become the tokens that they become one by one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from keel.data import chat
from keel.data.chat import batching
from keel.data.stored.tokens import tokens_of
from keel.types import DemonstrationRecord, PreferenceRecord, TextRecord, UnpairedRecord

_spec = importlib.util.spec_from_file_location(
    "tokenizers_for_batching", Path(__file__).with_name("tokenizers_for_tests.py")
)
assert _spec is not None
assert _spec.loader is not None
made: Any = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = made
_spec.loader.exec_module(made)

WORDS = [
    "the cat",
    "it's",
    "  ",
    "\n\n",
    "don't go",
    "a",
    " b",
    "<eos>",
    "é",
    "e\u0301",
    "1234",
    "x  y",
    "?!",
    "…\n",
    "日本",
]
TEXT = st.lists(st.sampled_from([*WORDS, " the owl", " so it is", "."]), min_size=1, max_size=8).map("".join)
CORPUS = [
    " ".join(WORDS),
    "the cat is red and the owl is blue, so it is. Don't go! 12 345",
    "was the hat",
] * 3


def trained(split: str | None, normalizer: Any = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges, behind a regular expression or GPT-2's own."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    tokenizer.pre_tokenizer = (
        level
        if split is None
        else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), level])
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def llama_2() -> PreTrainedTokenizerFast:
    """BPE that writes ▁ for spaces and one more at the start, with BOS before every text."""
    letters = sorted({*"".join(CORPUS + WORDS).replace(" ", "▁"), *batching.string.ascii_letters, "▁"})
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁"), ("s", "o"), ("▁", "so"), ("c", "a")]
    pieces = ["<unk>", "<s>", "<eos>", *letters, *(a + b for a, b in merges)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<s>", unk_token="<unk>"
    )


TOKENIZERS: dict[str, Any] = {
    "gpt2": trained(None),
    "llama3": trained(batching._SPLITS[0]),
    "qwen": trained(batching._SPLITS[1], normalizers.NFC()),
    "llama2": llama_2(),
    "other split": trained(r"\S+\s*"),
    **{kind: made.make_tokenizer(kind) for kind in made.KINDS},
}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=TEXT, sides=st.tuples(TEXT, TEXT, TEXT))
def test_tokens_are_the_same_together_as_one_by_one(
    name: str, prompt: str, sides: tuple[str, str, str]
) -> None:
    tokenizer = TOKENIZERS[name]
    rows = [
        PreferenceRecord(prompt, sides[0], sides[1]),
        DemonstrationRecord(prompt + sides[0], sides[2]),
        UnpairedRecord(sides[2], prompt),
        TextRecord(prompt + sides[1]),
    ]
    alone = [tokens_of(tokenizer, row) for row in rows]
    with chat.batched(tokenizer, rows):
        assert [tokens_of(tokenizer, row) for row in rows] == alone
    assert batching.known_ids(tokenizer, prompt, False) is None  # nothing is remembered afterwards


def test_which_tokenizers_may_be_cut() -> None:
    cuts = {name: batching._way_of(tokenizer).cuts for name, tokenizer in TOKENIZERS.items()}
    assert {name for name, can in cuts.items() if can} >= {"gpt2", "llama3", "qwen", "llama2"}
    assert not cuts["other split"]


def test_what_both_sides_share_is_tokenised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = batching._ids

    def ids(tokenizer: Any, texts: Any, *, special: bool) -> Any:
        asked.extend(texts)
        return real(tokenizer, texts, special=special)

    monkeypatch.setattr(batching, "_ids", ids)
    rows = [PreferenceRecord("the cat is red " * 20 + "so?", " yes", " no"), PreferenceRecord("a", "b", "c")]
    with chat.batched(TOKENIZERS["gpt2"], rows):
        tokens_of(TOKENIZERS["gpt2"], rows[0])
    assert sum("the cat is red" in text for text in asked) == 1
