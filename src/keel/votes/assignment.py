"""Who judges what next.

A slot is leased to one person at a time; a lease ends by itself. Nobody is given an item that they judged.
What they skipped comes again only when nothing else is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, func, literal, select, update

from keel.votes import audit, ballots, order, schema
from keel.votes.codec import answer_of, clean, dumps, loads, new_salt, project_of, replies_of, salted
from keel.votes.database import insert_row, upsert
from keel.votes.kinds import Assignment, How, NotFoundError, PausedError, Project, Reply
from keel.votes.people import person_row, seat_row
from keel.votes.projects import project_row


@dataclass(frozen=True, slots=True)
class Desk:
    """A person in a project: what every request of theirs begins with."""

    project_id: int
    project: Project
    person: Any  # row of people
    seat: Any  # row of seats, locked

    @property
    def paused(self) -> str | None:
        return self.person.paused or self.seat.paused


def desk(connection: Connection, name: str, person_id: int, *, lock: bool = True) -> Desk:
    """The desk of a person. NotFoundError for nobody, and for a project that they may not work in."""
    row, person = project_row(connection, name), person_row(connection, person_id)
    seat = seat_row(connection, row.id, person.id, lock=lock)
    if person.role == "viewer" or not (person.everywhere or seat.invited):
        raise NotFoundError(f"there is no project named {name!r} for {person.name} to vote in")
    return Desk(row.id, project_of(name, row.settings), person, seat)


def next_item(connection: Connection, name: str, person_id: int, now: float) -> Assignment | None:
    """A person's next item, leased to them; None where nothing is left, and for one who is paused.

    An item whose lease still runs comes first, the newest of several.
    """
    at = desk(connection, name, person_id)
    if at.paused:
        return None
    if (running := _running(connection, at, now)) is not None:
        return _lease(connection, at, running.item_id, running.slot, running.how, now)
    if _gold_is_due(at) and (gold := _gold(connection, at)) is not None:
        return _lease(connection, at, gold, None, "gold", now)
    for stream in order.streams(at.project, at.person.id, at.seat.served, open_only=not at.person.is_model):
        found = _along(connection, at, stream, now)
        if found is not None:
            return _lease(connection, at, *found, stream.how, now)
    found = _skipped(connection, at, now)
    return None if found is None else _lease(connection, at, *found, now)


def _running(connection: Connection, at: Desk, now: float) -> Any:
    """The newest item that is leased to this person, if its slot is still theirs. Gold stays until it is
    answered or skipped: letting its time run out is no way around it."""
    mine, slots = schema.encounters, schema.slots
    joined = mine.outerjoin(slots, (slots.c.item_id == mine.c.item_id) & (slots.c.number == mine.c.slot))
    return connection.execute(
        select(mine)
        .select_from(joined)
        .where(
            mine.c.person_id == at.person.id, mine.c.project_id == at.project_id,
            mine.c.state == "leased", (mine.c.leased_until > now) | (mine.c.how == "gold"),
            mine.c.slot.is_(None) | ((slots.c.person_id == at.person.id) & slots.c.vote_id.is_(None)),
        )
        .order_by(mine.c.leased_at.desc(), mine.c.item_id.desc())
        .limit(1)
    ).one_or_none()  # fmt: skip


# ---------------------------------------------------------------- gold


def _gold_is_due(at: Desk) -> bool:
    """Whether the next item is to be a gold one: once in each block of 1/gold_share items, at a place of it
    that is drawn by person and block."""
    every = _every(at.project)
    if every is None:
        return False
    block, place = divmod(at.seat.served, every)
    return at.seat.gold_served <= block and place >= _gold_place(at, block, every)


def _every(project: Project) -> int | None:
    return max(1, round(1 / project.gold_share)) if project.gold_share > 0 else None


def _gold_place(at: Desk, block: int, every: int) -> int:
    return int(order.unit("gold", at.project.seed, at.person.id, block) * every)


def gold_to_come(connection: Connection, at: Desk, usual: int) -> int:
    """Gold items that this person meets until `usual` others are done, as far as there are any; what is
    leased to them now is among both."""
    mine, items, every = schema.encounters, schema.items, _every(at.project)
    query = (
        select(items.c.gold.is_not(None), func.count())
        .select_from(mine)
        .join(items, items.c.id == mine.c.item_id)
        .where(
            mine.c.person_id == at.person.id, mine.c.project_id == at.project_id, mine.c.state == "leased"
        )
        .group_by(items.c.gold.is_not(None))
    )  # fmt: skip
    leased = {bool(is_gold): count for is_gold, count in connection.execute(query)}
    usual = max(0, usual - leased.get(False, 0))  # of which none was handed out yet
    return leased.get(True, 0) + (_gold_among(connection, at, usual, every) if every and usual else 0)


def _gold_among(connection: Connection, at: Desk, usual: int, every: int) -> int:
    """Gold items among those that are handed out from now on, until `usual` others were."""
    block, place = divmod(at.seat.served, every)
    coming = 0
    if at.seat.gold_served <= block:  # this block's is still to come
        if usual < _gold_place(at, block, every) - place:
            return 0
        coming, usual = 1, usual + 1
    usual -= min(usual, every - place)
    if every == 1:
        coming += usual
    else:
        blocks, rest = divmod(usual, every - 1)
        coming += blocks + (rest > 0 and rest >= _gold_place(at, block + 1 + blocks, every))
    return min(coming, len(_unseen_gold(connection, at)))


def _unseen_gold(connection: Connection, at: Desk) -> list[tuple[int, str]]:
    """The gold items that this person has not met: (number, key)."""
    items, mine = schema.items, schema.encounters
    met = select(literal(1)).where(mine.c.item_id == items.c.id, mine.c.person_id == at.person.id)
    found = connection.execute(
        select(items.c.id, items.c.key)
        .where(items.c.project_id == at.project_id, items.c.gold.is_not(None), ~met.exists())
        .order_by(items.c.rank)
        .limit(1000)
    )
    return [(row.id, row.key) for row in found]


def _gold(connection: Connection, at: Desk) -> int | None:
    """A gold item for this person: each has an order of their own."""
    unseen = _unseen_gold(connection, at)
    if not unseen:
        return None
    return min(unseen, key=lambda one: order.unit("gold order", at.person.id, one[1]))[0]


# ---------------------------------------------------------------- the others


def _along(
    connection: Connection, at: Desk, stream: order.Stream, now: float
) -> tuple[int, int | None] | None:
    """The first item of an order that this person may have, with its slot, locked; None for none."""
    start = stream.start(at.seat)
    for after in (start, None) if start is not None else (None,):
        passed, solid = None, True  # up to where everything was judged by this person
        for batch in stream.batches(connection, at.project_id, after):
            judged, skipped = _met(connection, at, [item for item, _ in batch])
            free = _free(connection, at, [i for i, _ in batch if i not in judged and i not in skipped], now)
            for item, place in batch:
                solid = solid and item in judged
                passed = place if solid else passed
                if item in free and (taken := _take(connection, at, item, now)) is not None:
                    _remember(connection, at, stream, passed)
                    return item, None if at.person.is_model else taken
        if passed is not None:
            _remember(connection, at, stream, passed)
    return None


def _met(connection: Connection, at: Desk, ids: list[int]) -> tuple[set[int], set[int]]:
    """Which of these items the person has judged, and skipped."""
    mine = schema.encounters
    rows = connection.execute(
        select(mine.c.item_id, mine.c.state).where(
            mine.c.person_id == at.person.id, mine.c.item_id.in_(ids), mine.c.state != "leased"
        )
    ).all()
    return {r.item_id for r in rows if r.state == "judged"}, {r.item_id for r in rows if r.state == "skipped"}


def _free(connection: Connection, at: Desk, ids: list[int], now: float) -> set[int]:
    """Which of these items have a slot that nobody holds. A model needs none."""
    if at.person.is_model or not ids:
        return set(ids)
    slots = schema.slots
    free = select(slots.c.item_id).where(
        slots.c.item_id.in_(ids), slots.c.vote_id.is_(None), slots.c.leased_until <= now
    )
    return set(connection.execute(free.distinct()).scalars())


def _take(connection: Connection, at: Desk, item: int, now: float) -> int | None:
    """A free slot of an item, locked; None where others were faster. Surplus votes take theirs first."""
    if at.person.is_model:
        return 0
    items = schema.items
    surplus = connection.execute(select(items.c.surplus).where(items.c.id == item)).scalar_one()
    while surplus and ballots.promote(connection, at.project_id, item, now):
        surplus -= 1
    slot = ballots.free_slot(connection, item, now)
    return None if slot is None else slot.number


def _remember(connection: Connection, at: Desk, stream: order.Stream, place: tuple[Any, ...] | None) -> None:
    if place is not None:
        seats = schema.seats
        connection.execute(update(seats).where(seats.c.id == at.seat.id).values(**stream.cursor(place)))


def _skipped(connection: Connection, at: Desk, now: float) -> tuple[int, int | None, How] | None:
    """An item that this person skipped, the one that was skipped longest ago first."""
    mine, items = schema.encounters, schema.items
    query = (
        select(mine.c.item_id, mine.c.how)
        .join(items, items.c.id == mine.c.item_id)
        .where(
            mine.c.person_id == at.person.id, mine.c.project_id == at.project_id,
            mine.c.state == "skipped", items.c.gold.is_(None),
        )
        .order_by(mine.c.leased_at, mine.c.item_id)
        .limit(200)
    )  # fmt: skip
    if not at.person.is_model:
        query = query.where(items.c.open_slots > 0)
    for row in connection.execute(query).all():
        if (taken := _take(connection, at, row.item_id, now)) is not None:
            return row.item_id, None if at.person.is_model else taken, row.how
    return None


# ---------------------------------------------------------------- leases


def _lease(
    connection: Connection, at: Desk, item_id: int, slot: int | None, how: How, now: float
) -> Assignment:
    """Lease an item to a person, with the slot if there is one. How it is shown stays as it was the first
    time: an old page may still be open."""
    until, mine, slots = now + 60 * at.project.lease_minutes, schema.encounters, schema.slots
    if slot is not None:
        connection.execute(
            update(slots)
            .where(slots.c.item_id == item_id, slots.c.number == slot)
            .values(person_id=at.person.id, leased_until=until)
        )
    item = connection.execute(select(schema.items).where(schema.items.c.id == item_id)).one()
    before = _encounter(connection, item_id, at.person.id)
    if before is not None:
        shown = before.shown
    else:
        number = slot if slot is not None else _met_by(connection, item_id)
        shown = dumps(order.shown(at.project, item.key, len(replies_of(item.replies)), number))
        seats = schema.seats
        connection.execute(
            update(seats)
            .where(seats.c.id == at.seat.id)
            .values(served=seats.c.served + 1, gold_served=seats.c.gold_served + int(how == "gold"))
        )
    row = {
        "item_id": item_id, "person_id": at.person.id, "project_id": at.project_id, "slot": slot,
        "shown": shown, "how": how, "state": "leased", "leased_at": now, "leased_until": until,
    }  # fmt: skip
    upsert(connection, mine, row, ("slot", "state", "leased_at", "leased_until"))
    return _assignment(at.project, item, tuple(loads(shown)), slot or 0, until, how, None)


def _met_by(connection: Connection, item_id: int) -> int:
    mine = schema.encounters
    return connection.execute(select(func.count()).where(mine.c.item_id == item_id)).scalar_one()


def _encounter(connection: Connection, item_id: int, person_id: int) -> Any:
    mine = schema.encounters
    return connection.execute(
        select(mine).where(mine.c.item_id == item_id, mine.c.person_id == person_id)
    ).one_or_none()


def encounter(connection: Connection, at: Desk, item_id: int) -> Any:
    """How this person met an item. NotFoundError for one that they never did: there may be none."""
    row = _encounter(connection, item_id, at.person.id)
    if row is None or row.project_id != at.project_id:
        raise NotFoundError(f"{at.person.name} was given no item number {item_id} in {at.project.name}")
    return row


def _assignment(
    project: Project, item: Any, shown: tuple[int, ...], slot: int, until: float, how: How, previous: Any
) -> Assignment:
    replies = replies_of(item.replies)
    return Assignment(
        item=item.id,
        slot=slot,
        key=item.key,
        task=project.task,
        prompt=loads(item.prompt),
        replies=tuple(Reply(replies[index].content) for index in shown),
        shown=shown,
        leased_until=until,
        previous=previous,
        how=how,
    )


def assignment(connection: Connection, name: str, person_id: int, item_id: int) -> Assignment:
    """An item that a person was given, as they saw it, with what they said of it."""
    at = desk(connection, name, person_id, lock=False)
    met = encounter(connection, at, item_id)
    item = connection.execute(select(schema.items).where(schema.items.c.id == item_id)).one()
    vote = vote_of(connection, item_id, at.person.id)
    previous = None
    if vote is not None and not vote.withdrawn:
        holds = ballots.standing(connection, vote)
        previous = answer_of(holds.answer, holds.comment)
    how = met.how if previous is None else "edit"
    shown = tuple(loads(met.shown))
    return _assignment(at.project, item, shown, met.slot or 0, met.leased_until, how, previous)


def vote_of(connection: Connection, item_id: int, person_id: int) -> Any:
    """A person's vote on an item, withdrawn or not; None where there is none."""
    votes = schema.votes
    return connection.execute(
        select(votes).where(votes.c.item_id == item_id, votes.c.person_id == person_id)
    ).one_or_none()


def skip(connection: Connection, name: str, person_id: int, item_id: int, now: float) -> None:
    """A person does not want to judge an item: its slot is free again. One that they judged stays judged."""
    at = desk(connection, name, person_id)
    met, mine, slots = encounter(connection, at, item_id), schema.encounters, schema.slots
    if met.state == "judged":
        return
    connection.execute(
        update(mine)
        .where(mine.c.item_id == item_id, mine.c.person_id == at.person.id)
        .values(state="skipped", leased_at=now, leased_until=0.0)
    )
    freed = connection.execute(
        update(slots)
        .where(slots.c.item_id == item_id, slots.c.person_id == at.person.id, slots.c.vote_id.is_(None))
        .values(person_id=None, leased_until=0.0)
    ).rowcount
    if freed:
        ballots.promote(connection, at.project_id, item_id, now)


def flag(connection: Connection, name: str, person_id: int, item_id: int, reason: str, now: float) -> None:
    """Note that something is wrong with an item. It stays leased."""
    at = desk(connection, name, person_id)
    encounter(connection, at, item_id)
    salt, said = new_salt(), clean(reason)[:10_000]
    row_id = insert_row(
        connection, schema.flags,
        project_id=at.project_id, item_id=item_id, person_id=at.person.id, reason=said,
        reason_digest=salted(salt, said), salt=salt, at=now,
    )  # fmt: skip
    audit.append(
        connection, "flags", row_id, "flag", at=now, by=at.person.id, project_id=at.project_id,
        change=audit.Change(revises=False),
    )  # fmt: skip


def refuse_paused(at: Desk) -> None:
    """PausedError for a desk whose person is paused."""
    if at.paused:
        raise PausedError(f"{at.person.name} is paused in {at.project.name}: {at.paused}")
