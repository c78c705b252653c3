"""Forgetting somebody: what is theirs alone goes, their votes stay under a number."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, delete, func, select, update

from keel.votes import audit, invitations, people, schema, sessions
from keel.votes.kinds import Forgotten


def forget(connection: Connection, person_id: int, by: int | None, now: float) -> Forgotten:
    """Take away a person's name, comments, notes, remarks, sessions and tokens. Their votes stay, under a
    number, and the log still holds.

    UsageError for the only admin.
    """
    row = people.person_row(connection, person_id)
    people_, name = schema.people, f"removed-{person_id}"
    if by is not None:
        people.keep_an_admin(connection, row)
    projects = _projects_of(connection, person_id)
    credentials = sessions.sign_out_everywhere(connection, person_id, by, now)
    invitations.withdraw_of(connection, person_id, by, now)
    comments = _blank(connection, schema.versions, "comment", person_id)
    comments += _blank(connection, schema.adjudications, "note", person_id)
    comments += _blank(connection, schema.flags, "reason", person_id)
    connection.execute(
        update(schema.invitations).where(schema.invitations.c.person_id == person_id).values(name="")
    )
    connection.execute(delete(schema.requests).where(schema.requests.c.person_id == person_id))
    people.give_back(connection, person_id)
    connection.execute(
        update(people_)
        .where(people_.c.id == person_id)
        .values(name=name, name_key=name, salt="", paused=None, removed=now)
    )
    votes = connection.execute(
        select(func.count()).where(schema.votes.c.person_id == person_id, ~schema.votes.c.withdrawn)
    ).scalar_one()
    audit.append(connection, "people", person_id, "forget", at=now, by=by)
    for project_id in projects:  # the names in what is learned from have changed
        audit.append_digest(
            connection, f"forgotten:{person_id}", audit.GONE, "forget",
            at=now, by=by, project_id=project_id, change=audit.Change(),
        )  # fmt: skip
    return Forgotten(name, votes, comments, credentials)


def _projects_of(connection: Connection, person_id: int) -> list[int]:
    tables = (schema.votes, schema.adjudications, schema.flags)
    found: set[int] = set()
    for table in tables:
        query = select(table.c.project_id).where(table.c.person_id == person_id).distinct()
        found.update(connection.execute(query).scalars())
    return sorted(found)


def _blank(connection: Connection, table: Any, column: str, person_id: int) -> int:
    """Empty a private column of a person's rows, with its salt. How many said something."""
    mine = table.c.person_id == person_id
    said = connection.execute(select(func.count()).where(mine, table.c[column] != "")).scalar_one()
    connection.execute(update(table).where(mine).values({column: "", "salt": ""}))
    return said
