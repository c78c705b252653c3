"""Columns and keys that nothing reads: said once with their number, or refused with `strict`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keel.data.load import load, summary
from keel.errors import DataError
from keel.types import DataSource

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
ASK, SAY = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}
# everything that keel knows of a row and of its turns
KNOWN = [
    ("preference", {**PAIR, "votes": {"chosen": 1}, "p_chosen": 1.0, "margin": 0.5, "group": 3}),
    ("demonstration", {**PAIR, "votes": {"chosen": 1}}),  # its chosen side
    ("unpaired", {"prompt": "p", "completion": "a", "label": True}),
    ("prompt", {"prompt": "p", "answer": "for a reward", "anything": 1}),
    (
        "text",
        {
            "tools": [{"type": "function", "function": {"name": "add"}}],
            "chat_template_kwargs": {"enable_thinking": False},
            "images": [],
            "messages": [
                {"role": "developer", "content": "be brief"},
                {**ASK, "name": "Ann"},
                {
                    "role": "assistant",
                    "content": None,
                    "reasoning_content": "hm",
                    "tool_calls": [{"function": {"name": "add", "arguments": {}}}],
                },
                {"role": "tool", "content": "4", "tool_call_id": "c"},
                {**SAY, "weight": 0, "thinking": "hm"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {**SAY, "train": False, "reasoning": "hm"},
            ],
        },
    ),
]


def read(tmp_path: Path, rows: list[dict[str, Any]], kind: Any, **settings: Any) -> Any:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load([DataSource(str(path), **settings)], [kind], 0)


@pytest.mark.parametrize(("kind", "row"), KNOWN)
def test_what_is_known_passes_strict(kind: str, row: dict[str, Any], tmp_path: Path) -> None:
    dataset = read(tmp_path, [row], kind, strict=True)
    assert len(dataset.records) == 1
    assert "does not" not in summary(read(tmp_path, [row], kind))


def test_unknown_columns_are_counted_and_said_or_refused(tmp_path: Path) -> None:
    rows = [PAIR, {**PAIR, "id": 1, "chosn": "x"}, {**PAIR, "id": 2}]
    said = summary(read(tmp_path, rows, "preference"))
    assert 'columns that training does not read: "chosn" in 1, "id" in 2 rows' in said
    with pytest.raises(DataError) as caught:
        read(tmp_path, [PAIR, {**PAIR, "chosn": "x"}], "preference", strict=True)
    assert str(caught.value) == (
        f'{tmp_path}/rows.jsonl:2: the row has the column "chosn", which keel does not know (did you mean '
        '"chosen"?); `strict` refuses it. Name it in `columns` ({chosn: chosn}) if it is wanted; '
        "mend the row, or leave such rows out: on_bad: skip"
    )
    named = read(tmp_path, rows[:1] + rows[2:], "preference", strict=True, on_bad="skip", columns={})
    assert (len(named.records), named.skipped) == (1, 1)
    wanted = [{**PAIR, "id": n} for n in range(2)]
    assert len(read(tmp_path, wanted, "preference", strict=True, columns={"id": "id"}).records) == 2


def test_many_columns_are_not_all_named(tmp_path: Path) -> None:
    row = {**PAIR, **{f"c{n}": 1 for n in range(8)}}
    assert '"c4" in 1, 3 others rows' in summary(read(tmp_path, [row], "preference"))


def test_unknown_keys_of_turns_are_counted_and_said_or_refused(tmp_path: Path) -> None:
    rows = [{"messages": [ASK, SAY]}, {"messages": [ASK, {**SAY, "wieght": 0}]}]
    said = summary(read(tmp_path, rows, "text"))
    assert 'keys that keel does not know, which the chat template is given: "wieght" in 1 turns' in said
    with pytest.raises(DataError) as caught:
        read(tmp_path, rows, "text", strict=True)
    assert str(caught.value) == (
        f'{tmp_path}/rows.jsonl:2: a turn has the key "wieght", which keel does not know (did you mean '
        '"weight"?); `strict` refuses it; mend the row, or leave such rows out: on_bad: skip'
    )


def test_a_worlds_columns_are_its_own() -> None:
    source = DataSource("world:helpdesk/comparisons", rows=4, strict=True)
    assert "does not read" not in summary(load([source], ["preference"], 0))
