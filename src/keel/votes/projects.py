"""Projects: what people are asked, and the settings that can be changed while they work."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, delete, func, literal, or_, select, text, update

from keel.errors import UsageError
from keel.votes import audit, ballots, order, schema
from keel.votes.codec import clean, digest, project_json, project_of
from keel.votes.database import insert_row, row_of
from keel.votes.kinds import CHOICES, ORDERS, TASKS, NotFoundError, Project

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,99}")
_FIXED = ("name", "task", "seed", "scales")  # what votes that are there depend on
MOST_VOTES = 100  # people an item
LONGEST_REASON = 500  # characters of why a project is paused


def checked(project: Project) -> Project:
    """The project with clean texts. UsageError for settings that make no sense."""
    if not _NAME.fullmatch(project.name):
        raise UsageError(
            f"a project's name has small letters, digits, - and _, and begins with a letter or digit; "
            f"{project.name!r} has not"
        )
    if project.task not in TASKS:
        raise UsageError(f"a task is one of {', '.join(TASKS)}, not {project.task!r}")
    if project.order not in ORDERS:
        raise UsageError(f"an order is one of {', '.join(ORDERS)}, not {project.order!r}")
    if unknown := [choice for choice in project.allow if choice not in CHOICES["pairwise"][2:]]:
        raise UsageError(
            f"`allow` names {unknown[0]!r}, which is none of {', '.join(CHOICES['pairwise'][2:])}"
        )
    if project.strength and project.task != "pairwise":
        raise UsageError(f"`strength` is for pairwise projects; this one is {project.task}")
    if project.scales and project.task != "rating":
        raise UsageError(f"`scales` are for rating projects; this one is {project.task}")
    if not 1 <= project.votes_per_item <= MOST_VOTES:
        raise UsageError(f"`votes_per_item` is {project.votes_per_item}, not between 1 and {MOST_VOTES}")
    for name in ("random_share", "gold_share", "gold_floor"):
        if not 0 <= getattr(project, name) <= 1:
            raise UsageError(f"`{name}` is {getattr(project, name)}, not between 0 and 1")
    if project.gold_min < 1:
        raise UsageError(f"`gold_min` is {project.gold_min}, not 1 or more")
    if not 0 < project.lease_minutes <= 60 * 24 * 7:
        raise UsageError(f"`lease_minutes` is {project.lease_minutes:g}, not between 0 and a week")
    _check_scales(project)
    texts = {name: clean(getattr(project, name)) for name in ("title", "instructions", "examples", "paused")}
    return replace(project, scales=tuple(project.scales), allow=tuple(project.allow), **texts)


def _check_scales(project: Project) -> None:
    names = [scale.name for scale in project.scales]
    if len(set(names)) < len(names) or not all(names):
        raise UsageError("each scale has a name of its own")
    for scale in project.scales:
        if not scale.low < scale.high or scale.high - scale.low > 100:
            raise UsageError(f"the scale {scale.name!r} goes from {scale.low} to {scale.high}")


def create(connection: Connection, project: Project, by: int | None, now: float) -> Project:
    """A new project. UsageError where there is one of that name."""
    project = checked(project)
    if connection.execute(select(schema.projects.c.id).where(schema.projects.c.name == project.name)).first():
        raise UsageError(f"there is a project named {project.name!r} already: choose another name")
    project_id = insert_row(
        connection,
        schema.projects,
        name=project.name,
        settings=project_json(project),
        created=now,
        created_by=by,
    )
    revision = hashlib.sha256(f"{project.name} {now}".encode()).hexdigest()
    connection.execute(
        schema.tallies.insert().values(
            project_id=project_id, items=0, open_items=0, counted=0, order_version=0, revision=revision
        )
    )
    audit.append(connection, "projects", project_id, "create", at=now, by=by, project_id=project_id)
    return project


def project_row(connection: Connection, name: str, *, lock: bool = False) -> Any:
    """A project's row. NotFoundError where there is none. lock: who else asks so waits; votes do not."""
    row = row_of(connection, schema.projects, name=name)
    if lock:
        held = select(schema.projects.c.id).where(schema.projects.c.name == name)
        connection.execute(held.with_for_update(key_share=True))
    if row is None:
        raise NotFoundError(f"there is no project named {name!r}")
    return row


def keep_others_out(connection: Connection) -> None:
    """Wait until nobody is voting, and let nobody begin before this transaction ends: every vote first locks
    its person's seat. SQLite has one writer at a time anyway."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("LOCK TABLE seats IN EXCLUSIVE MODE"))


def project(connection: Connection, name: str) -> Project:
    return project_of(name, project_row(connection, name).settings)


def project_for(connection: Connection, name: str, person_id: int) -> Project:
    """A project's settings, for a person who may work there. NotFoundError for anybody else."""
    row = project_row(connection, name)
    person = row_of(connection, schema.people, id=person_id)
    seat = row_of(connection, schema.seats, project_id=row.id, person_id=person_id)
    if person is None or not (schema.sees_all(person) or (seat is not None and seat.invited)):
        raise NotFoundError(f"there is no project named {name!r}")
    return project_of(name, row.settings)


def projects(connection: Connection, person_id: int | None) -> list[Project]:
    """All projects by name, or those that a person may work in."""
    table, seats, people = schema.projects, schema.seats, schema.people
    query = select(table.c.name, table.c.settings).order_by(table.c.name)
    if person_id is not None:
        mine = select(seats.c.project_id).where(seats.c.person_id == person_id, seats.c.invited)
        everywhere = select(literal(1)).where(people.c.id == person_id, schema.sees_all(people.c))
        query = query.where(or_(table.c.id.in_(mine), everywhere.exists()))
    return [project_of(row.name, row.settings) for row in connection.execute(query)]


def change(
    connection: Connection, name: str, by: int | None, fields: Mapping[str, Any], now: float
) -> Project:
    """Change settings of a project. UsageError for one that votes depend on, or that there is not."""
    keep_others_out(connection)
    row = project_row(connection, name)
    before = project_of(name, row.settings)
    for field in fields:
        if field not in Project.__dataclass_fields__:
            raise UsageError(f"a project has no setting {field!r}")
        if field in _FIXED and fields[field] != getattr(before, field):
            raise UsageError(f"`{field}` cannot be changed: votes depend on it; make another project")
    after = checked(replace(before, **fields))
    connection.execute(
        update(schema.projects).where(schema.projects.c.id == row.id).values(settings=project_json(after))
    )
    opened = 0
    reorders = (after.order, after.random_share) != (before.order, before.random_share)
    if after.votes_per_item != before.votes_per_item:
        opened = _reslot(connection, row.id, before.votes_per_item, after.votes_per_item)
    if reorders:
        order.deal(connection, row.id, after)
    audit.append(
        connection, "projects", row.id, "change", at=now, by=by, project_id=row.id,
        change=audit.Change(open_items=opened, reorders=True, revises=False),
    )  # fmt: skip
    if after.votes_per_item > before.votes_per_item:
        _fill_with_surplus(connection, row.id, now)
    return after


def set_paused(connection: Connection, name: str, reason: str, by: int | None, now: float) -> Project:
    """Pause a project, for a reason that its people are told; an empty one: it goes on."""
    keep_others_out(connection)
    row = project_row(connection, name)
    after = checked(replace(project_of(name, row.settings), paused=reason.strip()[:LONGEST_REASON]))
    connection.execute(
        update(schema.projects).where(schema.projects.c.id == row.id).values(settings=project_json(after))
    )
    action = "paused" if after.paused else "goes_on"
    audit.append(connection, "projects", row.id, action, at=now, by=by, project_id=row.id)
    return after


def _reslot(connection: Connection, project_id: int, before: int, after: int) -> int:
    """Add slots to each item, or take those away that no vote fills. How many more items are open."""
    slots, items = schema.slots, schema.items
    usual = (items.c.project_id == project_id) & items.c.gold.is_(None)
    open_items = select(func.count()).where(usual, items.c.open_slots > 0)
    were_open = connection.execute(open_items).scalar_one()
    if after > before:
        for number in range(before, after):
            add_slots(connection, usual, number)
    else:
        mine = select(items.c.id).where(usual)
        connection.execute(
            delete(slots).where(slots.c.item_id.in_(mine), slots.c.number >= after, slots.c.vote_id.is_(None))
        )
    missing = select(func.count()).where(slots.c.item_id == items.c.id, slots.c.vote_id.is_(None))
    connection.execute(update(items).where(usual).values(open_slots=missing.scalar_subquery()))
    return connection.execute(open_items).scalar_one() - were_open


def _fill_with_surplus(connection: Connection, project_id: int, now: float) -> None:
    """Votes that were kept beside move into new slots."""
    items = schema.items
    waiting = select(items.c.id).where(
        items.c.project_id == project_id, items.c.open_slots > 0, items.c.surplus > 0
    )
    for item_id in connection.execute(waiting).scalars().all():
        while ballots.promote(connection, project_id, item_id, now):
            pass


def add_slots(connection: Connection, which: Any, number: int) -> None:
    """Slot `number` for each of some items, where they have none of that number."""
    items, slots = schema.items, schema.slots
    there = select(literal(1)).where(slots.c.item_id == items.c.id, slots.c.number == number)
    connection.execute(
        slots.insert().from_select(
            ["item_id", "number", "leased_until"],
            select(items.c.id, literal(number), literal(0.0)).where(which, ~there.exists()),
        )
    )


def revision(connection: Connection, name: str) -> str:
    """A text that changes whenever an item, a vote or an adjudication does."""
    row = project_row(connection, name)
    tallies = schema.tallies
    kept = connection.execute(select(tallies.c.revision).where(tallies.c.project_id == row.id)).scalar_one()
    return digest([kept])[:32]


def counts(connection: Connection, name: str) -> dict[str, int]:
    """Items (gold ones aside), those of them that are open, votes counted and wanted."""
    row, tallies = project_row(connection, name), schema.tallies
    found = connection.execute(select(tallies).where(tallies.c.project_id == row.id)).one()
    wanted = found.items * project_of(name, row.settings).votes_per_item
    return {"items": found.items, "open": found.open_items, "counted": found.counted, "wanted": wanted}
