"""Items as anyone writes them: a prompt and two replies a row, in columns of the usual names; and keel's own
shape, an item a line with everything that is known of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from keel.feedback.formats.base import (
    Invalid,
    Labels,
    Row,
    answer_json,
    answer_of,
    item_json,
    item_of,
    name_of_item,
    text_or_turns,
    vote_json,
    vote_of,
)
from keel.votes.kinds import NewItem, PastJudgement, Reply, Task

PROMPTS = ("prompt", "instruction", "question", "input", "context")
PAIRS = (
    ("a", "b"), ("reply_a", "reply_b"), ("response_a", "response_b"), ("completion_a", "completion_b"),
    ("answer_a", "answer_b"), ("output_a", "output_b"), ("response_1", "response_2"), ("answer1", "answer2"),
    ("response1", "response2"), ("output_1", "output_2"), ("first", "second"),
)  # fmt: skip
SOURCES = (("source_a", "source_b"), ("model_a", "model_b"), ("model_1", "model_2"))
SINGLE = ("reply", "response", "completion", "output", "answer")


def is_own(row: Row) -> bool:
    """Whether a row is an item as keel writes one."""
    replies = row.get("replies")
    return (
        "key" in row
        and isinstance(replies, list)
        and all(isinstance(reply, dict) and "content" in reply for reply in replies)
    )


def read_own(row: Row) -> tuple[NewItem, list[PastJudgement], tuple[str, Any, str] | None]:
    """An item, its votes and a reviewer's word."""
    values = {name: value for name, value in row.items() if value is not None}
    item = item_of(values)
    votes = [vote_of(_full(vote), item.key) for vote in values.get("votes") or ()]
    word = values.get("adjudicated")
    if word is None:
        return item, votes, None
    word = _full(word)
    return item, votes, (str(word.pop("person")), answer_of_word(word), str(word.get("note", "")))


def answer_of_word(word: dict[str, Any]) -> Any:
    """The answer of a reviewer's word as a row has it."""
    return answer_of({name: value for name, value in word.items() if name != "note"})


def write_own(labels: Labels) -> Iterator[dict[str, Any]]:
    """An item a row, with its task, its votes and a reviewer's word."""
    votes_of = labels.votes_of()
    for item in labels.items:
        row = {"task": labels.task, **item_json(item)}
        row["votes"] = [vote_json(vote) for vote in votes_of.get(item.key, ())]
        if item.key in labels.adjudicated:
            who, answer, note = labels.adjudicated[item.key]
            row["adjudicated"] = {"person": who, "note": note, **answer_json(answer)}
        yield row


def reads(row: Row) -> bool:
    """Whether a row has a prompt and replies under usual names."""
    return _prompt(row) is not None and _replies(row) is not None


def read(row: Row) -> tuple[Task, NewItem]:
    """An item nobody has judged, and the task that its replies suggest."""
    prompt_name, found = _prompt(row), _replies(row)
    if prompt_name is None or found is None:
        raise Invalid(
            f"there are no replies to judge: it has {', '.join(map(str, row))}; a pair is written as "
            '{"prompt", "a", "b"}'
        )
    names, contents, sources = found
    prompt = text_or_turns(row[prompt_name], prompt_name)
    texts = [text_or_turns(value, name) for name, value in zip(names, contents, strict=True)]
    used = {prompt_name, *names, "key", "id", "source", "model", "sources", "models"}
    used |= {name for pair in SOURCES for name in pair}
    item = NewItem(
        key=name_of_item(row, prompt, texts),
        prompt=prompt,
        replies=[Reply(text, source) for text, source in zip(texts, sources, strict=True)],
        columns={name: value for name, value in row.items() if name not in used and value is not None},
    )
    task: Task = "pairwise" if len(texts) == 2 else "ranking" if len(texts) > 2 else "rating"
    return task, item


def _prompt(row: Row) -> str | None:
    return next((name for name in PROMPTS if name in row), None)


def _replies(row: Row) -> tuple[Sequence[str], list[Any], list[str | None]] | None:
    """(columns, replies, where they come from)."""
    for first, second in PAIRS:
        if first in row and second in row:
            sources = next(([row[x], row[y]] for x, y in SOURCES if x in row and y in row), [None, None])
            return (first, second), [row[first], row[second]], [s and str(s) for s in sources]
    for name in ("replies", "completions", "responses", "answers", "outputs"):
        value = row.get(name)
        if isinstance(value, list) and value:
            if all(isinstance(one, dict) and "content" in one and "role" not in one for one in value):
                return (
                    (name,) * len(value),
                    [one["content"] for one in value],
                    [o.get("source") for o in value],
                )
            return (name,) * len(value), list(value), _sources_of(row, len(value))
    for name in SINGLE:
        if name in row:
            source = row.get("source", row.get("model"))
            return (name,), [row[name]], [None if source is None else str(source)]
    return None


def _sources_of(row: Row, count: int) -> list[str | None]:
    for name in ("sources", "models"):
        value = row.get(name)
        if isinstance(value, list) and len(value) == count:
            return [None if source is None else str(source) for source in value]
    return [None] * count


def _full(values: Row) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
