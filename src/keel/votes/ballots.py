"""Votes as rows: their versions, and the slots that they fill."""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import Connection, bindparam, false, select

from keel.votes import audit, schema
from keel.votes.codec import answer_json, answer_of, clean, new_salt, salted
from keel.votes.database import add_to, change_rows, insert_row, row_of
from keel.votes.kinds import Answer


def write_version(
    connection: Connection,
    vote: Any,
    kind: str,
    answer: Answer | None,
    *,
    status: str,
    at: float,
    by: int | None,
    change: audit.Change,
    slot: int | None = None,
    client_id: str | None = None,
    seconds: float | None = None,
) -> int:
    """A vote's next version, which holds from now on. answer None: it is withdrawn.

    vote: its row, or what a new one needs (project_id, item_id, person_id, version 0). Returns its id.
    """
    version, votes = vote.version + 1, schema.votes
    now = {
        "status": status, "slot": slot, "withdrawn": answer is None, "version": version, "at": at,
    }  # fmt: skip
    if version == 1:
        vote_id = insert_row(
            connection,
            schema.votes,
            project_id=vote.project_id,
            item_id=vote.item_id,
            person_id=vote.person_id,
            **now,
        )
    else:
        vote_id = vote.id
        change_rows(connection, votes, {"id": vote_id}, **now)
    salt, comment = new_salt(), clean(answer.comment) if answer else ""
    row_id = insert_row(
        connection, schema.versions,
        vote_id=vote_id, person_id=vote.person_id, version=version, kind=kind, status=status,
        client_id=client_id, answer=None if answer is None else answer_json(answer), comment=comment,
        comment_digest=salted(salt, comment), salt=salt, seconds=seconds, at=at,
    )  # fmt: skip
    audit.append(
        connection, "versions", row_id, kind, at=at, by=by, project_id=vote.project_id, change=change
    )
    return vote_id


def standing(connection: Connection, vote: Any) -> Any:
    """The version of a vote that holds."""
    return row_of(connection, schema.versions, vote_id=vote.id, version=vote.version)


def fill(connection: Connection, item_id: int, number: int, person_id: int, vote_id: int) -> None:
    """A person's vote fills a slot."""
    slot = {"item_id": item_id, "number": number}
    change_rows(connection, schema.slots, slot, person_id=person_id, vote_id=vote_id, leased_until=0.0)


def free_slot(connection: Connection, item_id: int, now: float) -> Any:
    """A slot of an item that nobody holds, locked; None where there is none."""
    return connection.execute(_free_slot(), {"item": item_id, "now": now}).one_or_none()


@cache
def _free_slot() -> Any:
    slots = schema.slots
    return (
        select(slots)
        .where(
            slots.c.item_id == bindparam("item"), slots.c.vote_id.is_(None),
            slots.c.leased_until <= bindparam("now"),
        )
        .order_by(slots.c.number)
        .limit(1)
        .with_for_update(skip_locked=True)
    )  # fmt: skip


def open_more(connection: Connection, item_id: int, by: int) -> int:
    """Change how many slots of an item wait for a vote. By how much the project's open items change."""
    add_to(connection, schema.items, {"id": item_id}, open_slots=by)
    left = connection.execute(_open_slots(), {"item": item_id}).scalar_one()
    return int(left > 0) - int(left - by > 0)


@cache
def _open_slots() -> Any:
    return select(schema.items.c.open_slots).where(schema.items.c.id == bindparam("item"))


def promote(connection: Connection, project_id: int, item_id: int, now: float) -> bool:
    """Let the oldest surplus vote of an item fill a slot that nobody holds; whether there were both.

    So no second person is asked for what somebody said a little late.
    """
    vote = connection.execute(_oldest_surplus(), {"item": item_id}).one_or_none()
    slot = free_slot(connection, item_id, now) if vote is not None else None
    if vote is None or slot is None:
        return False
    holds = standing(connection, vote)
    add_to(connection, schema.items, {"id": item_id}, surplus=-1)
    closed = open_more(connection, item_id, -1)
    write_version(
        connection, vote, "promote", answer_of(holds.answer, holds.comment), status="counted", at=now,
        by=None, slot=slot.number, seconds=holds.seconds,
        change=audit.Change(open_items=closed, counted=1),
    )  # fmt: skip
    fill(connection, item_id, slot.number, vote.person_id, vote.id)
    return True


@cache
def _oldest_surplus() -> Any:
    votes = schema.votes
    return (
        select(votes)
        .where(
            votes.c.item_id == bindparam("item"), votes.c.status == "surplus", votes.c.withdrawn == false()
        )
        .order_by(votes.c.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )  # fmt: skip
