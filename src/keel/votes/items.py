"""Items: what people judge. They are added once and never changed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from sqlalchemy import Connection, bindparam, func, select, text, update

from keel.errors import UsageError
from keel.votes import answers, audit, order, schema
from keel.votes.codec import (
    answer_json,
    answer_of,
    checked_json,
    digest,
    loads,
    plain,
    project_of,
    replies_of,
)
from keel.votes.database import insert_new, insert_row
from keel.votes.kinds import Added, ItemRow, NewItem, NotFoundError, Project, Text
from keel.votes.projects import add_slots, project_row

_AT_ONCE = 2000  # rows a statement
LONGEST_KEY = 500
_REPLIES = {"pairwise": (2, 2), "rating": (1, 1), "ranking": (2, 26), "edit": (0, 1), "thumbs": (1, 1)}
_MANY = 5000  # from so many new rows on the database looks at its tables again


def add(connection: Connection, name: str, new: Iterable[NewItem], by: int | None, now: float) -> Added:
    """Add items to a project, all or none of them. A key that is there is left alone.

    UsageError for an item that the project's task cannot ask about, and for a key that is there with another
    content.
    """
    row = project_row(connection, name, lock=True)
    project, items = project_of(name, row.settings), schema.items
    batch_id = insert_row(
        connection,
        schema.batches,
        project_id=row.id,
        items=0,
        digest=audit.batch_digest(()),
        at=now,
        person_id=by,
    )
    added = known = 0
    stream = iter(new)
    while chunk := list(islice(stream, _AT_ONCE)):
        values = _distinct(_values(project, item) for item in chunk)
        fresh = insert_new(
            connection, items, [{"project_id": row.id, "batch_id": batch_id, **value} for value in values]
        )
        if fresh < len(values):
            _check_known(connection, row, values)
        added, known = added + fresh, known + len(chunk) - fresh
    if added == 0:
        connection.execute(schema.batches.delete().where(schema.batches.c.id == batch_id))
        return Added(0, known)
    _seal(connection, row.id, batch_id, added, by, now)
    return Added(added, known)


def _check_known(connection: Connection, row: Any, values: list[dict[str, Any]]) -> None:
    """UsageError for a key that was there with another content."""
    items, said = schema.items, {value["key"]: value["digest"] for value in values}
    there = connection.execute(
        select(items.c.key, items.c.digest).where(items.c.project_id == row.id, items.c.key.in_(list(said)))
    )
    for known in there:
        if said[known.key] != known.digest:
            raise UsageError(
                f"{row.name} has an item with the key {known.key!r} already, and it says something else: "
                "give this one another key, or make another project"
            )


def _seal(
    connection: Connection, project_id: int, batch_id: int, added: int, by: int | None, now: float
) -> None:
    """Slots, counts and the log's row for items that were added together."""
    items, batches = schema.items, schema.batches
    mine = items.c.batch_id == batch_id
    usual = mine & items.c.gold.is_(None)
    most = connection.execute(select(func.max(items.c.open_slots)).where(mine)).scalar_one()
    for number in range(most):
        add_slots(connection, usual, number)
    digests = connection.execute(select(items.c.digest).where(mine).order_by(items.c.id)).scalars()
    connection.execute(
        update(batches)
        .where(batches.c.id == batch_id)
        .values(items=added, digest=audit.batch_digest(digests))
    )
    open_items = connection.execute(select(func.count()).where(usual)).scalar_one()
    audit.append(
        connection, "batches", batch_id, "add", at=now, by=by, project_id=project_id,
        change=audit.Change(items=open_items, open_items=open_items, reorders=True),
    )  # fmt: skip
    if added >= _MANY:
        connection.execute(text("ANALYZE"))


def _distinct(values: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by key; the same key twice with the same content is one."""
    found: dict[str, dict[str, Any]] = {}
    for value in values:
        if found.setdefault(value["key"], value)["digest"] != value["digest"]:
            raise UsageError(f"two items have the key {value['key']!r} and differ: a key names one item")
    return list(found.values())


def _values(project: Project, item: NewItem) -> dict[str, Any]:
    """An item's row. UsageError for one that cannot be asked about."""
    where = f"item {item.key!r}"
    if not item.key or len(item.key) > LONGEST_KEY or "\x00" in item.key:
        raise UsageError(f"{where}: a key is a text of 1 to {LONGEST_KEY} characters")
    try:
        item.key.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"{where}: the key holds a lone surrogate, which is not valid Unicode") from None
    low, high = _REPLIES[project.task]
    if not low <= len(item.replies) <= high:
        wanted = f"{low}" if low == high else f"{low} to {high}"
        raise UsageError(f"{where} has {len(item.replies)} replies; a {project.task} project wants {wanted}")
    _check_text(f"{where}: the prompt", item.prompt)
    for number, reply in enumerate(item.replies, 1):
        _check_text(f"{where}: reply {number}", reply.content)
        if not isinstance(reply.source, str | None):
            raise UsageError(f"{where}: the source of reply {number} is {reply.source!r}, not a text")
    if not is_number_or_none(item.priority):
        raise UsageError(f"{where}: the priority is {item.priority!r}, not a finite number")
    if item.gold is not None:
        if project.task == "edit":
            raise UsageError(f"{where}: an edited reply has no known answer, so there is no gold")
        try:
            answers.check(project, len(item.replies), item.gold)
        except UsageError as error:
            raise UsageError(f"{where}: its gold answer: {error}") from None
    values = {
        "key": item.key,
        "prompt": checked_json(f"{where}: the prompt", plain(item.prompt)),
        "replies": checked_json(
            f"{where}: a reply", [[plain(reply.content), reply.source] for reply in item.replies]
        ),
        "columns": checked_json(f"{where}: its columns", dict(item.columns)),
        "gold": None if item.gold is None else answer_json(item.gold),
    }
    return {
        **values,
        "digest": audit.item_digest(values),
        "rank": order.rank(project.seed, item.key),
        "at_random": order.at_random(project, item.key),
        "urgency": order.urgency(item.priority),
        "priority": item.priority,
        "open_slots": 0 if item.gold is not None else project.votes_per_item,
        "surplus": 0,
    }


def is_number_or_none(value: object) -> bool:
    """Whether a value of a file can stand where a number may be left out."""
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        return value is None
    return -1e300 < value < 1e300


def _check_text(where: str, value: Text) -> None:
    if isinstance(value, str):
        if not value.strip():
            raise UsageError(f"{where} is empty")
        return
    if not isinstance(value, list | tuple):
        raise UsageError(f"{where} is {value!r}, neither a text nor a list of turns")
    if not value:
        raise UsageError(f"{where} has no turns")
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            raise UsageError(f'{where}: turn {number} is no {{"role": …, "content": …}}')


def item_id(connection: Connection, name: str, key: str) -> int:
    """The number of an item. NotFoundError for a key that the project has not."""
    items, row = schema.items, project_row(connection, name)
    found = connection.execute(
        select(items.c.id).where(items.c.project_id == row.id, items.c.key == key)
    ).scalar_one_or_none()
    if found is None:
        raise NotFoundError(f"{name} has no item with the key {key!r}")
    return found


def item(connection: Connection, name: str, number: int) -> ItemRow:
    """One item by its number."""
    row = project_row(connection, name)
    found = connection.execute(
        select(schema.items).where(schema.items.c.project_id == row.id, schema.items.c.id == number)
    ).one_or_none()
    if found is None:
        raise NotFoundError(f"{name} has no item number {number}")
    return _row(found)


def page(connection: Connection, name: str, after: int, size: int) -> list[ItemRow]:
    """Items in the order in which they were added, from number `after` on."""
    items, row = schema.items, project_row(connection, name)
    query = select(items).where(items.c.project_id == row.id, items.c.id > after).order_by(items.c.id)
    return [_row(found) for found in connection.execute(query.limit(size))]


def _row(row: Any) -> ItemRow:
    return ItemRow(
        item=row.id,
        key=row.key,
        prompt=loads(row.prompt),
        replies=replies_of(row.replies),
        columns=loads(row.columns),
        gold=None if row.gold is None else answer_of(row.gold),
        priority=row.priority,
        missing=row.open_slots,
    )


def set_priorities(
    connection: Connection, name: str, priorities: Mapping[str, float | None], by: int | None, now: float
) -> int:
    """Give items other priorities; how many of the keys are there. UsageError for one that is no number."""
    row, items = project_row(connection, name), schema.items
    for key, value in priorities.items():
        if value is not None and not math.isfinite(value):
            raise UsageError(f"item {key!r}: the priority is {value}, not a finite number")
    values = [
        {"named": key, "given": value, "urgent": order.urgency(value)} for key, value in priorities.items()
    ]
    changed = 0
    for chunk in _chunks(values):
        changed += connection.execute(
            update(items)
            .where(items.c.project_id == row.id, items.c.key == bindparam("named"))
            .values(priority=bindparam("given"), urgency=bindparam("urgent")),
            chunk,
        ).rowcount
    audit.append_digest(
        connection, f"priorities:{row.id}", digest(dict(priorities)), "priorities",
        at=now, by=by, project_id=row.id, change=audit.Change(reorders=True, revises=False),
    )  # fmt: skip
    return changed


def _chunks(values: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(values), _AT_ONCE):
        yield values[start : start + _AT_ONCE]
