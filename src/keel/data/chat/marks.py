"""Marks around turns that texts bring themselves, such as HH-RLHF's "\\n\\nHuman:"."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

from keel.types import Record, TextRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENOUGH = 200  # texts that are looked at
SHARE = 0.5  # of them that have the marks
# What stands before a user's turn, and before the assistant's.
_MARKS = (
    ("\n\nHuman:", "\n\nAssistant:"),
    ("<|im_start|>user", "<|im_start|>assistant"),
    ("<|start_header_id|>user", "<|start_header_id|>assistant"),
    ("<start_of_turn>user", "<start_of_turn>model"),
    ("<|user|>", "<|assistant|>"),
    ("[INST]", "[/INST]"),
    ("### Instruction:", "### Response:"),
    ("### Human:", "### Assistant:"),
    ("USER:", "ASSISTANT:"),
    ("\nUser:", "\nAssistant:"),
)


def marks_of(records: Iterable[Record]) -> tuple[str, str] | None:
    """The marks of user and assistant that most of the first texts have; None where they have none, or the
    rows are conversations, whose marks are the template's."""
    texts: list[str] = []
    for record in islice(records, ENOUGH):
        text = record.text if isinstance(record, TextRecord) else record.prompt
        if isinstance(text, str):
            texts.append(f"\n\n{text}")
    for asked, answered in _MARKS:
        if sum(asked in text and answered in text for text in texts) > SHARE * max(len(texts), 1):
            return asked, answered
    return None


def strange_to_template(tokenizer: PreTrainedTokenizerBase, marks: tuple[str, str]) -> bool:
    """Whether the tokenizer's chat template, or keel's in the place of none, writes turns otherwise."""
    template = str(tokenizer.chat_template or "")
    words = [re.split(r"(?<=>)", mark.strip().rstrip(":"))[0] for mark in marks]  # the role may be a variable
    return not all(word in template for word in words)


def template_for(marks: tuple[str, str]) -> str:
    """A chat template that writes these marks and ends replies with EOS, as texts with them do."""
    asked, answered = (_quoted(mark) for mark in marks)
    return (
        "{% for m in messages %}"
        f"{{% if m['role'] == 'assistant' %}}{{{{ {answered} + ' ' + m['content'] + eos_token }}}}"
        f"{{% else %}}{{{{ ({asked} + ' ' if m['role'] == 'user' else '') + m['content'] }}}}{{% endif %}}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {answered} }}}}{{% endif %}}"
    )


def _quoted(mark: str) -> str:
    return "'" + mark.replace("\n", "\\n") + "'"
