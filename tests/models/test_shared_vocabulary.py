"""Tokenizers that read alike share one vocabulary, and nothing else."""

from __future__ import annotations

import ctypes
import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from keel.data.chat.encoding import encode_content
from keel.models import shared_vocabulary
from keel.models.load import load_tokenizer
from keel.models.tokenizer import train_tokenizer

WORDS = ["".join("abcdefghij"[int(n)] for n in str(number * 7919 % 99991)) for number in range(2000)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(WORDS, 400, 64).save_pretrained(place)
    return place


class InUse(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (*"aoshmuf", "used", "free", "keep")]


def in_use() -> int:
    """Bytes that C code holds."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("needs glibc 2.33")
    libc.mallinfo2.restype = InUse
    gc.collect()
    now = libc.mallinfo2()
    return now.used + now.m


def grows(times: int, folder: Path) -> int:
    text = " ".join(WORDS)
    before = in_use()
    for _ in range(times):
        tokenizer = shared_vocabulary.copied(load_tokenizer(str(folder)))
        tokenizer(text, verbose=False)
        encode_content(tokenizer, text)
        del tokenizer
    return in_use() - before


def test_words_go_with_the_last_tokenizer_that_reads_alike(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened again, the same tokenizer holds what it held once: without sharing each leaves its words."""
    grows(1, folder)
    shared = grows(3, folder)
    monkeypatch.setattr(shared_vocabulary, "KEPT", 0)
    apart = grows(3, folder)
    assert apart > 300_000 > 6 * shared, (apart, shared)


def test_tokens_and_templates_stay_apart(folder: Path) -> None:
    one, other = load_tokenizer(str(folder)), load_tokenizer(str(folder))
    one.add_tokens(["<new>"])
    one.chat_template = "x"
    assert len(one) == len(other) + 1
    assert other.chat_template is None
    assert one.decode(one("<new> abc")["input_ids"]) == other.decode(other("<new> abc")["input_ids"])
    assert len(one("<new>")["input_ids"]) == 1 < len(other("<new>")["input_ids"])


def test_another_vocabulary_is_not_taken_for_it(folder: Path, tmp_path: Path) -> None:
    """One merge less is another model."""
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    file = json.loads((other / "tokenizer.json").read_text())
    dropped = "".join(file["model"]["merges"].pop())
    (other / "tokenizer.json").write_text(json.dumps(file))
    whole, less = load_tokenizer(str(folder)), load_tokenizer(str(other))
    assert len(whole(dropped)["input_ids"]) < len(less(dropped)["input_ids"])


def test_a_tokenizer_that_drops_merges_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """`dropout` of a BPE model is a property that its owner may set: it is not shared."""

    class Held:
        def __init__(self, model: Any) -> None:
            self.backend_tokenizer = Tokenizer(model)

    monkeypatch.setattr(shared_vocabulary, "_kept", type(shared_vocabulary._kept)())
    for model in (models.BPE({"a": 0}, [], dropout=0.1), models.WordLevel({"a": 0}, unk_token="a")):
        shared_vocabulary.share_vocabulary(Held(model))  # pyright: ignore[reportArgumentType]
    assert not shared_vocabulary._kept
    first, second = (Held(models.BPE({"a": 0}, [])) for _ in range(2))
    shared_vocabulary.share_vocabulary(first)  # pyright: ignore[reportArgumentType]
    first.backend_tokenizer.model.dropout = 0.5  # later, by whoever has it
    shared_vocabulary.share_vocabulary(second)  # pyright: ignore[reportArgumentType]
    assert second.backend_tokenizer.model.dropout is None
    for number in range(6):
        shared_vocabulary.share_vocabulary(Held(models.BPE({f"a{number}": 0}, [])))  # pyright: ignore[reportArgumentType]
    assert len(shared_vocabulary._kept) == shared_vocabulary.KEPT
