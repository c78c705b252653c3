"""Votes that were cast elsewhere, brought in as if they had been cast here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from sqlalchemy import Connection

from keel.errors import UsageError
from keel.votes import answers, audit, ballots, items, order, people, projects, schema
from keel.votes.assignment import Desk, desk, vote_of
from keel.votes.codec import dumps, replies_of
from keel.votes.database import add_to, row_of, upsert
from keel.votes.kinds import Added, NewItem, NotFoundError, PastJudgement, Project

_FORGOTTEN = re.compile(r"^(\s*)removed-", re.IGNORECASE)  # in another database: the number is taken here


def votes(
    connection: Connection, name: str, judgements: Sequence[PastJudgement], by: int | None, now: float
) -> Added:
    """Record past votes, all or none. A person's vote on an item that they judged already is left alone.

    They fill slots as long as there are any; further ones are kept as surplus. UsageError for an answer that
    does not fit, and for a key that is not there.
    """
    desks: dict[str, Desk] = {}
    added = known = 0
    for number, judgement in enumerate(judgements, 1):
        try:
            at = desks.get(judgement.person)
            if at is None:
                at = desks[judgement.person] = _desk(connection, name, judgement, by, now)
            if _one(connection, at, judgement, by, now):
                added += 1
            else:
                known += 1
        except UsageError as error:
            raise UsageError(f"vote {number} (item {judgement.key!r}): {error}") from None
    return Added(added, known)


def both(
    connection: Connection, name: str, new: Sequence[NewItem], judgements: Sequence[PastJudgement],
    by: int | None, now: float, make: Project | None,
) -> tuple[Added, Added]:  # fmt: skip
    """Items and the votes on them, all or none. make: the project, where there is none of this name."""
    if make is not None and row_of(connection, schema.projects, name=name) is None:
        projects.create(connection, make, by, now)
    if judgements:  # items lock the log first, votes a seat: nobody may hold one and wait for the other
        projects.keep_others_out(connection)
    added = items.add(connection, name, new, by, now)
    return added, votes(connection, name, judgements, by, now)


def _desk(connection: Connection, name: str, judgement: PastJudgement, by: int | None, now: float) -> Desk:
    """The desk of a judge, who is made where there is nobody of that name."""
    who = _FORGOTTEN.sub(r"\1forgotten-", judgement.person)
    try:
        person = people.named(connection, who)
    except NotFoundError:
        person = people.add(connection, who, "annotator", name, judgement.is_model, by, now)
    if person.is_model != judgement.is_model:
        raise UsageError(f"{person.name} is {'a model' if person.is_model else 'a person'} here")
    return desk(connection, name, person.id)


def _one(connection: Connection, at: Desk, judgement: PastJudgement, by: int | None, now: float) -> bool:
    """Record one vote; whether it was new."""
    item = row_of(connection, schema.items, project_id=at.project_id, key=judgement.key)
    if item is None:
        raise UsageError("the project has no such item")
    vote = vote_of(connection, item.id, at.person.id)
    if vote is not None:
        return False
    replies = len(replies_of(item.replies))
    answers.check(at.project, replies, judgement.answer)
    slot, change, status = _place(connection, at, item, now)
    at_time = now if judgement.at is None else judgement.at
    given = judgement.shown
    for name in ("at", "seconds"):
        if not items.is_number_or_none(value := getattr(judgement, name)):
            raise UsageError(f"`{name}` is {value!r}, not a number of seconds")
    if given is not None and not _is_order(given, replies):
        raise UsageError(f"`shown` is {list(given)}, not an order of the {replies} replies")
    shown = order.shown(at.project, item.key, replies, slot or 0) if given is None else given
    row: dict[str, Any] = {
        "item_id": item.id, "person_id": at.person.id, "project_id": at.project_id, "slot": slot,
        "shown": dumps(shown), "how": "gold" if status == "gold" else "random", "state": "judged",
        "leased_at": at_time, "leased_until": 0.0,
    }  # fmt: skip
    upsert(connection, schema.encounters, row, ("slot", "state", "leased_until"))
    add_to(connection, schema.seats, {"id": at.seat.id}, done=1)
    base = SimpleNamespace(
        id=None, version=0, project_id=at.project_id, item_id=item.id, person_id=at.person.id
    )
    vote_id = ballots.write_version(
        connection, base, "import", judgement.answer, status=status, at=at_time, by=by, change=change,
        slot=slot, seconds=judgement.seconds,
    )  # fmt: skip
    if slot is not None:
        ballots.fill(connection, item.id, slot, at.person.id, vote_id)
    return True


def _is_order(given: Sequence[object], replies: int) -> bool:
    """Whether each reply stands in one place."""
    return len(given) == replies and all(place in given for place in range(replies))


def _place(connection: Connection, at: Desk, item: Any, now: float) -> tuple[int | None, audit.Change, str]:
    """Where a vote goes: its slot, what that changes, its status."""
    if item.gold is not None or at.person.is_model:
        return None, audit.Change(), "gold" if item.gold is not None else "model"
    free = ballots.free_slot(connection, item.id, now)
    if free is None:
        add_to(connection, schema.items, {"id": item.id}, surplus=1)
        return None, audit.Change(), "surplus"
    opened = ballots.open_more(connection, item.id, -1)
    return free.number, audit.Change(open_items=opened, counted=1), "counted"
