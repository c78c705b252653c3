"""People: invitations, sessions, tokens, pauses, and forgetting them.

Codes and tokens are shown once. Kept is their SHA-256: they are 32 random bytes, so a hash says nothing.
"""

from __future__ import annotations

import secrets
import unicodedata
from types import SimpleNamespace
from typing import Any

from sqlalchemy import Connection, delete, func, or_, select, update

from keel.errors import UsageError
from keel.votes import audit, schema
from keel.votes.codec import clean, hashed, new_salt, salted
from keel.votes.database import insert_ignore, insert_row, row_of
from keel.votes.kinds import ROLES, Forgotten, NotFoundError, Person, Role
from keel.votes.projects import project_row

INVITATION_DAYS = 7.0
SESSION_DAYS = 30.0
LONGEST_NAME = 80
API_PREFIX = "keel_"
_DAY = 86400.0


# ---------------------------------------------------------------- who there is


def add(
    connection: Connection, name: str, role: Role, project: str | None, is_model: bool, by: int | None,
    now: float,
) -> Person:  # fmt: skip
    """A new person, or a model that votes. project: the only one they may work in; None: all."""
    if role not in ROLES:
        raise UsageError(f"a role is one of {', '.join(ROLES)}, not {role!r}")
    shown, key = checked_name(name)
    if connection.execute(select(schema.people.c.id).where(schema.people.c.name_key == key)).first():
        raise UsageError(f"there is somebody named {shown!r} already: choose another name")
    project_id = project_row(connection, project).id if project is not None else None
    salt = new_salt()
    person_id = insert_row(
        connection, schema.people,
        name=shown, name_key=key, salt=salt, name_digest=salted(salt, shown), role=role,
        is_model=is_model, everywhere=project is None, paused=None, created=now, removed=None,
    )  # fmt: skip
    audit.append(connection, "people", person_id, "person", at=now, by=by)
    if project_id is not None:
        let_in(connection, project_id, person_id, by, now)
    return Person(person_id, shown, role, is_model)


def checked_name(name: str) -> tuple[str, str]:
    """A name as it is shown, and as it is compared. UsageError for one that nobody could read."""
    shown = " ".join(unicodedata.normalize("NFKC", clean(name)).split())
    if not shown or len(shown) > LONGEST_NAME or any(unicodedata.category(c)[0] == "C" for c in shown):
        raise UsageError(f"a name has 1 to {LONGEST_NAME} characters that can be seen")
    if shown.casefold().startswith("removed-"):
        raise UsageError("names that begin with removed- are those of people who were forgotten")
    return shown, shown.casefold()


def person_row(connection: Connection, person_id: int) -> Any:
    """A person who is there. NotFoundError for nobody, and for one who was forgotten."""
    row = row_of(connection, schema.people, id=person_id)
    if row is None or row.removed is not None:
        raise NotFoundError(f"there is no person number {person_id}")
    return row


def person(connection: Connection, person_id: int) -> Person:
    return _person(person_row(connection, person_id))


def named(connection: Connection, name: str) -> Person:
    """The person with this name. NotFoundError where there is none."""
    key = " ".join(unicodedata.normalize("NFKC", clean(name)).split()).casefold()
    row = connection.execute(select(schema.people).where(schema.people.c.name_key == key)).one_or_none()
    if row is None or row.removed is not None:
        raise NotFoundError(f"there is nobody named {name!r}")
    return _person(row)


def people(connection: Connection, project: str | None) -> list[Person]:
    """Everybody, or everybody who may work in a project; with their pauses there."""
    table, seats = schema.people, schema.seats
    here = table.c.removed.is_(None)
    if project is None:
        rows = connection.execute(select(table).where(here).order_by(table.c.id))
        return [_person(row) for row in rows]
    project_id = project_row(connection, project).id
    joined = table.outerjoin(seats, (seats.c.person_id == table.c.id) & (seats.c.project_id == project_id))
    rows = connection.execute(
        select(table, seats.c.paused.label("paused_here"))
        .select_from(joined)
        .where(here, or_(table.c.everywhere, seats.c.invited))
        .order_by(table.c.id)
    )
    return [_person(row, row.paused_here) for row in rows]


def _person(row: Any, paused_here: str | None = None) -> Person:
    return Person(row.id, row.name, row.role, row.is_model, row.paused or paused_here)


# ---------------------------------------------------------------- seats


def seat_row(connection: Connection, project_id: int, person_id: int, *, lock: bool = True) -> Any:
    """A person's place in a project, locked until the end of the transaction, and made where there is none.

    lock False: only to be looked at; nothing is made.
    """
    seats = schema.seats
    place = {"project_id": project_id, "person_id": person_id}
    row = row_of(connection, seats, lock=lock, **place)
    if row is not None:
        return row
    new: dict[str, Any] = {
        "invited": False, "paused": None, "gold_since": 0.0, "served": 0, "gold_served": 0, "done": 0,
        "order_version": -1,
    }  # fmt: skip
    if not lock:
        return SimpleNamespace(id=None, **place, **new)
    if insert_ignore(connection, seats, {**place, **new}):
        row = row_of(connection, seats, lock=True, **place)
        audit.append(connection, "seats", row.id, "seat", at=0.0, by=None, project_id=project_id)
        return row
    return row_of(connection, seats, lock=True, **place)  # another request was faster


def let_in(connection: Connection, project_id: int, person_id: int, by: int | None, now: float) -> None:
    """A person may work in a project."""
    seat = seat_row(connection, project_id, person_id)
    if not seat.invited:
        connection.execute(update(schema.seats).where(schema.seats.c.id == seat.id).values(invited=True))
        audit.append(connection, "seats", seat.id, "let_in", at=now, by=by, project_id=project_id)


def set_paused(
    connection: Connection, person_id: int, reason: str | None, by: int | None, project: str | None,
    now: float,
) -> None:  # fmt: skip
    """Pause a person, in one project or everywhere, or (reason None) let them go on.

    Going on in a project forgives the gold answers so far.
    """
    row = person_row(connection, person_id)
    if project is None:
        connection.execute(update(schema.people).where(schema.people.c.id == row.id).values(paused=reason))
        audit.append(connection, "people", row.id, "paused" if reason else "goes_on", at=now, by=by)
        return
    pause_in(connection, project_row(connection, project).id, person_id, reason, by, now)


def pause_in(
    connection: Connection, project_id: int, person_id: int, reason: str | None, by: int | None, now: float
) -> None:
    seat = seat_row(connection, project_id, person_id)
    values: dict[str, Any] = {"paused": reason} if reason else {"paused": None, "gold_since": now}
    connection.execute(update(schema.seats).where(schema.seats.c.id == seat.id).values(**values))
    audit.append(
        connection, "seats", seat.id, "paused" if reason else "goes_on", at=now, by=by, project_id=project_id
    )


# ---------------------------------------------------------------- invitations, sessions, tokens


def invite(
    connection: Connection, role: Role, project: str | None, by: int | None, name: str, days: float,
    now: float,
) -> str:  # fmt: skip
    """A code that makes one person, once."""
    if role not in ROLES:
        raise UsageError(f"a role is one of {', '.join(ROLES)}, not {role!r}")
    project_id = project_row(connection, project).id if project is not None else None
    shown = checked_name(name)[0] if name else ""
    if (
        shown
        and connection.execute(
            select(schema.people.c.id).where(schema.people.c.name_key == shown.casefold())
        ).first()
    ):
        raise UsageError(f"there is somebody named {shown!r} already: ask for a sign-in link instead")
    return _invitation(connection, role, project_id, None, by, shown, days, now)


def sign_in_link(connection: Connection, person_id: int, by: int | None, days: float, now: float) -> str:
    """A code that signs a person in again, once: for a lost cookie or another machine."""
    row = person_row(connection, person_id)
    return _invitation(connection, row.role, None, row.id, by, "", days, now)


def _invitation(
    connection: Connection, role: str, project_id: int | None, person_id: int | None, by: int | None,
    name: str, days: float, now: float,
) -> str:  # fmt: skip
    code = secrets.token_urlsafe(32)
    row_id = insert_row(
        connection, schema.invitations,
        hash=hashed(code), role=role, project_id=project_id, person_id=person_id, name=name,
        created_by=by, created=now, expires=now + days * _DAY, used=None,
    )  # fmt: skip
    audit.append(connection, "invitations", row_id, "invite", at=now, by=by, project_id=project_id)
    return code


def invitation(connection: Connection, code: str, now: float) -> str | None:
    """The name that a code suggests (may be empty); None for a code that cannot be used."""
    row = _usable(connection, code, now)
    if row is None:
        return None
    return person_row(connection, row.person_id).name if row.person_id is not None else row.name


def _usable(connection: Connection, code: str, now: float, *, lock: bool = False) -> Any:
    query = select(schema.invitations).where(schema.invitations.c.hash == hashed(code))
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    return None if row is None or row.used is not None or row.expires <= now else row


def accept(connection: Connection, code: str, name: str, days: float, now: float) -> str:
    """A session for whom a code invites; the code is used up. UsageError for one that cannot be used."""
    row = _usable(connection, code, now, lock=True)  # who comes at the same time waits, and finds it used
    if row is None:
        raise UsageError("this invitation was used, has expired, or never was: ask for another one")
    if row.person_id is not None:
        person_id = person_row(connection, row.person_id).id
    else:
        person_id = add(connection, name or row.name, row.role, None, False, row.created_by, now).id
        if row.project_id is not None:
            connection.execute(
                update(schema.people).where(schema.people.c.id == person_id).values(everywhere=False)
            )
            audit.append(connection, "people", person_id, "person", at=now, by=row.created_by)
            let_in(connection, row.project_id, person_id, row.created_by, now)
    connection.execute(
        update(schema.invitations)
        .where(schema.invitations.c.id == row.id)
        .values(used=now, person_id=person_id)
    )
    audit.append(connection, "invitations", row.id, "accept", at=now, by=person_id, project_id=row.project_id)
    return _credential(connection, "session", person_id, person_id, now + days * _DAY, now)


def _credential(
    connection: Connection, kind: str, person_id: int, by: int | None, expires: float | None, now: float
) -> str:
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
    return _credential(connection, "api", person_row(connection, person_id).id, by, expires, now)


def bearer(connection: Connection, token: str, kind: str, now: float) -> Person | None:
    """Who has this session or token; None for nobody, and where it has expired."""
    row = row_of(connection, schema.credentials, hash=hashed(token))
    if row is None or row.kind != kind or (row.expires is not None and row.expires <= now):
        return None
    who = row_of(connection, schema.people, id=row.person_id)
    return _person(who) if who.removed is None else None


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


# ---------------------------------------------------------------- forgetting


def forget(connection: Connection, person_id: int, by: int | None, now: float) -> Forgotten:
    """Take away a person's name, comments, notes, remarks, sessions and tokens. Their votes stay, under a
    number, and the log still holds.

    UsageError for the only admin.
    """
    row = person_row(connection, person_id)
    people_, name = schema.people, f"removed-{person_id}"
    if row.role == "admin" and by is not None:
        admins = select(func.count()).where(people_.c.role == "admin", people_.c.removed.is_(None))
        if connection.execute(admins).scalar_one() == 1:
            raise UsageError("this is the only admin: make another one first")
    projects = _projects_of(connection, person_id)
    credentials = sign_out_everywhere(connection, person_id, by, now)
    comments = _blank(connection, schema.versions, "comment", person_id)
    comments += _blank(connection, schema.adjudications, "note", person_id)
    comments += _blank(connection, schema.flags, "reason", person_id)
    connection.execute(
        update(schema.invitations).where(schema.invitations.c.person_id == person_id).values(name="")
    )
    slots, encounters = schema.slots, schema.encounters
    connection.execute(
        update(slots)
        .where(slots.c.person_id == person_id, slots.c.vote_id.is_(None))
        .values(person_id=None, leased_until=0.0)
    )
    leased = (encounters.c.person_id == person_id) & (encounters.c.state == "leased")
    connection.execute(update(encounters).where(leased).values(leased_until=0.0))
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
