"""People: who there is, where they may work, their roles and pauses."""

from __future__ import annotations

import unicodedata
from types import SimpleNamespace
from typing import Any

from sqlalchemy import Connection, or_, select, update

from keel.errors import UsageError
from keel.votes import audit, schema
from keel.votes.codec import clean, new_salt, salted
from keel.votes.database import insert_ignore, insert_row, row_of
from keel.votes.kinds import ROLES, NotFoundError, Person, Role, TakenError
from keel.votes.projects import project_row

LONGEST_NAME = 80


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
        raise TakenError(f"there is somebody named {shown!r} already: choose another name")
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
    return person_of(person_row(connection, person_id))


def named(connection: Connection, name: str) -> Person:
    """The person with this name. NotFoundError where there is none."""
    key = " ".join(unicodedata.normalize("NFKC", clean(name)).split()).casefold()
    row = connection.execute(select(schema.people).where(schema.people.c.name_key == key)).one_or_none()
    if row is None or row.removed is not None:
        raise NotFoundError(f"there is nobody named {name!r}")
    return person_of(row)


def people(connection: Connection, project: str | None) -> list[Person]:
    """Everybody, or everybody who may work in a project; with their pauses there."""
    table, seats = schema.people, schema.seats
    here = table.c.removed.is_(None)
    if project is None:
        rows = connection.execute(select(table).where(here).order_by(table.c.id))
        return [person_of(row) for row in rows]
    project_id = project_row(connection, project).id
    joined = table.outerjoin(seats, (seats.c.person_id == table.c.id) & (seats.c.project_id == project_id))
    rows = connection.execute(
        select(table, seats.c.paused.label("paused_here"))
        .select_from(joined)
        .where(here, or_(schema.sees_all(table.c), seats.c.invited))
        .order_by(table.c.id)
    )
    return [person_of(row, row.paused_here) for row in rows]


def person_of(row: Any, paused_here: str | None = None) -> Person:
    """A row of people as a person; paused_here: why they are in a project."""
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


def set_role(connection: Connection, person_id: int, role: Role, by: int | None, now: float) -> Person:
    """Another role for a person, in every request from now on. An admin may work in every project, and who is
    one no longer in those that they were let into before; who becomes a viewer gives back what they hold.

    UsageError for a model, and for the only admin where a person asks (the machine's owner can make another).
    """
    row = person_row(connection, person_id)
    if role not in ROLES:
        raise UsageError(f"a role is one of {', '.join(ROLES)}, not {role!r}")
    if row.is_model and role != "annotator":
        raise UsageError(f"{row.name} is a model: it annotates")
    if row.role == role:
        return person_of(row)
    if by is not None:
        keep_an_admin(connection, row)
    table = schema.people
    connection.execute(update(table).where(table.c.id == row.id).values(role=role))
    if role == "viewer" or (row.role == "admin" and not row.everywhere):
        give_back(connection, row.id)
    audit.append(connection, "people", row.id, f"role:{role}", at=now, by=by)
    return person_of(person_row(connection, row.id))


def keep_an_admin(connection: Connection, row: Any) -> None:
    """UsageError where this is the only admin. The admins' rows are locked: two cannot end each other."""
    table = schema.people
    admins = select(table.c.id).where(table.c.role == "admin", table.c.removed.is_(None))
    if row.role == "admin" and len(connection.execute(admins.with_for_update()).all()) == 1:
        raise UsageError("this is the only admin: make another one first")


def give_back(connection: Connection, person_id: int) -> None:
    """What is leased to a person is free for others."""
    slots, encounters = schema.slots, schema.encounters
    connection.execute(
        update(slots)
        .where(slots.c.person_id == person_id, slots.c.vote_id.is_(None))
        .values(person_id=None, leased_until=0.0)
    )
    leased = (encounters.c.person_id == person_id) & (encounters.c.state == "leased")
    connection.execute(update(encounters).where(leased).values(leased_until=0.0))
