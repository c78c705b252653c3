"""What to do about rows without the columns that are wanted: an error that names the remedy.

A hint never guesses which of two replies is the better one. It follows names that say so themselves
(accepted and rejected, winner and loser), and else asks for the column that does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from keel.data import records
from keel.data.values import is_list, nearest
from keel.errors import DataError
from keel.types import RecordType

_ALIASES = {  # what other data sets call keel's columns
    "text": ("content", "body", "document", "story", "review", "sentence", "comment", "tweet", "post"),
    "prompt": ("question", "instruction", "query", "input", "problem", "document", "article"),
    "completion": ("answer", "response", "output", "reply", "solution", "summary", "highlights", "target"),
    "messages": ("conversations", "conversation", "dialog", "dialogue", "turns"),
}
_BELOW = ("input", "context", "passage", "background")  # what a question is about, beside the question
# Names of both sides that say which is the better one; each may have a word such as _response beside it.
_JUDGED = (
    ("chosen", "rejected"),
    ("accepted", "rejected"),
    ("preferred", "dispreferred"),
    ("preferred", "rejected"),
    ("better", "worse"),
    ("best", "worst"),
    ("winner", "loser"),
    ("winning", "losing"),
    ("positive", "negative"),
    ("good", "bad"),
)
_WORDS = ("", "response", "answer", "completion", "output", "reply", "text", "summary")
# Two replies side by side: names that differ in nothing but a mark at the end.
_MARKS = (("1", "2"), ("0", "1"), ("a", "b"), ("A", "B"), ("left", "right"))
_LABELS = re.compile(
    r"label|winner|better|best|prefer|choice|chosen|judg|verdict|vote|annotat|rating|score|rank|selected",
    re.I,
)


def unusable(origin: str, row: Mapping[str, Any], accept: Sequence[RecordType]) -> DataError:
    """What was found, what is wanted, what is missing and what to set."""
    readable = records.readable_as(row)
    form = f"{name_of(readable[0])} row" if readable else "row of no known type"
    wanted = " or ".join(
        f"{name_of(kind)} ({' or '.join(', '.join(group) for group in records.COLUMNS[kind])})"
        for kind in accept
    )
    message = f"{origin}: a {form} (columns: {', '.join(map(str, row)) or 'none'}); wanted: {wanted}"
    if inside := _only_objects(row):
        return DataError(f"{message}. {inside}")
    groups = [group for kind in accept for group in records.COLUMNS[kind]]
    sides = _judged_sides(row)
    guesses = [{name: _guess(name, row, sides) for name in group if name not in row} for group in groups]
    if {} in guesses:  # only unpaired rows have all columns of a type that they may not be used as
        return DataError(
            f"{message}. Rows with a `label` show bad completions too, which must not be imitated"
        )
    if "demonstration" in accept and (names := _with_something_below(row)):
        given = ", ".join(f"{name}: {theirs}" for name, theirs in names.items() if name != theirs)
        return DataError(
            f"{message}. What is asked stands in two columns, {names['instruction']} and {names['input']}: "
            f"`columns: {{{given}}}` reads both, as Alpaca's"
        )
    if "text" in accept and (said := _turns(row)):
        return DataError(f"{message}. {said}")
    closest = min(guesses, key=lambda guess: list(guess.values()).count(None))
    if "chosen" in closest and not sides and (replies := _replies(row)):
        return DataError(f"{message}. {_by_label(row, replies)}")
    if "chosen" in closest and (scored := _scored(row)):
        return DataError(
            f"{message}. Replies with a score become pairs, where neighbouring rows have one prompt: "
            f"`format: helpsteer` with `columns: {{{scored}}}`"
        )
    texts = [name for name, value in row.items() if isinstance(value, str)]
    ways = [guess for guess in guesses if len(guess) <= len(texts) and "messages" not in guess]
    if (
        not readable and len(ways) > 1 and not any(closest.values())
    ):  # nothing says which of the types is meant
        return DataError(f"{message}. Rename with {' or '.join(map(_renames, ways))}")
    return DataError(f"{message}; missing: {', '.join(closest)}. Rename with {_renames(closest)}")


def _only_objects(row: Mapping[str, Any]) -> str:
    """What to do with a row that has text in objects alone; "" for any other."""
    objects = [(str(name), value) for name, value in row.items() if isinstance(value, Mapping)]
    if not objects or any(isinstance(value, str) or is_list(value) for value in row.values()):
        return ""
    inner = "; ".join(f"{name} has {', '.join(map(str, value)) or 'nothing'}" for name, value in objects)
    return f"What is in objects is not read ({inner}): write it as columns of the row"


def _renames(guess: Mapping[str, str | None]) -> str:
    """The setting that renames columns to these names."""
    renames = ", ".join(f"{name}: {theirs or 'YOUR_COLUMN'}" for name, theirs in guess.items())
    return f"`columns: {{{renames}}}`"


def _with_something_below(row: Mapping[str, Any]) -> dict[str, str] | None:
    """The columns of an instruction, of what it is about, and of the reply, by Alpaca's names: renamed to a
    prompt and a completion, such a row would lose the second."""
    lowered = {str(key).lower(): str(key) for key, value in row.items() if isinstance(value, str)}
    below = next((lowered[name] for name in _BELOW if name in lowered), None)
    asked = next(
        (lowered[n] for n in ("prompt", *_ALIASES["prompt"]) if lowered.get(n, below) != below), None
    )
    reply = next((lowered[n] for n in ("completion", *_ALIASES["completion"]) if n in lowered), None)
    if below is None or asked is None or reply is None:
        return None
    return {"instruction": asked, "input": below, "output": reply}


def _scored(row: Mapping[str, Any]) -> str:
    """The columns of one reply and its number, as HelpSteer calls them; "" where there are none."""
    wanted: dict[str, str | None] = {"prompt": _guess("prompt", row, None), "response": None}
    if "prompt" in row:
        wanted["prompt"] = "prompt"
    replies = [name for name in ("completion", *_ALIASES["completion"]) if isinstance(row.get(name), str)]
    wanted["response"] = next(iter(replies), None)
    numbers = [str(name) for name, value in row.items() if isinstance(value, int | float)]
    wanted["helpfulness"] = next((name for name in numbers if _LABELS.search(name)), None)
    if None in wanted.values():
        return ""
    return ", ".join(f"{name}: {theirs}" for name, theirs in wanted.items() if name != theirs)


def _turns(row: Mapping[str, Any]) -> str:
    """What to do with a column of turns that is not called messages; "" where there is none."""
    for name, value in row.items():
        if not (is_list(value) and value and all(isinstance(turn, Mapping) for turn in value)):
            continue
        keys, roles = list(map(str, value[0])), {str(turn.get("role")) for turn in value}
        if {"from", "value"} <= set(keys):
            return f"Turns with `from` and `value` are ShareGPT's: `columns: {{conversations: {name}}}`"
        if {"role", "content"} <= set(keys) and roles & {"human", "gpt"}:
            return f"Turns by human and gpt: `format: sharegpt` with `columns: {{conversations: {name}}}`"
        if not {"role", "content"} <= set(keys):
            return (
                "Turns are read from `messages` with `role` and `content`, or `conversations` with `from` "
                f"and `value`; those in {name} have {', '.join(keys)}: write them so"
            )
    return ""


def turned_round(origin: str, columns: Mapping[str, str], row: Mapping[str, Any]) -> DataError | None:
    """The error of a row that lacks a column of keel's, since the user's renaming has taken it away; None
    where that is not so."""
    ours = {name for groups in records.COLUMNS.values() for group in groups for name in group}
    taken = {
        name: theirs
        for name, theirs in columns.items()
        if theirs in ours and name not in ours and name in row
    }
    if not taken:
        return None
    given = ", ".join(f"{name}: {theirs}" for name, theirs in taken.items())
    rest = ", ".join(f"{name}: {theirs}" for name, theirs in columns.items() if name not in taken)
    way = f"write `columns: {{{rest}}}`" if rest else "write `columns: {}`"
    return DataError(
        f"{origin}: `columns` has keel's name first and the file's behind it: {{{given}}} takes away "
        f"{', '.join(taken.values())}, which the file has already; {way}"
    )


def or_skip(error: DataError) -> DataError:
    """A bad row's error, with the way on that there is for single rows."""
    return DataError(f"{error}; mend the row, or leave such rows out: on_bad: skip")


def name_of(kind: RecordType) -> str:
    """The type in a word or two."""
    return records.describe(kind, False).partition(",")[0]


def _by_label(row: Mapping[str, Any], replies: tuple[str, str]) -> str:
    """Two replies whose names do not say which is better: the column that does must be told."""
    labels = [
        str(name)
        for name, value in row.items()
        if name not in replies and _LABELS.search(str(name)) and (not _is_reply(value) or value in [*row])
    ]
    label = labels[0] if len(labels) == 1 else "YOUR_COLUMN"
    found = f" (here perhaps {' or '.join(labels)})" if labels else ""
    first, second = replies
    setting = (
        f"`pairs: {{first: {first}, second: {second}, label: {label}, "
        "first_wins: [VALUE], second_wins: [VALUE], ties: []}`"
    )
    if "prompt" not in row:
        setting += f", and `columns: {{prompt: {_guess('prompt', row, None) or 'YOUR_COLUMN'}}}`"
    return f"Which of {first} and {second} is better must come from a column{found}: set {setting}"


def _judged_sides(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """The columns of the better and the worse reply, where both names say so and both hold replies."""
    lowered = {re.sub(r"[\s-]", "_", str(name).lower()): str(name) for name in row}
    for better, worse in _JUDGED:
        for word in _WORDS:
            forms = (
                [(better, worse)]
                if not word
                else [(f"{better}_{word}", f"{worse}_{word}"), (f"{word}_{better}", f"{word}_{worse}")]
            )
            for names in forms:
                if all(name in lowered and _is_reply(row[lowered[name]]) for name in names):
                    return lowered[names[0]], lowered[names[1]]
    return None


def _replies(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """Two columns that hold replies, of one name but for a mark at the end."""
    for first, second in _MARKS:
        for name in map(str, row):
            other = f"{name[: -len(first)]}{second}" if name.endswith(first) else ""
            if other in row and _is_reply(row[name]) and _is_reply(row[other]):
                return name, other
    return None


def _is_reply(value: object) -> bool:
    """Whether a value can be a reply: turns, or text that is no number and no name of a side."""
    if is_list(value):
        return True
    return isinstance(value, str) and not re.fullmatch(
        r"(model_)?[a-bA-B]|[-+]?[\d.]+|tie|left|right", value.strip()
    )


def _guess(name: str, row: Mapping[str, Any], sides: tuple[str, str] | None) -> str | None:
    """The column of the row that is probably meant by keel's `name`."""
    if name == "messages":
        row = {key: value for key, value in row.items() if is_list(value)}
    if name in ("chosen", "rejected"):
        return sides[name == "rejected"] if sides else nearest(name, row, 0.85)
    usable = [key for key, value in row.items() if key not in _ALIASES and not isinstance(value, Mapping)]
    lowered = {str(key).lower(): str(key) for key in usable}
    alias = next((lowered[alias] for alias in _ALIASES.get(name, ()) if alias in lowered), None)
    close = nearest(name, lowered)
    return alias or (lowered[close] if close else None)
