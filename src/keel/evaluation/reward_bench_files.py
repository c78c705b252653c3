"""Benchmarks of reward models as their authors publish them, read from files: nothing is downloaded.

    RewardBench      rows with prompt, chosen, rejected, subset, id (the split `filtered` of
    allenai/reward-bench) RewardBench 2    rows with prompt, lists chosen and rejected, num_correct, subset,
    id LLMBar           dataset.json with input, output_1, output_2, label; its folder's name is the subset
    pairs            any preference data that keel reads; a column `subset` names kinds of pairs; how they are
    read may be said by a data source

Which one it is, the columns say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from keel.data import files, load
from keel.errors import DataError, UsageError
from keel.evaluation.reward_bench import ADVERSARIAL, NATURAL, PROMPTS, Benchmark, Question
from keel.types import DataSource, PreferenceRecord

ALL = "all"  # the subset of pairs that name none
_KINDS = (".parquet", ".jsonl", ".json")
_SETTINGS = ("on_bad", "`columns", "`pairs", "`format")  # of a data source, as errors name them


def read(place: str, benchmark: Benchmark | None = None) -> tuple[Benchmark, list[Question]]:
    """The questions of a file or a folder (with the folders in it), and of which benchmark they are.

    benchmark: None: by the columns. UsageError for a place without data; DataError, with the row, for one
    that is not of the benchmark's form.
    """
    path = Path(place).expanduser()
    found = _files(path) if path.exists() else []
    first = next((row for file in found for _, row in _rows(file)), None)
    kind = benchmark or (_kind_of(first) if first is not None else "pairs")
    if kind == "pairs":
        return kind, _pairs(place)
    if not found:
        raise UsageError(f"{place}: there is no .parquet, .jsonl or .json file")
    make = {"rewardbench": _first, "rewardbench2": _second, "llmbar": _llmbar}[kind]
    questions = [make(row, origin, file) for file in found for origin, row in _rows(file)]
    if not questions:
        raise DataError(f"{place} holds no rows")
    return kind, questions


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if files.suffix_of(path) in _KINDS else []
    named = sorted(path.rglob("dataset.json"))  # LLMBar's, which has results of models beside it
    return named or sorted(p for p in path.rglob("*") if p.is_file() and files.suffix_of(p) in _KINDS)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for origin, row in files.read(path, str(path)):
        if isinstance(row, DataError):
            raise row
        yield origin, row


def _kind_of(row: dict[str, Any]) -> Benchmark:
    if {"input", "output_1", "output_2", "label"} <= row.keys():
        return "llmbar"
    if isinstance(row.get("chosen"), list) and "num_correct" in row:
        return "rewardbench2"
    if {"prompt", "chosen", "rejected", "subset"} <= row.keys() and row["subset"] in PROMPTS:
        return "rewardbench"
    return "pairs"


def _first(row: dict[str, Any], origin: str, file: Path) -> Question:
    prompt, chosen, rejected, subset = (
        _string(row, key, origin) for key in ("prompt", "chosen", "rejected", "subset")
    )
    return Question(str(row.get("id", origin)), prompt, (chosen, rejected), 1, subset, origin)


def _second(row: dict[str, Any], origin: str, file: Path) -> Question:
    prompt, subset = _string(row, "prompt", origin), _string(row, "subset", origin)
    right, wrong = _strings(row, "chosen", origin), _strings(row, "rejected", origin)
    known = {"num_correct": len(right), "total_completions": len(right) + len(wrong)}
    for key, count in known.items():
        if key in row and row[key] != count:
            raise DataError(f"{origin}: {key} is {row[key]!r}, and there are {count} such replies")
    # the hub's file names it Ties, the published code's outputs ties
    name = "Ties" if subset.lower() == "ties" else subset
    return Question(str(row.get("id", origin)), prompt, (*right, *wrong), len(right), name, origin)


def _llmbar(row: dict[str, Any], origin: str, file: Path) -> Question:
    asked, one, other = (_string(row, key, origin) for key in ("input", "output_1", "output_2"))
    label = row.get("label")
    if label not in (1, 2) or isinstance(label, bool):
        raise DataError(f"{origin}: label is {label!r}, neither 1 nor 2")
    names = {name.lower(): name for name in (NATURAL, *ADVERSARIAL)}
    subset = next((names[part.lower()] for part in reversed(file.parts[:-1]) if part.lower() in names), None)
    if subset is None:
        raise DataError(f"{origin}: its folder is none of LLMBar's: {', '.join((NATURAL, *ADVERSARIAL))}")
    replies = (one, other) if label == 1 else (other, one)
    return Question(origin, asked, replies, 1, subset, origin, right_shown_second=label == 2)


def _pairs(place: str) -> list[Question]:
    try:
        return pairs([DataSource(place)], place)[0]
    except DataError as error:
        if any(name in str(error) for name in _SETTINGS):  # which a file by itself cannot say
            way = f"--on takes such settings as a YAML file of a data source: source: {place}"
            raise DataError(f"{error} ({way})") from None
        raise


def pairs(sources: Sequence[DataSource], place: str) -> tuple[list[Question], int]:
    """The questions of preference data, and how many bad rows were left out. place: for messages. DataError
    where no pair has a better side, and for a bad row."""
    dataset = load.load(sources, ("preference",), 0)
    found: list[Question] = []
    for record in dataset.records:
        assert isinstance(record, PreferenceRecord)
        p = record.p_chosen
        if p == 0.5:  # nobody knows which is right
            continue
        sides = (record.chosen, record.rejected) if p is None or p > 0.5 else (record.rejected, record.chosen)
        subset = record.columns.get("subset")
        name = ALL if subset is None else str(subset)
        found.append(Question(record.origin, record.prompt, sides, 1, name, record.origin))
    if not found:
        raise DataError(f"{place}: no pair has a better side")
    return found, dataset.skipped


def _string(row: dict[str, Any], key: str, origin: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise DataError(f"{origin}: {key!r} is {type(value).__name__}, not text")
    return value


def _strings(row: dict[str, Any], key: str, origin: str) -> Sequence[str]:
    value = row.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        raise DataError(f"{origin}: {key!r} is no list of texts")
    return value
