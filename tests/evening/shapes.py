"""Raw files in the shapes people have, with texts of our own, and what is in them: written down beside the
file, not read from it by keel."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

ANIMALS = ("cat", "dog", "fox", "hen", "owl", "pig")
COLOURS = ("red", "blue", "green", "pink")
Turns = list[dict[str, Any]]
Text = str | Turns


@dataclass
class Raw:
    """A file, and what is in it."""

    path: Path
    rows: int  # in the file
    kind: str  # of stage that a person makes of it
    texts: list[Text] = field(default_factory=list)  # whole texts or conversations
    demonstrations: list[tuple[Text, str]] = field(default_factory=list)
    pairs: list[tuple[Text, str, str]] = field(default_factory=list)  # the better reply first
    labelled: list[tuple[str, str]] = field(default_factory=list)  # text and label
    left_out: int = 0  # rows that nothing can be learned from
    settings: dict[str, Any] = field(default_factory=dict)  # what a person writes at once
    fills: dict[str, str] = field(
        default_factory=dict
    )  # what only a person can know, where a hint asks for it
    corrections: int = 0  # that the messages must ask for


def user(text: str) -> Turns:
    return [{"role": "user", "content": text}]


def _asks() -> list[tuple[str, str, str]]:
    """Questions, good answers, bad answers."""
    return [
        (f"the {animal}, {colour}?", f"it is {colour}.", f"so the {animal} {animal}.")
        for animal in ANIMALS
        for colour in COLOURS[:2]
    ]


def _json(path: Path, rows: Any) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def _lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _csv(path: Path, head: list[str], rows: list[list[Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([head, *rows])
    return path


# ---------------------------------------------------------------- texts and demonstrations


def csv_of_labels(folder: Path) -> Raw:
    rows = [(f'the {a}, "{c}", is {c}.', ("good", "bad")[c == "blue"]) for a in ANIMALS for c in COLOURS[:2]]
    path = _csv(folder / "reviews.csv", ["text", "label"], [list(row) for row in rows])
    return Raw(path, len(rows), "classifier", labelled=rows, corrections=1)


def folder_of_texts(folder: Path) -> Raw:
    (folder / "books").mkdir()
    texts = [[f"the {animal} is red,\nso it is.", f"the {animal} is so."] for animal in ANIMALS]
    for number, parts in enumerate(texts):
        (folder / "books" / f"{number}.txt").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    paragraphs = [part for parts in texts for part in parts]  # each is a text of its own (docs/data.md)
    return Raw(folder / "books", len(paragraphs), "pretrain", texts=list(paragraphs))


def sharegpt(folder: Path) -> Raw:
    """Under a name of its own, as exports have it."""
    rows = [
        {"id": n, "dialogue": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
        for n, (q, a, _) in enumerate(_asks())
    ]
    talks = [(user(q), a) for q, a, _ in _asks()]
    return Raw(_json(folder / "sharegpt.json", rows), len(rows), "sft", demonstrations=talks, corrections=1)


def alpaca(folder: Path) -> Raw:
    """With an input in every other row, and a name that Alpaca has not."""
    rows, talks = list[dict[str, Any]](), list[tuple[Text, str]]()
    for number, (question, answer, _) in enumerate(_asks()):
        below = "" if number % 2 else f"the {ANIMALS[number % 6]} is pink."
        rows.append({"instruction": question, "input": below, "response": answer})
        talks.append((user(f"{question}\n\n{below}" if below else question), answer))
    path = _json(folder / "alpaca.json", rows)
    return Raw(path, len(rows), "sft", demonstrations=talks, corrections=1)


def openai_tools(folder: Path) -> Raw:
    """A call whose arguments are JSON in text, its result, and the reply that is learned."""
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    rows, talks = list[dict[str, Any]](), list[Text]()
    for number, (question, answer, _) in enumerate(_asks()):
        arguments = {"at": ANIMALS[number % 6]}
        call = {"id": f"c{number}", "type": "function"}
        called = {**call, "function": {"name": "look", "arguments": json.dumps(arguments)}}
        read = {**call, "function": {"name": "look", "arguments": arguments}}
        result = {"role": "tool", "tool_call_id": f"c{number}", "content": "red"}
        done = {"role": "assistant", "content": answer}

        def turns(one: Any, result: Any = result, done: Any = done, question: str = question) -> Turns:
            asks = {"role": "assistant", "content": None, "tool_calls": [one]}
            return [*user(question), asks, result, done]

        rows.append({"messages": turns(called), "tools": [tool], "parallel_tool_calls": False})
        talks.append([{"tools": [tool]}, *turns(read)])
    return Raw(_lines(folder / "tools.jsonl", rows), len(rows), "sft", texts=talks)


def odd_keys(folder: Path) -> Raw:
    """Keys that nobody else has; a byte order mark; rows that end in a carriage return."""
    rows = [{"Frage": q, "Antwort": a, "id": n, "note": None} for n, (q, a, _) in enumerate(_asks())]
    path = folder / "odd.jsonl"
    text = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    path.write_bytes(text.encode("utf-8-sig"))
    talks: list[tuple[Text, str]] = [(q, a) for q, a, _ in _asks()]
    fills = {"prompt: YOUR_COLUMN": "prompt: Frage", "completion: YOUR_COLUMN": "completion: Antwort"}
    return Raw(path, len(rows), "sft", demonstrations=talks, fills=fills, corrections=1)


def too_long(folder: Path) -> Raw:
    rows = [{"prompt": q, "completion": f" {a}"} for q, a, _ in _asks()]
    talks: list[tuple[Text, str]] = [(row["prompt"], row["completion"]) for row in rows]
    rows[3:3] = [
        {"prompt": "so " * 400, "completion": " it is."},
        {"prompt": "so", "completion": " is" * 400},
    ]
    path = _lines(folder / "long.jsonl", rows)
    return Raw(path, len(rows), "sft", demonstrations=talks, left_out=2, corrections=1)


def blank_completions(folder: Path) -> Raw:
    rows = [{"prompt": q, "completion": f" {a}"} for q, a, _ in _asks()]
    talks: list[tuple[Text, str]] = [(row["prompt"], row["completion"]) for row in rows]
    rows[5:5] = [{"prompt": "so?", "completion": ""}, {"prompt": "is it?", "completion": "  \n"}]
    path = _lines(folder / "blank.jsonl", rows)
    return Raw(path, len(rows), "sft", demonstrations=talks, left_out=2, corrections=1)


def semicolons(folder: Path) -> Raw:
    """A table as a spreadsheet writes it where the comma is the decimal sign, with other names."""
    path = folder / "sheet.csv"
    rows = [f'{n};"{q}";{a}' for n, (q, a, _) in enumerate(_asks())]
    path.write_text("\r\n".join(["nr;question;answer", *rows]) + "\r\n", encoding="utf-8-sig")
    talks: list[tuple[Text, str]] = [(q, a) for q, a, _ in _asks()]
    return Raw(path, len(rows), "sft", demonstrations=talks, corrections=1)


def wrapped_messages(folder: Path) -> Raw:
    """One object around the rows, whose turns are JSON in text."""
    talks: list[tuple[Text, str]] = [(user(q), a) for q, a, _ in _asks()]
    rows = [{"messages": json.dumps([*user(q), {"role": "assistant", "content": a}])} for q, a, _ in _asks()]
    path = _json(folder / "export.json", {"version": 3, "data": rows})
    return Raw(path, len(rows), "sft", demonstrations=talks)


# ---------------------------------------------------------------- comparisons


def hh(folder: Path) -> Raw:
    """Whole transcripts, which share their beginning."""
    rows, pairs = list[dict[str, Any]](), list[tuple[Text, str, str]]()
    for question, good, bad in _asks():
        start = f"\n\nHuman: so?\n\nAssistant: so.\n\nHuman: {question}\n\nAssistant:"
        rows.append({"chosen": f"{start} {good}", "rejected": f"{start} {bad}"})
        pairs.append((start, f" {good}", f" {bad}"))
    return Raw(_lines(folder / "hh.jsonl", rows), len(rows), "reward", pairs=pairs)


def pandalm(folder: Path) -> Raw:
    """Three votes a row, with ties; the votes in one column, under another name than the test set's."""
    rows, pairs, ties = list[dict[str, Any]](), list[tuple[Text, str, str]](), 0
    for number, (question, good, bad) in enumerate(_asks()):
        vote = (1, 2, 0)[number % 3]
        first, second = (good, bad) if vote != 2 else (bad, good)
        rows.append({"instruction": question, "response1": first, "response2": second, "human": vote})
        ties += vote == 0
        if vote:
            pairs.append((question, good, bad))
    fills = {"first_wins: [VALUE]": "first_wins: [1]", "second_wins: [VALUE]": "second_wins: [2]",
             "ties: []": "ties: [0]", "label: YOUR_COLUMN": "label: human"}  # fmt: skip
    path = _json(folder / "pandalm.json", rows)
    return Raw(path, len(rows), "reward", pairs=pairs, left_out=ties, fills=fills, corrections=1)


def ultrafeedback(folder: Path) -> Raw:
    """Four replies with ratings: each better one against each worse one."""
    rows, pairs = list[dict[str, Any]](), list[tuple[Text, str, str]]()
    for question, good, bad in _asks()[:6]:
        rated = [(good, 5), (f"{good} so it is.", 4), (bad, 2), ("so so.", 1)]
        completions = [
            {"model": "m", "response": text,
             "annotations": {aspect: {"Rating": str(rating), "Rationale": "so"}
                             for aspect in ("helpfulness", "honesty")}}
            for text, rating in rated
        ]  # fmt: skip
        rows.append({"source": "mine", "instruction": question, "completions": completions})
        pairs += [
            (user(question), better, worse)
            for n, (better, _) in enumerate(rated)
            for worse, _ in rated[n + 1 :]
        ]
    return Raw(_lines(folder / "ultra.jsonl", rows), len(rows), "reward", pairs=pairs)


def parquet(folder: Path) -> Raw:
    rows = _asks()
    columns = dict(zip(("prompt", "chosen", "rejected"), map(list, zip(*rows, strict=True)), strict=True))
    columns["chosen"] = [f" {text}" for text in columns["chosen"]]
    columns["rejected"] = [f" {text}" for text in columns["rejected"]]
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "pairs.parquet")
    pairs: list[tuple[Text, str, str]] = [(q, f" {g}", f" {b}") for q, g, b in rows]
    return Raw(folder / "pairs.parquet", len(rows), "dpo", pairs=pairs)


def label_studio(folder: Path) -> Raw:
    rows, pairs = list[dict[str, Any]](), list[tuple[Text, str, str]]()
    for number, (question, good, bad) in enumerate(_asks()):
        better = ("left", "right")[number % 2]
        replies = (good, bad) if better == "left" else (bad, good)
        result = {"type": "pairwise", "from_name": "p", "to_name": "a", "value": {"selected": better}}
        rows.append({
            "id": number, "data": {"prompt": question, "answer1": replies[0], "answer2": replies[1]},
            "annotations": [{"id": number, "completed_by": 1, "was_cancelled": False, "result": [result]}],
        })  # fmt: skip
        pairs.append((user(question), good, bad))
    return Raw(_json(folder / "studio.json", rows), len(rows), "reward", pairs=pairs)


def arena(folder: Path) -> Raw:
    """A table of votes with ties of both kinds, as CSV with conversations as JSON in its cells."""
    rows, pairs, ties = list[list[Any]](), list[tuple[Text, str, str]](), 0
    for number, (question, good, bad) in enumerate(_asks()):
        winner = ("model_a", "model_b", "tie", "tie (bothbad)")[number % 4]
        replies = (bad, good) if winner == "model_b" else (good, bad)
        talks = [json.dumps([*user(question), {"role": "assistant", "content": text}]) for text in replies]
        rows.append([f"q{number}", "m", "n", winner, "judge", *talks])
        if number % 4 < 2:
            pairs.append((user(question), good, bad))
        ties += number % 4 >= 2
    head = ["question_id", "model_a", "model_b", "winner", "judge", "conversation_a", "conversation_b"]
    return Raw(_csv(folder / "arena.csv", head, rows), len(rows), "dpo", pairs=pairs, left_out=ties)


SHAPES: dict[str, Callable[[Path], Raw]] = {
    make.__name__: make
    for make in (
        csv_of_labels, folder_of_texts, sharegpt, alpaca, openai_tools, odd_keys, too_long, blank_completions,
        semicolons, wrapped_messages,
        hh, pandalm, ultrafeedback, parquet, label_studio, arena,
    )
}  # fmt: skip
