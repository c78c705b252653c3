"""Texts that bring turn marks of their own: found, and given a template that writes the same tokens."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from keel.data import chat
from keel.data.chat.marks import _MARKS
from keel.types import DemonstrationRecord, PromptRecord, Record, TextRecord

_SPEC = importlib.util.spec_from_file_location(
    "tokenizers_for_tests", Path(__file__).with_name("tokenizers_for_tests.py")
)
assert _SPEC is not None
assert _SPEC.loader is not None
_TOKENIZERS = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_TOKENIZERS)
make_tokenizer = _TOKENIZERS.make_tokenizer
HH = ("\n\nHuman:", "\n\nAssistant:")


def prompts(*texts: Any) -> list[Record]:
    return [PromptRecord(text) for text in texts]


@pytest.mark.parametrize("marks", _MARKS, ids=lambda marks: marks[1].strip())
def test_marks_are_found_and_their_template_writes_what_the_texts_write(marks: tuple[str, str]) -> None:
    asked, answered = marks
    text = f"{asked} one{answered} two"
    assert chat.marks_of(prompts(f"{asked} hi{answered}", f"{asked} ho{answered}", "odd")) == marks
    assert chat.marks_of([TextRecord(text)]) == marks
    tokenizer = make_tokenizer("bytes", chat.template_for(marks))
    turns = ({"role": "user", "content": "hi"},)
    assert chat.prompt_ids(tokenizer, turns) == tokenizer(f"{asked} hi{answered}")["input_ids"]
    assert not chat.strange_to_template(tokenizer, marks)
    reply = chat.completion_ids(tokenizer, turns, ({"role": "assistant", "content": "yes"},))
    assert tokenizer.decode(reply) == " yes<eos>"


@pytest.mark.parametrize(
    "records",
    [
        prompts("hi", "ho"),
        prompts("\n\nHuman: hi\n\nAssistant:", "hi", "ho"),  # not most
        prompts("the Human: said"),
        prompts(({"role": "user", "content": "\n\nHuman: a\n\nAssistant:"},)),  # the template's are around it
        [DemonstrationRecord("Question: hi", " yes")],
        [],
    ],
)
def test_other_rows_have_none(records: list[Record]) -> None:
    assert chat.marks_of(records) is None


def test_a_template_that_writes_the_marks_is_no_stranger() -> None:
    chatml = make_tokenizer("bytes", "{% for m in messages %}{{ '<|im_start|>' + m['role'] }}{% endfor %}")
    assert chat.strange_to_template(chatml, HH)
    assert not chat.strange_to_template(chatml, ("<|im_start|>user", "<|im_start|>assistant"))
    assert chat.strange_to_template(make_tokenizer("bytes"), HH)
