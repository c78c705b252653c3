"""Invitations: links that let one person in, once; and links that sign somebody in again.

Codes are shown once. Kept is their SHA-256: they are 32 random bytes, so a hash says nothing.
"""

from __future__ import annotations

import secrets
from typing import Any

from sqlalchemy import Connection, select, update

from keel.errors import UsageError
from keel.votes import audit, people, schema, sessions
from keel.votes.codec import hashed
from keel.votes.database import insert_row, row_of
from keel.votes.kinds import (
    ROLES,
    GoneError,
    Invitation,
    InvitationState,
    NotFoundError,
    Role,
    TakenError,
)
from keel.votes.projects import project_row

INVITATION_DAYS = 7.0
FIRST = "first"  # origin of an invitation that a server made when there was no admin
_DAY = 86400.0


def invite(
    connection: Connection, role: Role, project: str | None, by: int | None, name: str, days: float,
    now: float,
) -> str:  # fmt: skip
    """A code that makes one person, once."""
    if role not in ROLES:
        raise UsageError(f"a role is one of {', '.join(ROLES)}, not {role!r}")
    project_id = project_row(connection, project).id if project is not None else None
    shown = people.checked_name(name)[0] if name else ""
    if (
        shown
        and connection.execute(
            select(schema.people.c.id).where(schema.people.c.name_key == shown.casefold())
        ).first()
    ):
        raise TakenError(f"there is somebody named {shown!r} already: ask for a sign-in link instead")
    return _invitation(connection, role, project_id, None, by, shown, days, now)


def sign_in_link(connection: Connection, person_id: int, by: int | None, days: float, now: float) -> str:
    """A code that signs a person in again, once: for a lost cookie or another machine."""
    row = people.person_row(connection, person_id)
    return _invitation(connection, row.role, None, row.id, by, "", days, now)


def first_admin(connection: Connection, days: float, now: float) -> tuple[str, int] | None:
    """A code for the first admin, and how many earlier ones it replaces; None where there is an admin."""
    people_, table = schema.people, schema.invitations
    admins = select(people_.c.id).where(people_.c.role == "admin", people_.c.removed.is_(None))
    if connection.execute(admins.limit(1)).first() is not None:
        return None
    earlier = select(table.c.id).where(
        table.c.origin == FIRST, table.c.used.is_(None), table.c.withdrawn.is_(None), table.c.expires > now
    )
    before = connection.execute(earlier).scalars().all()
    for number in before:
        withdraw(connection, number, None, now)
    return _invitation(connection, "admin", None, None, None, "", days, now, FIRST), len(before)


def _invitation(
    connection: Connection, role: str, project_id: int | None, person_id: int | None, by: int | None,
    name: str, days: float, now: float, origin: str | None = None,
) -> str:  # fmt: skip
    code = secrets.token_urlsafe(32)
    row_id = insert_row(
        connection, schema.invitations,
        hash=hashed(code), role=role, project_id=project_id, person_id=person_id, name=name,
        created_by=by, created=now, expires=now + days * _DAY, used=None, withdrawn=None, origin=origin,
    )  # fmt: skip
    audit.append(connection, "invitations", row_id, "invite", at=now, by=by, project_id=project_id)
    return code


def invitation(connection: Connection, code: str, now: float) -> str | None:
    """The name that a code suggests (may be empty); None for a code that cannot be used."""
    row = _usable(connection, code, now)
    if row is None:
        return None
    return people.person_row(connection, row.person_id).name if row.person_id is not None else row.name


def _usable(connection: Connection, code: str, now: float, *, lock: bool = False) -> Any:
    query = select(schema.invitations).where(schema.invitations.c.hash == hashed(code))
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    return row if row is not None and _state(row, now) == "open" else None


def _state(row: Any, now: float) -> InvitationState:
    if row.used is not None:
        return "used"
    if row.withdrawn is not None:
        return "withdrawn"
    return "expired" if row.expires <= now else "open"


def state_of_code(connection: Connection, code: str, now: float) -> InvitationState | None:
    """What has become of a code; None for one that never was."""
    row = row_of(connection, schema.invitations, hash=hashed(code))
    return None if row is None else _state(row, now)


def invitations(
    connection: Connection, project: str | None, now: float, number: int | None = None
) -> list[Invitation]:
    """All invitations, the newest first. project: those into it, into all, and of its people; number: one."""
    table, people_, projects = schema.invitations, schema.people, schema.projects
    maker = people_.alias("maker")
    joined = (
        table.outerjoin(people_, people_.c.id == table.c.person_id)
        .outerjoin(maker, maker.c.id == table.c.created_by)
        .outerjoin(projects, projects.c.id == table.c.project_id)
    )
    columns = (
        people_.c.name.label("whose"), people_.c.created.label("since"), maker.c.name.label("maker"),
        projects.c.name.label("into"),
    )  # fmt: skip
    query = select(table, *columns).select_from(joined).order_by(table.c.id.desc())
    if number is not None:
        query = query.where(table.c.id == number)
    if project is not None:
        project_id, seats = project_row(connection, project).id, schema.seats
        there = select(seats.c.person_id).where(seats.c.project_id == project_id, seats.c.invited)
        everybodys = people_.c.id.is_(None) | schema.sees_all(people_.c) | people_.c.id.in_(there)
        query = query.where((table.c.project_id == project_id) | (table.c.project_id.is_(None) & everybodys))
    return [
        Invitation(
            id=row.id, role=row.role, project=row.into, name=row.whose or row.name,
            again=row.person_id is not None and row.since < row.created,
            by=row.maker, created=row.created, expires=row.expires, state=_state(row, now),
        )
        for row in connection.execute(query)
    ]  # fmt: skip


def withdraw(connection: Connection, number: int, by: int | None, now: float) -> Invitation:
    """Make an open invitation worthless. NotFoundError for none, UsageError for one that is not open."""
    table = schema.invitations
    row = row_of(connection, table, lock=True, id=number)  # who comes by it now waits, and finds it withdrawn
    if row is None:
        raise NotFoundError(f"there is no invitation number {number}")
    if (state := _state(row, now)) != "open":
        said = {"used": "was used", "withdrawn": "was withdrawn before", "expired": "has expired"}[state]
        raise UsageError(f"invitation {number} {said}: there is nothing to withdraw")
    connection.execute(update(table).where(table.c.id == number).values(withdrawn=now))
    audit.append(connection, "invitations", number, "withdraw", at=now, by=by, project_id=row.project_id)
    return invitations(connection, None, now, number)[0]


def withdraw_of(connection: Connection, person_id: int, by: int | None, now: float) -> None:
    """Make the links that sign a person in again worthless."""
    table = schema.invitations
    own = select(table.c.id).where(
        table.c.person_id == person_id, table.c.used.is_(None), table.c.withdrawn.is_(None),
        table.c.expires > now,
    )  # fmt: skip
    for number in connection.execute(own.order_by(table.c.id)).scalars().all():
        withdraw(connection, number, by, now)


def accept(connection: Connection, code: str, name: str, days: float, now: float) -> str:
    """A session for whom a code invites; the code is used up. UsageError for one that cannot be used."""
    row = _usable(connection, code, now, lock=True)  # who comes at the same time waits, and finds it used
    if row is None:
        kind = UsageError if state_of_code(connection, code, now) is None else GoneError
        raise kind("this invitation was used, has expired, or never was: ask for another one")
    if row.person_id is not None:
        person_id = people.person_row(connection, row.person_id).id
    else:
        person_id = people.add(connection, name or row.name, row.role, None, False, row.created_by, now).id
        if row.project_id is not None:
            connection.execute(
                update(schema.people).where(schema.people.c.id == person_id).values(everywhere=False)
            )
            audit.append(connection, "people", person_id, "person", at=now, by=row.created_by)
            people.let_in(connection, row.project_id, person_id, row.created_by, now)
    connection.execute(
        update(schema.invitations)
        .where(schema.invitations.c.id == row.id)
        .values(used=now, person_id=person_id)
    )
    audit.append(connection, "invitations", row.id, "accept", at=now, by=person_id, project_id=row.project_id)
    return sessions.begin(connection, "session", person_id, person_id, now + days * _DAY, now)
