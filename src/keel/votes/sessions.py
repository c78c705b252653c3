"""Sessions of pages and tokens of programs. Kept are their hashes, as those of invitations."""

from __future__ import annotations

import secrets
from typing import Any

from sqlalchemy import Connection, delete, select

from keel.votes import audit, people, schema
from keel.votes.codec import hashed
from keel.votes.database import insert_row, row_of
from keel.votes.kinds import Person

SESSION_DAYS = 30.0
API_PREFIX = "keel_"
_DAY = 86400.0


def begin(
    connection: Connection, kind: str, person_id: int, by: int | None, expires: float | None, now: float
) -> str:
    """A new session or API token of a person. expires: in seconds since 1970; None: never."""
    token = (API_PREFIX if kind == "api" else "") + secrets.token_urlsafe(32)
    row_id = insert_row(
        connection,
        schema.credentials,
        hash=hashed(token),
        kind=kind,
        person_id=person_id,
        created=now,
        expires=expires,
    )
    audit.append(connection, "credentials", row_id, kind, at=now, by=by)
    return token


def api_token(connection: Connection, person_id: int, by: int | None, days: float | None, now: float) -> str:
    """A token by which a program works as this person."""
    expires = None if days is None else now + days * _DAY
    return begin(connection, "api", people.person_row(connection, person_id).id, by, expires, now)


def bearer(connection: Connection, token: str, kind: str, now: float) -> Person | None:
    """Who has this session or token; None for nobody, and where it has expired."""
    row = row_of(connection, schema.credentials, hash=hashed(token))
    if row is None or row.kind != kind or (row.expires is not None and row.expires <= now):
        return None
    who = row_of(connection, schema.people, id=row.person_id)
    return people.person_of(who) if who.removed is None else None


def sign_out(connection: Connection, token: str, now: float) -> None:
    """End a session, or make an API token worthless."""
    table = schema.credentials
    _revoke(connection, table.c.hash == hashed(token), now)


def sign_out_everywhere(
    connection: Connection, person_id: int, by: int | None, now: float, but: str | None = None
) -> int:
    """End all of a person's sessions and tokens, but one. How many there were."""
    table = schema.credentials
    which = table.c.person_id == person_id
    return _revoke(connection, which if but is None else which & (table.c.hash != hashed(but)), now, by)


def _revoke(connection: Connection, which: Any, now: float, by: int | None = None) -> int:
    rows = connection.execute(
        select(schema.credentials.c.id, schema.credentials.c.person_id).where(which)
    ).all()
    for row in rows:
        connection.execute(delete(schema.credentials).where(schema.credentials.c.id == row.id))
        audit.append(connection, "credentials", row.id, "sign_out", at=now, by=by or row.person_id)
    return len(rows)
