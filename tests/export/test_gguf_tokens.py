"""A tokenizer that keel trains, as llama.cpp cuts text by what the GGUF says: the rules of llama.cpp written
down plainly (`llama-vocab.cpp`: the patterns of "smollm", merges by rank, control tokens in text)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from keel import worlds
from keel.data import chat
from keel.export import gguf_file
from keel.models.tokenizer import train_tokenizer

SMOLLM = (r"\p{N}", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)")
TEXTS = (
    "", " ", "\n", "  two  spaces\t\ttabs \n\n lines\r\n", "it's 42, they'll pay 3,141.59 €", "²³ ½ ⅷ ٣ ௧ 四",
    "café naïve Ünïcode ÿ", "日本語のテキスト", "emoji 🙂🏳️‍🌈 and \u200b zero width", "\u00a0nbsp \u2028 line",
    "I'M 'S 'll'll", "...!?;: -- (a) [b] {c}", "<|end|> and <|pad|> in text", "a" * 50, "\x00\x1f",
)  # fmt: skip


class Fields:
    """What a GGUF is told, by the writer's own names."""

    def __init__(self) -> None:
        self.told: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return lambda value: self.told.__setitem__(name.removeprefix("add_"), value)


@lru_cache
def _bytes_as_letters() -> dict[int, str]:
    """GPT-2's table: every byte as a letter that can be seen."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


def _cut(text: str) -> Iterator[str]:
    """One pattern after the other: what it finds, and what lies between."""
    parts = [text]
    for pattern in SMOLLM:
        finer: list[str] = []
        for part in parts:
            end = 0
            for match in regex.finditer(pattern, part):
                finer += [part[end : match.start()], match[0]]
                end = match.end()
            finer.append(part[end:])
        parts = [part for part in finer if part]
    yield from parts


def tokens_of(told: dict[str, Any], text: str) -> list[int]:
    """llama.cpp's tokens of a text in which control tokens are text."""
    ids = {token: number for number, token in enumerate(told["token_list"])}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(told["token_merges"])}
    found: list[int] = []
    for word in _cut(text):
        parts = [_bytes_as_letters()[byte] for byte in word.encode()]
        while len(parts) > 1:
            rank, at = min((ranks.get(pair, len(ranks)), at) for at, pair in enumerate(pairwise(parts)))
            if rank == len(ranks):
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        found += [ids[part] for part in parts]
    return found


@pytest.fixture(scope="module")
def demo() -> tuple[Any, dict[str, Any]]:
    """The demo's own tokenizer, and what its GGUF is told."""
    rows = worlds.load("helpdesk").rows("text", 1500, 0)
    tokenizer = chat.with_chat_template(train_tokenizer((row["text"] for row in rows), 1024, 192))
    fields = Fields()
    gguf_file.add_vocabulary(fields, tokenizer, 1024)
    return tokenizer, fields.told


def test_the_demos_texts_are_cut_alike(demo: tuple[Any, dict[str, Any]]) -> None:
    tokenizer, told = demo
    assert (told["tokenizer_model"], told["tokenizer_pre"]) == ("gpt2", "smollm")
    rows = [chat.user_text(row["prompt"]) for row in worlds.load("helpdesk").rows("test_prompts", 100, 0)]
    letters = random.Random(0)
    noise = ["".join(chr(letters.choice([9, 32, 39, 49, 97, 233, 0x4E00, 0x1F642])) for _ in range(30))]
    for text in (*rows, *TEXTS, *noise):
        ours = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokens_of(told, text) == ours, text


@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=st.text(max_size=30))
def test_any_text_is_cut_alike(demo: tuple[Any, dict[str, Any]], text: str) -> None:
    tokenizer, told = demo
    ours = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokens_of(told, text) == ours


def test_ends_and_marks_are_those_of_the_tokenizer(demo: tuple[Any, dict[str, Any]]) -> None:
    tokenizer, told = demo
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert (told["eos_token_id"], told["pad_token_id"], told["add_bos_token"]) == (end, pad, False)
    assert [told["token_types"][i] for i in (end, pad)] == [gguf_file.CONTROL] * 2
    assert told["chat_template"] == tokenizer.chat_template
