"""Hints about rows that lack columns: what is said can be followed, and the better side is never guessed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from keel.data.load import load
from keel.errors import DataError
from keel.types import DataSource


def read(tmp_path: Path, *rows: dict[str, Any], **settings: Any) -> Any:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load([DataSource(str(path), **settings)], ["preference"], 0)


def hint(tmp_path: Path, row: dict[str, Any], **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(tmp_path, row, **settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("sides", "label"),
    [
        (("response1", "response2"), {"winner": 2}),
        (("response_a", "response_b"), {"preferred": "B"}),
        (("response_0", "response_1"), {"better_response": 1}),
        (("answer_A", "answer_B"), {"choice": "answer_B"}),
        (("completion_left", "completion_right"), {"selected": "right"}),
        (("output_1", "output_2"), {"human_rating": -1}),
    ],
)
def test_two_replies_and_a_label_are_mapped_by_the_label_alone(sides, label, tmp_path):
    first, second = sides
    ((name, value),) = label.items()
    row = {"question": "ask", first: "a reply", second: "another reply", **label}
    said = hint(tmp_path, row)
    assert "columns: {chosen" not in said
    assert f"Which of {first} and {second} is better must come from a column (here perhaps {name})" in said
    assert f"`pairs: {{first: {first}, second: {second}, label: {name}, " in said
    assert "`columns: {prompt: question}`" in said
    # what it says can be done: with the values of the label filled in, the label decides
    pairs = {"first": first, "second": second, "label": name, "first_wins": ["?"], "second_wins": [value]}
    (record,) = read(tmp_path, row, pairs=pairs, columns={"prompt": "question"}).records
    assert record.chosen == "another reply"


def test_two_replies_without_a_label(tmp_path):
    said = hint(tmp_path, {"prompt": "ask", "response1": "a reply", "response2": "another"})
    assert "Which of response1 and response2 is better must come from a column: set" in said
    assert "label: YOUR_COLUMN" in said


@pytest.mark.parametrize(
    "names",
    [
        ("accepted", "rejected"), ("winner", "loser"), ("preferred", "dispreferred"), ("better", "worse"),
        ("chosen_response", "rejected_response"), ("response_chosen", "response_rejected"),
        ("Winning Answer", "Losing Answer"), ("choosen", "rejected"),
    ],
)  # fmt: skip
def test_names_that_say_themselves_which_is_better_are_followed(names, tmp_path):
    row = {"prompt": "ask", names[0]: "good reply", names[1]: "bad reply"}
    said = hint(tmp_path, row)
    found = dict(re.findall(r"(\w+): ([\w ]+)", re.search(r"`columns: {(.*)}`", said)[1]))
    assert found == {
        k: v for k, v in zip(("chosen", "rejected"), names, strict=True) if v not in ("rejected",)
    }
    (record,) = read(tmp_path, row, columns=found).records
    assert (record.chosen, record.rejected) == ("good reply", "bad reply")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "choice": "a reply", "reject": "x"},  # like chosen and rejected, and is neither
        {"prompt": "p", "winner": "model_a", "loser": "model_b"},  # which side, not a reply
        {"prompt": "p", "better": 1, "worse": 2},
        {"prompt": "p", "preferred": "A", "a": "one reply", "b": "another reply"},
        {"prompt": "p", "accepted": "one reply"},
    ],
)
def test_a_name_alone_is_not_enough(row, tmp_path):
    assert "chosen: YOUR_COLUMN" in (said := hint(tmp_path, row)) or "must come from a column" in said


def test_a_row_that_lacks_a_side_is_not_told_to_take_the_label(tmp_path):
    good = {"prompt": "p", "chosen": "a", "rejected": "b", "choice": "a"}
    with pytest.raises(
        DataError, match=r'rows.jsonl:2: "chosen" is missing; the row has prompt, rejected, choice; mend'
    ):
        read(tmp_path, good, {"prompt": "p", "rejected": "b", "choice": "a"})


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"instruction": "add", "input": "1+1", "response": "2"}, {"output": "response"}),
        (
            {"instruction": "add", "context": "1+1", "response": "2"},
            {"input": "context", "output": "response"},
        ),
        (
            {"question": "who?", "context": "he.", "answer": "he"},
            {"instruction": "question", "input": "context", "output": "answer"},
        ),
        (
            {"prompt": "who?", "passage": "he.", "output": "he"},
            {"instruction": "prompt", "input": "passage"},
        ),
    ],
)
def test_what_is_asked_in_two_columns_is_kept_whole(row, columns, tmp_path):
    """Renamed to a prompt and a completion, the rows would lose the second column."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    given = ", ".join(f"{name}: {theirs}" for name, theirs in columns.items())
    with pytest.raises(DataError, match=re.escape(f"`columns: {{{given}}}`")):
        load([DataSource(str(path))], ("demonstration", "text"), 0)
    (record,) = load([DataSource(str(path), columns=columns)], ("demonstration", "text"), 0).records
    texts = [turn["content"] for turn in (*record.prompt, *record.completion)]
    assert texts == ["\n\n".join(list(row.values())[:2]), list(row.values())[2]]


@pytest.mark.parametrize(
    ("turns", "settings"),
    [
        ([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}], {}),
        ([{"role": "human", "content": "hi"}, {"role": "gpt", "content": "yes"}], {"format": "sharegpt"}),
    ],
)
def test_turns_under_another_name_are_read_after_one_correction(turns, settings, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"dialog": turns}) + "\n")
    with pytest.raises(DataError, match=r"`columns: \{conversations: dialog\}`") as refused:
        load([DataSource(str(path))], ("demonstration", "text"), 0)
    assert all(f"{name}: {value}" in str(refused.value) for name, value in settings.items())
    source = DataSource(str(path), columns={"conversations": "dialog"}, **settings)
    (record,) = load([source], ("demonstration", "text"), 0).records
    assert [(turn["role"], turn["content"]) for turn in record.text] == [("user", "hi"), ("assistant", "yes")]


def test_turns_of_no_known_form_are_not_to_be_renamed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"dialog": [{"speaker": "a", "text": "hi"}]}) + "\n")
    with pytest.raises(DataError, match="those in dialog have speaker, text: write them so"):
        load([DataSource(str(path))], ("text",), 0)


def test_replies_with_a_score_are_paired_by_their_number(tmp_path):
    rows = [{"question": "q", "response": f"r{i}", "rating": i} for i in range(2)]
    assert "`format: helpsteer` with `columns: {prompt: question, helpfulness: rating}`" in hint(
        tmp_path, rows[0]
    )
    settings = {"format": "helpsteer", "columns": {"prompt": "question", "helpfulness": "rating"}}
    (record,) = read(tmp_path, *rows, **settings).records
    assert (record.chosen[0]["content"], record.rejected[0]["content"]) == ("r1", "r0")


def test_columns_that_nobody_else_has_are_left_to_the_user_in_every_form(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"Frage": "ask", "Antwort": "a reply"}) + "\n")
    ways = "`columns: {prompt: YOUR_COLUMN, completion: YOUR_COLUMN}` or `columns: {text: YOUR_COLUMN}`"
    with pytest.raises(DataError, match=re.escape(f"Rename with {ways}")):
        load([DataSource(str(path))], ("demonstration", "text"), 0)


def test_a_renaming_the_wrong_way_round_is_told_so(tmp_path):
    """Its hint was to rename the column that the renaming itself had made."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "ask", "answer": "a reply"}) + "\n")
    columns = {"question": "prompt", "completion": "answer"}
    with pytest.raises(DataError, match=r"takes away prompt, .*; write `columns: \{completion: answer\}`"):
        load([DataSource(str(path), columns=columns)], ("demonstration",), 0)
    load([DataSource(str(path), columns={"completion": "answer"})], ("demonstration",), 0)


def test_text_in_objects_alone_is_no_column_to_rename(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"conversation": {"user": "a", "bot": "b"}, "id": 1}) + "\n")
    with pytest.raises(
        DataError, match=r"not read \(conversation has user, bot\): write it as columns"
    ) as said:
        load([DataSource(str(path))], ("demonstration", "text"), 0)
    assert "Rename" not in str(said.value)
