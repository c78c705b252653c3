"""Skips, flags and undos that arrived: a client that asks again, with the same id, is told the same and
changes nothing. Votes carry their client's ids themselves (`versions`)."""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy import Connection, delete

from keel.errors import UsageError
from keel.votes import schema
from keel.votes.database import insert_row, row_of
from keel.votes.kinds import UsedError

Deed = Literal["skip", "flag", "undo"]
_KEPT = 7 * 86400.0  # seconds in which a retry is known


def check(client_id: str) -> None:
    """UsageError for what is no client's id."""
    if not client_id or len(client_id) > 200 or "\x00" in client_id:
        raise UsageError("a client's id is a text of 1 to 200 characters, another one for each answer")


def known(
    connection: Connection, person_id: int, project_id: int, deed: Deed, client_id: str | None,
    item_id: int | None = None,
) -> Any:  # fmt: skip
    """What was noted of this request; None for a new one, and for one without an id. The person's seat is
    locked, so that of two that come at once the second waits and is known.

    item_id: that it is about. UsedError where the id was used for another item or project.
    """
    if client_id is None:
        return None
    check(client_id)
    row = row_of(connection, schema.requests, person_id=person_id, deed=deed, client_id=client_id)
    if row is not None and (row.project_id != project_id or (item_id is not None and row.item_id != item_id)):
        raise UsedError("this client's id was used for another item: choose a new one for each request")
    return row


def note(
    connection: Connection, person_id: int, project_id: int, deed: Deed, client_id: str | None,
    item_id: int | None, now: float,
) -> None:  # fmt: skip
    """Remember a request; those of this person that are older than a week are dropped."""
    if client_id is None:
        return
    table = schema.requests
    connection.execute(delete(table).where(table.c.person_id == person_id, table.c.at < now - _KEPT))
    insert_row(
        connection, table,
        person_id=person_id, deed=deed, client_id=client_id, project_id=project_id, item_id=item_id, at=now,
    )  # fmt: skip
