"""Texts rewritten and system turns put first, before rows become records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keel.config import DataConfig, parse
from keel.data.load import fingerprint, load
from keel.errors import DataError, UsageError
from keel.types import DataSource

SUMS = [
    {"question": "What is 2 + 3?", "answer": "It is 2+3=<<2+3=5>>5.\n#### 5"},
    {"question": "What is 4 + 3?", "answer": "Seven.\n#### 7"},
]
QUESTION = {"columns": {"prompt": "question"}}
BOTH = {"columns": {"prompt": "question", "completion": "answer"}}
TAGGED = {"completion": {"<<.*?>>": "", r"(?s)\A(.*)\n#### (.*)": r"<think>\1</think><answer>\2</answer>"}}
SYSTEM = {"role": "system", "content": "Be brief."}


def rows_of(path: Path, rows: list[dict[str, Any]], kind: Any = "prompt", **settings: Any) -> list[Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = DataConfig.model_validate({"source": str(path), **settings}).plain()
    return list(load([source], [kind], 0).records)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def test_prompts_are_put_into_a_form(path):
    rewrite = {"prompt": {r"\A": "Question: ", r"\Z": "\nAnswer:"}}
    first, second = rows_of(path, SUMS, **QUESTION, rewrite=rewrite)
    assert first.prompt == "Question: What is 2 + 3?\nAnswer:"
    assert second.columns["answer"] == SUMS[1]["answer"]  # only what is named is changed


def test_patterns_are_applied_one_after_the_other(path):
    first, second = rows_of(path, SUMS, "demonstration", **BOTH, rewrite=TAGGED)
    assert first.completion == "<think>It is 2+3=5.</think><answer>5</answer>"
    assert second.completion == "<think>Seven.</think><answer>7</answer>"  # where only one of them is found


def test_a_system_turn_makes_conversations_of_prompts(path):
    (record, _) = rows_of(path, SUMS, **QUESTION, system="Be brief.")
    assert record.prompt == (SYSTEM, {"role": "user", "content": SUMS[0]["question"]})


def test_a_system_turn_makes_conversations_of_replies(path):
    (record,) = rows_of(path, [{"prompt": "p", "completion": " c"}], "demonstration", system="Be brief.")
    assert record.prompt == (SYSTEM, {"role": "user", "content": "p"})
    assert record.completion == ({"role": "assistant", "content": " c"},)
    (pair,) = rows_of(
        path, [{"prompt": "p", "chosen": "c", "rejected": "r"}], "preference", system="Be brief."
    )
    assert (pair.chosen, pair.rejected) == tuple(({"role": "assistant", "content": x},) for x in "cr")


def test_a_system_turn_is_put_before_conversations(path):
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    (record,) = rows_of(path, [{"messages": turns}], "text", system="Be brief.")
    assert record.text == (SYSTEM, *turns)


@pytest.mark.parametrize(
    ("row", "kind", "settings", "reason"),
    [
        (
            {"prompt": "p"}, "prompt", {"rewrite": {"promt": {"a": "b"}}},
            r'rows.jsonl:1: .*"promt", which is not there; the row has prompt',
        ),
        ({"prompt": "p", "n": 3}, "prompt", {"rewrite": {"n": {"a": "b"}}}, '"n", which is not text'),
        (
            {"prompt": "p"}, "prompt", {"rewrite": {"prompt": {"z": "b"}}},
            "changes \"prompt\" in no row; the pattern is 'z'",
        ),
        ({"text": "t"}, "text", {"system": "s"}, "rows.jsonl:1: `system` has no effect on plain text"),
        (
            {"prompt": [SYSTEM, {"role": "user", "content": "u"}]}, "prompt", {"system": "s"},
            "has a system turn of its own",
        ),
        ({"prompt": "p"}, "prompt", {"rewrite": {"prompt": {"p": " "}}}, '"prompt" is only whitespace'),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said(path, row, kind, settings, reason):
    with pytest.raises(DataError, match=reason):
        rows_of(path, [row], kind, **settings)


def test_bad_rows_are_skipped_when_asked(path):
    rows = [{"prompt": [SYSTEM, {"role": "user", "content": "u"}]}, {"prompt": "p"}]
    (kept,) = rows_of(path, rows, system="Be brief.", on_bad="skip")
    assert kept.origin.endswith(":2")


@pytest.mark.parametrize(
    ("rewrite", "reason"),
    [
        ({"prompt": {"(": ""}}, r"data.0.rewrite: '\(' → '' is no substitution: missing \)"),
        ({"prompt": {"a": r"\1"}}, r"invalid group reference 1"),
        ({"prompt": {}}, "`prompt` has no pattern"),
    ],
)
def test_a_pattern_is_checked_with_the_config(rewrite, reason):
    data = {"source": "d.jsonl", "rewrite": rewrite}
    with pytest.raises(UsageError, match=reason):
        parse({"name": "x", "stages": {"s": {"kind": "sft", "model": "m", "data": data}}})


def test_both_are_part_of_the_fingerprint(path):
    path.write_text(json.dumps(SUMS[0]) + "\n")
    orders = [{"a": "b", "b": "c"}, {"b": "c", "a": "b"}]  # which give different texts
    settings = [
        {},
        {"system": "s"},
        {"system": "t"},
        *({"rewrite": {"prompt": patterns}} for patterns in orders),
    ]
    assert len({fingerprint([DataSource(str(path), **one)]) for one in settings}) == len(settings)
