"""Who judges what next.

A slot is leased to one person at a time; a lease ends by itself. Nobody is given an item that they judged.
What they skipped comes again only when nothing else is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import Connection, bindparam, func, literal, select, update

from keel.votes import audit, ballots, order, requests, schema
from keel.votes.codec import answer_of, clean, dumps, loads, new_salt, project_of, replies_of, salted
from keel.votes.database import add_to, change_rows, insert_row, row_of, upsert
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
        """Why nothing is handed out here: to this person, or to anybody."""
        return self.own_pause or self.project.paused or None

    @property
    def own_pause(self) -> str | None:
        return self.person.paused or self.seat.paused


def desk(connection: Connection, name: str, person_id: int, *, lock: bool = True) -> Desk:
    """The desk of a person. NotFoundError for nobody, and for a project that they may not work in."""
    row, person = project_row(connection, name), person_row(connection, person_id)
    seat = seat_row(connection, row.id, person.id, lock=lock)
    if person.role == "viewer" or not (schema.sees_all(person) or seat.invited):
        raise NotFoundError(f"there is no project named {name!r} for {person.name} to vote in")
    return Desk(row.id, project_of(name, row.settings), person, seat)


def next_item(connection: Connection, name: str, person_id: int, now: float) -> Assignment | None:
    """A person's next item, leased to them; None where nothing is left, and where they or all are paused.

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
    values = {"person": at.person.id, "project": at.project_id, "now": now}
    return connection.execute(_running_lease(), values).one_or_none()


@cache
def _running_lease() -> Any:
    mine, slots, person = schema.encounters, schema.slots, bindparam("person")
    joined = mine.outerjoin(slots, (slots.c.item_id == mine.c.item_id) & (slots.c.number == mine.c.slot))
    return (
        select(mine)
        .select_from(joined)
        .where(
            mine.c.person_id == person, mine.c.project_id == bindparam("project"),
            mine.c.state == "leased", (mine.c.leased_until > bindparam("now")) | (mine.c.how == "gold"),
            mine.c.slot.is_(None) | ((slots.c.person_id == person) & slots.c.vote_id.is_(None)),
        )
        .order_by(mine.c.leased_at.desc(), mine.c.item_id.desc())
        .limit(1)
    )  # fmt: skip


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
    every, values = _every(at.project), {"person": at.person.id, "project": at.project_id}
    leased = {how == "gold": 0 for how in ("gold", "others")}
    for row in connection.execute(_leased(), values):
        leased[row.how == "gold"] += row.number
    usual = max(0, usual - leased.get(False, 0))  # of which none was handed out yet
    return leased.get(True, 0) + (_gold_among(connection, at, usual, every) if every and usual else 0)


@cache
def _leased() -> Any:
    """What is a person's now, and the gold that they skipped: it comes again."""
    mine = schema.encounters
    return (
        select(mine.c.how, func.count().label("number"))
        .where(
            mine.c.person_id == bindparam("person"), mine.c.project_id == bindparam("project"),
            (mine.c.state == "leased") | ((mine.c.state == "skipped") & (mine.c.how == "gold")),
        )
        .group_by(mine.c.how)
    )  # fmt: skip


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
    found = connection.execute(_gold_not_met(), {"person": at.person.id, "project": at.project_id})
    return [(row.id, row.key) for row in found]


@cache
def _gold_not_met() -> Any:
    items, mine = schema.items, schema.encounters
    met = select(literal(1)).where(mine.c.item_id == items.c.id, mine.c.person_id == bindparam("person"))
    return (
        select(items.c.id, items.c.key)
        .where(items.c.project_id == bindparam("project"), items.c.gold.is_not(None), ~met.exists())
        .order_by(items.c.rank)
        .limit(1000)
    )


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
    version = row_of(connection, schema.tallies, project_id=at.project_id).order_version
    start = stream.start(at.seat, version)
    for after in (start, None) if start is not None else (None,):
        passed, solid = None, True  # up to where everything was judged by this person
        for batch in stream.batches(connection, at.project_id, after):
            judged, skipped = _met(connection, at, [item for item, _ in batch])
            free = _free(connection, at, [i for i, _ in batch if i not in judged and i not in skipped], now)
            for item, place in batch:
                solid = solid and item in judged
                passed = place if solid else passed
                if item in free and (taken := _take(connection, at, item, now)) is not None:
                    _remember(connection, at, stream, passed, version)
                    return item, None if at.person.is_model else taken
        if passed is not None:
            _remember(connection, at, stream, passed, version)
    return None


def _met(connection: Connection, at: Desk, ids: list[int]) -> tuple[set[int], set[int]]:
    """Which of these items the person has judged, and skipped."""
    rows = connection.execute(_met_of(), {"person": at.person.id, "items": ids}).all()
    return {r.item_id for r in rows if r.state == "judged"}, {r.item_id for r in rows if r.state == "skipped"}


@cache
def _met_of() -> Any:
    mine = schema.encounters
    return select(mine.c.item_id, mine.c.state).where(
        mine.c.person_id == bindparam("person"), mine.c.item_id.in_(bindparam("items", expanding=True)),
        mine.c.state != "leased",
    )  # fmt: skip


def _free(connection: Connection, at: Desk, ids: list[int], now: float) -> set[int]:
    """Which of these items have a slot that nobody holds. A model needs none."""
    if at.person.is_model or not ids:
        return set(ids)
    return set(connection.execute(_free_of(), {"items": ids, "now": now}).scalars())


@cache
def _free_of() -> Any:
    slots = schema.slots
    return select(slots.c.item_id).where(
        slots.c.item_id.in_(bindparam("items", expanding=True)), slots.c.vote_id.is_(None),
        slots.c.leased_until <= bindparam("now"),
    )  # fmt: skip


def _take(connection: Connection, at: Desk, item: int, now: float) -> int | None:
    """A free slot of an item, locked; None where others were faster. Surplus votes take theirs first."""
    if at.person.is_model:
        return 0
    surplus = row_of(connection, schema.items, id=item).surplus
    while surplus and ballots.promote(connection, at.project_id, item, now):
        surplus -= 1
    slot = ballots.free_slot(connection, item, now)
    return None if slot is None else slot.number


def _remember(
    connection: Connection, at: Desk, stream: order.Stream, place: tuple[Any, ...] | None, version: int
) -> None:
    """Keep a place in the order; places in an older one are dropped."""
    if place is None:
        return
    old = {"rank_cursor": None, "urgency_cursor": None, "urgency_rank_cursor": None}
    values = {**(old if at.seat.order_version != version else {}), **stream.cursor(place)}
    change_rows(connection, schema.seats, {"id": at.seat.id}, order_version=version, **values)


def _skipped(connection: Connection, at: Desk, now: float) -> tuple[int, int | None, How] | None:
    """An item that this person skipped, the one that was skipped longest ago first; gold too: skipping is no
    way around it."""
    mine, items = schema.encounters, schema.items
    query = (
        select(mine.c.item_id, mine.c.how, items.c.gold)
        .join(items, items.c.id == mine.c.item_id)
        .where(
            mine.c.person_id == at.person.id, mine.c.project_id == at.project_id,
            mine.c.state == "skipped",
        )
        .order_by(mine.c.leased_at, mine.c.item_id)
        .limit(200)
    )  # fmt: skip
    if not at.person.is_model:
        query = query.where((items.c.open_slots > 0) | items.c.gold.is_not(None))
    for row in connection.execute(query).all():
        if row.gold is not None:
            return row.item_id, None, row.how
        if (taken := _take(connection, at, row.item_id, now)) is not None:
            return row.item_id, None if at.person.is_model else taken, row.how
    return None


# ---------------------------------------------------------------- leases


def _lease(
    connection: Connection, at: Desk, item_id: int, slot: int | None, how: How, now: float
) -> Assignment:
    """Lease an item to a person, with the slot if there is one. How it is shown stays as it was the first
    time: an old page may still be open."""
    until = now + 60 * at.project.lease_minutes
    if slot is not None:
        where = {"item_id": item_id, "number": slot}
        change_rows(connection, schema.slots, where, person_id=at.person.id, leased_until=until)
    item = row_of(connection, schema.items, id=item_id)
    before = _encounter(connection, item_id, at.person.id)
    if before is not None:
        shown = before.shown
    else:
        number = slot if slot is not None else _met_by(connection, item_id)
        shown = dumps(order.shown(at.project, item.key, len(replies_of(item.replies)), number))
        add_to(connection, schema.seats, {"id": at.seat.id}, served=1, gold_served=int(how == "gold"))
    row = {
        "item_id": item_id, "person_id": at.person.id, "project_id": at.project_id, "slot": slot,
        "shown": shown, "how": how, "state": "leased", "leased_at": now, "leased_until": until,
    }  # fmt: skip
    upsert(connection, schema.encounters, row, ("slot", "state", "leased_at", "leased_until"))
    return _assignment(at.project, item, tuple(loads(shown)), slot or 0, until, how, None)


def _met_by(connection: Connection, item_id: int) -> int:
    mine = schema.encounters
    return connection.execute(select(func.count()).where(mine.c.item_id == item_id)).scalar_one()


def _encounter(connection: Connection, item_id: int, person_id: int) -> Any:
    return row_of(connection, schema.encounters, item_id=item_id, person_id=person_id)


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
    item = row_of(connection, schema.items, id=item_id)
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
    return row_of(connection, schema.votes, item_id=item_id, person_id=person_id)


def skip(
    connection: Connection, name: str, person_id: int, item_id: int, client_id: str | None, now: float
) -> None:
    """A person does not want to judge an item: its slot is free again. One that they judged stays judged.
    The same client_id again is the same skip, also when the item has come back meanwhile."""
    at = desk(connection, name, person_id)
    met, slots = encounter(connection, at, item_id), schema.slots
    if requests.known(connection, at.person.id, at.project_id, "skip", client_id, item_id) is not None:
        return
    requests.note(connection, at.person.id, at.project_id, "skip", client_id, item_id, now)
    if met.state == "judged":
        return
    mine = {"item_id": item_id, "person_id": at.person.id}
    change_rows(connection, schema.encounters, mine, state="skipped", leased_at=now, leased_until=0.0)
    own = update(slots).where(
        slots.c.item_id == item_id, slots.c.person_id == at.person.id, slots.c.vote_id.is_(None)
    )
    if connection.execute(own.values(person_id=None, leased_until=0.0)).rowcount:
        ballots.promote(connection, at.project_id, item_id, now)


def flag(
    connection: Connection, name: str, person_id: int, item_id: int, reason: str, client_id: str | None,
    now: float,
) -> None:  # fmt: skip
    """Note that something is wrong with an item. It stays leased. The same client_id again is the same
    remark."""
    at = desk(connection, name, person_id)
    encounter(connection, at, item_id)
    if requests.known(connection, at.person.id, at.project_id, "flag", client_id, item_id) is not None:
        return
    requests.note(connection, at.person.id, at.project_id, "flag", client_id, item_id, now)
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


def refuse_paused(at: Desk, *, project: bool) -> None:
    """PausedError for a desk whose person is paused; project: also where the whole project is."""
    if reason := at.paused if project else at.own_pause:
        raise PausedError(f"{at.person.name} is paused in {at.project.name}: {reason}")
