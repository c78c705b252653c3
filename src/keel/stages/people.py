"""Pairs that people compare: in a file beside them, and, where a database of `keel label` is configured, in a
project of it too.

A project belongs to its pairs: the key of an item says which pair it is and what stands in it, so votes are
never counted for other texts than people saw. It is called RUN-STAGE; a number follows where that name has
other pairs.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keel.config.collect import LabelConfig
from keel.data.batches import derive_seed
from keel.errors import DataError, UsageError
from keel.rundir.checkpoint import write_json

if TYPE_CHECKING:
    from keel.votes.kinds import Answer
    from keel.votes.store import Store

PAIRS = "pairs.jsonl"  # two replies to each prompt
VOTES = "votes.jsonl"  # what people say of them
PROJECT = "label.json"  # which project has them
CHOICES = ("a", "b", "tie", "skip")
POLL_SECONDS = 2.0  # between two looks while a run waits


@dataclass(frozen=True, slots=True)
class Voted:
    """One vote on one pair."""

    pair: int
    annotator: str
    choice: str  # of CHOICES, or "abstain", which says nothing


@dataclass(frozen=True, slots=True)
class Heard:
    """What people have said so far, and what is still wanted."""

    votes: tuple[Voted, ...]
    words: Mapping[int, str]  # pair → what a reviewer said: a, b or tie
    wanted: int  # votes in all
    missing: int

    @property
    def print(self) -> str:
        """What they said, as a short text."""
        said = sorted((v.pair, v.annotator, v.choice) for v in self.votes)
        return f"{derive_seed(json.dumps([said, sorted(self.words.items())])):016x}"


def database(label: LabelConfig | None) -> str | None:
    """The address of the database that pairs are opened in; None where none is configured."""
    if label is not None and label.db:
        return label.db
    from_environment = os.environ.get("KEEL_LABEL_DB")
    if from_environment or label is None:
        return from_environment or None
    from keel.votes import url_or_default

    return url_or_default(None)


def check(label: LabelConfig | None) -> None:
    """UsageError where a database is configured and cannot be used: a package is missing, the address is
    none, or there is no such folder."""
    url = database(label)
    if url is None:
        return
    from keel import votes

    try:
        from keel.votes.database import parse
    except ModuleNotFoundError as error:
        raise votes.missing(error) from None
    address = parse(url)
    folder = Path(address.database or "").parent
    if address.drivername == "sqlite" and not folder.is_dir():
        raise UsageError(f"label.db: there is no folder {folder}")


def pause() -> None:
    """Until the next look."""
    time.sleep(POLL_SECONDS)


def how_to_vote(label: LabelConfig | None) -> str:
    """The command that opens the pages."""
    db = f" --db {shown(label.db)}" if label is not None and label.db else ""
    return f"keel label serve{db}"


def shown(url: str) -> str:
    """An address without its password."""
    return re.sub(r"(://[^/@:]*):[^@/]*@", r"\1:***@", url)


# ---------------------------------------------------------------- the project


def open_pairs(
    directory: Path, title: str, label: LabelConfig | None, pairs: Sequence[Mapping[str, Any]], source: str
) -> str | None:
    """Make the project of these pairs, where it is not there yet; its name, or None without a database."""
    url = database(label)
    if url is None:
        return None
    from keel.votes import open_store
    from keel.votes.kinds import NewItem, Project, Reply

    items = [
        NewItem(key(pair), pair["prompt"], [Reply(pair["a"], source), Reply(pair["b"], source)])
        for pair in pairs
    ]
    votes, instructions = (label.votes, label.instructions) if label else (1, "")
    with open_store(url) as store:
        name, known = _name(store, _slug(title), {item.key for item in items})
        if not known:
            settings = Project(name, title=title, instructions=instructions, votes_per_item=votes)
            store.create_project(settings, None)
        elif store.project(name).votes_per_item != votes:
            store.change_project(name, None, votes_per_item=votes)
        store.add_items(name, items, None)
    write_json(directory / PROJECT, {"project": name})
    return name


def _name(store: Store, base: str, keys: set[str]) -> tuple[str, bool]:
    """The first free name, or that of the project with these pairs; and whether it is there."""
    there = {project.name for project in store.projects()}
    for name in (base if number == 1 else f"{base}-{number}" for number in itertools.count(1)):
        if name not in there:
            return name, False
        # gold items are an admin's, who adds them to the pairs to check people's attention
        if {row.key for row in store.items(name) if row.gold is None} in (keys, set()):
            return name, True
    raise AssertionError("not reached")


def _slug(title: str) -> str:
    """A title as a project's name."""
    return re.sub(r"[^a-z0-9_-]+", "-", title.lower()).strip("-_") or "pairs"


def key(pair: Mapping[str, Any]) -> str:
    """The item of a pair: its number, and a print of what stands in it."""
    content = json.dumps([pair["prompt"], pair["a"], pair["b"]], sort_keys=True, ensure_ascii=False)
    return f"{pair['pair']}-{derive_seed(content):016x}"


# ---------------------------------------------------------------- what people say


def hear(directory: Path, label: LabelConfig | None, pairs: Sequence[Mapping[str, Any]]) -> Heard:
    """The votes on the pairs of a stage, from its project and from the file. Of one person's votes on a pair
    the project's counts. DataError for a line of the file that is no vote."""
    known = {pair["pair"] for pair in pairs}
    by_file = _votes_of_file(directory / VOTES, known)
    by_project, words, wanted = _votes_of_project(directory, label, pairs)
    twice = {(vote.pair, vote.annotator) for vote in by_project}
    votes = [*by_project, *(vote for vote in by_file if (vote.pair, vote.annotator) not in twice)]
    count = dict.fromkeys(known, 0)
    for vote in votes:
        count[vote.pair] += 1
    missing = sum(max(0, wanted - count[pair]) for pair in known if pair not in words)
    return Heard(tuple(votes), words, wanted * len(known), missing)


def _votes_of_project(
    directory: Path, label: LabelConfig | None, pairs: Sequence[Mapping[str, Any]]
) -> tuple[list[Voted], dict[int, str], int]:
    """(votes, reviewers' words, votes wanted for a pair) of the project; none where it has not been made."""
    mark, url = directory / PROJECT, database(label)
    if not mark.exists():
        return [], {}, 1
    name = json.loads(mark.read_text(encoding="utf-8"))["project"]
    if url is None:
        raise UsageError(
            f"its pairs are in the project {name} of keel label, and no database is named: set "
            "KEEL_LABEL_DB, or `label.db` of the stage"
        )
    from keel.votes import open_store

    number = {key(pair): pair["pair"] for pair in pairs}
    with open_store(url, create=False) as store:
        votes = [
            Voted(number[vote.key], vote.person, _choice(vote.answer))
            for vote in store.votes(name, counted_only=True)
            if vote.key in number
        ]
        words = {
            number[word.key]: _choice(word.answer)
            for word in store.adjudications(name)
            if word.key in number and _choice(word.answer) != "abstain"
        }
    return votes, words, label.votes if label else 1


def _choice(answer: Answer) -> str:
    """An answer as a choice of the file's; who cannot judge says nothing of a pair ("abstain")."""
    return {"a": "a", "b": "b", "tie": "tie", "both_bad": "tie"}.get(answer.choice or "", "abstain")


def _votes_of_file(path: Path, known: set[int]) -> list[Voted]:
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    return [_vote(line, f"{path}:{number}", known) for number, line in enumerate(lines, 1) if line.strip()]


def _vote(line: str, where: str, known: set[int]) -> Voted:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}") from None
    pair, who, choice = (
        (row.get(key) for key in ("pair", "annotator", "choice")) if isinstance(row, dict) else (None,) * 3
    )
    if isinstance(pair, bool) or pair not in known:
        raise DataError(f"{where}: `pair` is {pair!r}, which is none of the pairs in {PAIRS}")
    if not isinstance(who, str) or not who:
        raise DataError(f"{where}: `annotator` is {who!r}, not a name")
    if choice not in CHOICES:
        raise DataError(f"{where}: `choice` is {choice!r}, not one of {', '.join(CHOICES)}")
    return Voted(int(pair), who, choice)
