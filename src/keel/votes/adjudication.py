"""The reviewer's queue, and votes read back. What a reviewer says stands beside the votes, never over
them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from sqlalchemy import Connection, func, literal, select

from keel.errors import UsageError
from keel.votes import answers, audit, schema
from keel.votes.codec import answer_json, answer_of, clean, loads, new_salt, project_of, replies_of, salted
from keel.votes.database import insert_row
from keel.votes.kinds import Adjudication, Answer, Disputed, Flag, NotFoundError, VoteRow
from keel.votes.people import person_row
from keel.votes.projects import project_row

_AT_ONCE = 1000


# ---------------------------------------------------------------- votes, read


def standing(project_id: int) -> Any:
    """Standing votes with everything that a `VoteRow` says."""
    votes, versions, items = schema.votes, schema.versions, schema.items
    mine, people = schema.encounters, schema.people
    return (
        select(
            votes.c.id.label("vote"), votes.c.status, votes.c.version, votes.c.at, versions.c.answer,
            versions.c.comment, versions.c.seconds, mine.c.shown, mine.c.how, people.c.name,
            people.c.is_model, items.c.id.label("item"), items.c.key, items.c.prompt, items.c.replies,
            items.c.columns, items.c.gold,
        )
        .select_from(votes)
        .join(versions, (versions.c.vote_id == votes.c.id) & (versions.c.version == votes.c.version))
        .join(items, items.c.id == votes.c.item_id)
        .join(people, people.c.id == votes.c.person_id)
        .join(mine, (mine.c.item_id == votes.c.item_id) & (mine.c.person_id == votes.c.person_id))
        .where(votes.c.project_id == project_id, ~votes.c.withdrawn)
    )  # fmt: skip


def votes(connection: Connection, name: str, counted_only: bool) -> Iterator[VoteRow]:
    """A project's standing votes, item by item in the order in which they were added, the oldest first."""
    project_id, after = project_row(connection, name).id, (0, 0)
    while True:
        query = standing(project_id).order_by(schema.votes.c.item_id, schema.votes.c.id).limit(_AT_ONCE)
        item, vote = schema.votes.c.item_id, schema.votes.c.id
        query = query.where((item > after[0]) | ((item == after[0]) & (vote > after[1])))
        if counted_only:
            query = query.where(schema.votes.c.status == "counted")
        rows = connection.execute(query).all()
        yield from map(vote_row, rows)
        if len(rows) < _AT_ONCE:
            return
        after = (rows[-1].item, rows[-1].vote)


def vote_row(row: Any) -> VoteRow:
    return VoteRow(
        item=row.item,
        key=row.key,
        person=row.name,
        is_model=row.is_model,
        answer=answer_of(row.answer, row.comment),
        shown=tuple(loads(row.shown)),
        seconds=row.seconds,
        at=row.at,
        counted=row.status == "counted",
        how=row.how,
        version=row.version,
        prompt=loads(row.prompt),
        replies=replies_of(row.replies),
        columns=loads(row.columns),
        gold=None if row.gold is None else answer_of(row.gold),
    )


# ---------------------------------------------------------------- disputes


def disputed(connection: Connection, name: str, least: float) -> list[Disputed]:
    """Items whose voters are at least so far apart (see `answers.dispute`), or which somebody flagged, the
    most disputed first. Without those that a reviewer spoke of after their last vote; and without gold."""
    row = project_row(connection, name)
    project = project_of(name, row.settings)
    items, votes_, adjudications = schema.items, schema.votes, schema.adjudications
    flagged: dict[int, list[Flag]] = {}
    for flag in flags(connection, name):
        flagged.setdefault(flag.item, []).append(flag)
    newest = select(func.max(votes_.c.at)).where(votes_.c.item_id == items.c.id).scalar_subquery()
    settled = select(literal(1)).where(
        adjudications.c.item_id == items.c.id, adjudications.c.at >= func.coalesce(newest, 0.0)
    )
    query = standing(row.id).where(items.c.gold.is_(None), ~settled.exists())
    query = query.order_by(votes_.c.item_id, votes_.c.id)
    found: list[Disputed] = []
    seen: set[int] = set()
    for item, group in groupby(connection.execute(query), key=lambda vote: vote.item):
        rows = tuple(map(vote_row, group))
        seen.add(item)
        apart = answers.dispute(project, [vote.answer for vote in rows if not vote.is_model])
        if apart >= least or item in flagged:
            found.append(Disputed(item, rows[0].key, apart, rows, tuple(flagged.get(item, ()))))
    open_flags = select(items.c.id).where(items.c.id.in_(set(flagged) - seen), ~settled.exists())
    for item in connection.execute(open_flags).scalars():
        found.append(Disputed(item, flagged[item][0].key, 0.0, (), tuple(flagged[item])))
    return sorted(found, key=lambda one: (-one.dispute, one.item))


def adjudicate(
    connection: Connection, name: str, person_id: int, item_id: int, answer: Answer, note: str, now: float
) -> None:
    """A reviewer's word on an item. UsageError for one that does not fit, and for who is no admin."""
    row, person = project_row(connection, name), person_row(connection, person_id)
    if person.role != "admin":
        raise UsageError(f"{person.name} is no admin: only an admin adjudicates")
    items = schema.items
    item = connection.execute(
        select(items).where(items.c.id == item_id, items.c.project_id == row.id)
    ).one_or_none()
    if item is None:
        raise NotFoundError(f"{name} has no item number {item_id}")
    answers.check(project_of(name, row.settings), len(replies_of(item.replies)), answer)
    salt, said = new_salt(), clean(note)[: answers.LONGEST_COMMENT]
    row_id = insert_row(
        connection, schema.adjudications,
        project_id=row.id, item_id=item_id, person_id=person_id, answer=answer_json(answer), note=said,
        note_digest=salted(salt, said), salt=salt, at=now,
    )  # fmt: skip
    audit.append(
        connection, "adjudications", row_id, "adjudicate", at=now, by=person_id, project_id=row.id,
        change=audit.Change(),
    )  # fmt: skip


def adjudications(connection: Connection, name: str, *, last_only: bool = True) -> list[Adjudication]:
    """What reviewers said, item by item; of several words on an item the last."""
    row, table, items, people = (
        project_row(connection, name), schema.adjudications, schema.items, schema.people,
    )  # fmt: skip
    rows = connection.execute(
        select(table, items.c.key, people.c.name)
        .join(items, items.c.id == table.c.item_id)
        .join(people, people.c.id == table.c.person_id)
        .where(table.c.project_id == row.id)
        .order_by(table.c.item_id, table.c.id)
    )
    everything = [
        Adjudication(one.item_id, one.key, one.name, answer_of(one.answer), one.note, one.at) for one in rows
    ]
    return list({one.item: one for one in everything}.values()) if last_only else everything


def flags(connection: Connection, name: str) -> list[Flag]:
    """Remarks that something is wrong with an item, the oldest first."""
    row, table, items, people = project_row(connection, name), schema.flags, schema.items, schema.people
    rows = connection.execute(
        select(table, items.c.key, people.c.name)
        .join(items, items.c.id == table.c.item_id)
        .join(people, people.c.id == table.c.person_id)
        .where(table.c.project_id == row.id)
        .order_by(table.c.id)
    )
    return [Flag(one.item_id, one.key, one.name, one.reason, one.at) for one in rows]
