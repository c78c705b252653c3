"""A folder of Potato's: its data files, and what each person answered, in `user_state.json` or, from older
versions, `annotated_instances.jsonl`.

    pairwise  the text of an item is a list of two; selection A, B or tie, or a slider from the first (below
              0) to the second
    likert    one scale a scheme; radio and others are left out

Source: github.com/davidjurgens/potato, potato/server_utils/schemas/pairwise.py and docs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from keel.data import files
from keel.data.values import is_list, shown
from keel.errors import DataError, UsageError
from keel.feedback.formats.base import Invalid, Labels, answer_of, text_or_turns
from keel.votes.kinds import NewItem, PastJudgement, Reply, Task

STATE, LINES = "user_state.json", "annotated_instances.jsonl"


def is_folder(path: Path) -> bool:
    return path.is_dir() and (next(path.rglob(STATE), None) or next(path.rglob(LINES), None)) is not None


def read(path: Path) -> Labels:
    """Items and votes of a project's folder. UsageError where its data files are not found."""
    settings = _settings(path)
    properties = settings.get("item_properties") or {}
    id_key, text_key = properties.get("id_key", "id"), properties.get("text_key", "text")
    items = {
        str(row[id_key]): _item(row, id_key, text_key, where) for where, row in _rows(path, settings, id_key)
    }
    tasks: set[Task] = {"pairwise" if len(item.replies) == 2 else "rating" for item in items.values()}
    if len(tasks) != 1:
        raise DataError(f"{path}: some items are pairs and some are not; split them into two projects")
    task, votes, unknown = next(iter(tasks)), list[PastJudgement](), 0
    for person, key, answers, seconds in _answers(path):
        if key not in items:
            unknown += 1
            continue
        try:
            values = _said(answers, task)
        except Invalid as error:
            raise DataError(f"{path}: {person}, item {key}: {error}") from None
        if values:
            order = tuple(range(len(items[key].replies)))  # Potato shows them as they stand
            votes.append(PastJudgement(key, person, answer_of(values), None, seconds, order))
    notes = (f"{unknown} answers to items that are in no data file are left out",) if unknown else ()
    return Labels(task, list(items.values()), votes, notes)


def _settings(path: Path) -> dict[str, Any]:
    for file in sorted([*path.rglob("*.yaml"), *path.rglob("*.yml"), *path.rglob("config*.json")]):
        try:
            found = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue
        if isinstance(found, dict) and "data_files" in found:
            return {**found, "_folder": file.parent}
    raise UsageError(f"{path} holds answers of Potato's, but no config with `data_files`: copy it there")


def _rows(path: Path, settings: Mapping[str, Any], id_key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for entry in settings["data_files"]:
        name = entry.get("path") if isinstance(entry, Mapping) else entry
        places = [settings["_folder"] / str(name), path / str(name), path / Path(str(name)).name]
        place = next((one for one in places if one.is_file()), None)
        if place is None:
            raise UsageError(f"{path}: the data file {name} of its config is not there")
        for origin, row in files.read(place, str(place)):
            if isinstance(row, DataError):
                raise row
            if id_key not in row:
                raise DataError(f'{origin}: "{id_key}" is missing')
            yield origin, row


def _item(row: Mapping[str, Any], id_key: str, text_key: str, where: str) -> NewItem:
    try:
        value = row[text_key]
        texts = list(value) if is_list(value) else [value]
        replies = [Reply(text_or_turns(text, text_key)) for text in texts]
        asks = next((name for name in ("prompt", "question", "instruction", "context") if name in row), None)
        prompt = text_or_turns(row[asks], asks) if asks else f"{row[id_key]}"
    except (Invalid, KeyError) as error:
        raise DataError(f"{where}: {error}") from None
    used = {id_key, text_key, asks}
    return NewItem(str(row[id_key]), prompt, replies, {k: v for k, v in row.items() if k not in used})


def _answers(path: Path) -> Iterator[tuple[str, str, dict[str, dict[str, Any]], float | None]]:
    """(person, item, scheme → label → value, seconds)."""
    states = sorted(path.rglob(STATE))
    for file in states:
        state = json.loads(file.read_text(encoding="utf-8"))
        person = str(state.get("user_id") or file.parent.name)
        for key, labels in (state.get("instance_id_to_label_to_value") or {}).items():
            yield person, str(key), _by_scheme(labels), None
    if states:
        return
    for file in sorted(path.rglob(LINES)):
        for line in file.read_text(encoding="utf-8").split("\n"):
            if line.strip():
                row = json.loads(line)
                key = str(row.get("instance_id", row.get("id")))
                person = str(row.get("user_id") or file.parent.name)
                yield person, key, dict(row.get("label_annotations") or {}), None


def _by_scheme(labels: Any) -> dict[str, dict[str, Any]]:
    """Both forms: {scheme: {label: value}}, and [[{"schema", "name"}, value], …]."""
    if isinstance(labels, Mapping):
        return {str(k): dict(v) if isinstance(v, Mapping) else {str(k): v} for k, v in labels.items()}
    found: dict[str, dict[str, Any]] = {}
    for entry, value in labels if is_list(labels) else ():
        found.setdefault(str(entry["schema"]), {})[str(entry["name"])] = value
    return found


def _said(answers: Mapping[str, Mapping[str, Any]], task: Task) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for scheme, labels in answers.items():
        if task == "pairwise":
            values |= _side(labels)
        else:
            number = _number(labels)
            if number is not None:
                values.setdefault("ratings", {})[scheme] = number
        if (text := labels.get("text_box")) and isinstance(text, str):
            values["comment"] = text
    return values if set(values) - {"comment"} else {}


def _side(labels: Mapping[str, Any]) -> dict[str, Any]:
    if "selection" in labels:
        choice = {"a": "a", "b": "b", "tie": "tie"}.get(str(labels["selection"]).lower())
        if choice is None:
            raise Invalid(f"the selection is {shown(labels['selection'])}, not A, B or tie")
        return {"choice": choice}
    if "scale_value" in labels:
        value = int(float(labels["scale_value"]))
        if value == 0:
            return {"choice": "tie"}
        return {"choice": "a" if value < 0 else "b", "strength": min(abs(value), 3)}
    return {}


def _number(labels: Mapping[str, Any]) -> int | None:
    """The value of a scale: its name or value is a whole number."""
    for name, value in labels.items():
        for text in (str(value), name):
            if text.lstrip("-").isdigit():
                return int(text)
    return None
