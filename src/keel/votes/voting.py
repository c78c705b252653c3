"""Votes: casting, changing and withdrawing them. Each change is a version, and none is ever deleted."""

from __future__ import annotations

import math
from functools import cache
from types import SimpleNamespace
from typing import Any

from sqlalchemy import Connection, bindparam, false, func, select

from keel.votes import answers, audit, ballots, requests, schema
from keel.votes.assignment import Desk, desk, encounter, gold_to_come, refuse_paused, vote_of
from keel.votes.codec import answer_of, loads, replies_of
from keel.votes.database import add_to, change_rows, row_of
from keel.votes.kinds import Answer, CastResult, PastVote, Progress, UsedError
from keel.votes.people import pause_in

GOLD_PAUSE = "too many answers on items with a known answer were wrong"
_LONGEST = 7 * 86400.0  # seconds that an answer may have taken
_HOUR = 3600.0


def cast(
    connection: Connection, name: str, person_id: int, item_id: int, answer: Answer, client_id: str,
    seconds: float | None, now: float,
) -> CastResult:  # fmt: skip
    """A person's answer on an item that they were given. A second answer on it is an edit.

    client_id: chosen by the client, once for each answer: the same one again is the same answer.
    A vote on what was handed out before the project was paused counts: nobody's work is lost.
    NotFoundError for an item that is none of theirs, PausedError, UsageError for an answer that does not fit.
    """
    requests.check(client_id)
    at = desk(connection, name, person_id)
    met = encounter(connection, at, item_id)
    known = _known(connection, person_id, client_id)
    if known is not None:
        if known.item_id != item_id:
            raise UsedError("this client's id was used for another item: choose a new one for each answer")
        return CastResult("repeated", known.id, bool(at.own_pause))
    refuse_paused(at, project=False)
    item = row_of(connection, schema.items, id=item_id)
    answers.check(at.project, len(replies_of(item.replies)), answer)
    vote, took = vote_of(connection, item_id, at.person.id), _seconds(seconds)
    said: dict[str, Any] = {"at": now, "by": at.person.id, "client_id": client_id, "seconds": took}
    if vote is not None and not vote.withdrawn:
        ballots.write_version(
            connection,
            vote,
            "edit",
            answer,
            status=vote.status,
            slot=vote.slot,
            change=audit.Change(),
            **said,
        )
        vote_id, status = vote.id, vote.status
    else:
        vote_id, status = _new_vote(connection, at, item, met, vote, answer, said)
    paused = status == "gold" and _fails_gold(connection, at, now)
    return CastResult("counted" if status in ("counted", "gold") else "surplus", vote_id, paused)


def _known(connection: Connection, person_id: int, client_id: str) -> Any:
    version = row_of(connection, schema.versions, person_id=person_id, client_id=client_id)
    return None if version is None else row_of(connection, schema.votes, id=version.vote_id)


def _seconds(seconds: float | None) -> float | None:
    """A client's time, if it can be one."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return None
    return round(min(seconds, _LONGEST), 3)


def _new_vote(
    connection: Connection, at: Desk, item: Any, met: Any, vote: Any, answer: Answer, said: dict[str, Any]
) -> tuple[int, str]:
    """A vote where there was none, or none that stood: in a slot, or beside them."""
    base = vote or SimpleNamespace(
        id=None, version=0, project_id=at.project_id, item_id=item.id, person_id=at.person.id
    )
    slot, opened = None, 0
    if item.gold is not None:
        status = "gold"
    elif at.person.is_model:
        status = "model"
    else:
        slot = _slot(connection, at, item.id, met.slot, said["at"])
        status = "surplus" if slot is None else "counted"
        if slot is None:
            add_to(connection, schema.items, {"id": item.id}, surplus=1)
        else:
            opened = ballots.open_more(connection, item.id, -1)
    mine = {"item_id": item.id, "person_id": at.person.id}
    change_rows(connection, schema.encounters, mine, state="judged", slot=slot, leased_until=0.0)
    add_to(connection, schema.seats, {"id": at.seat.id}, done=1)
    change = audit.Change(open_items=opened, counted=int(slot is not None))
    vote_id = ballots.write_version(
        connection, base, "cast", answer, status=status, slot=slot, change=change, **said
    )
    if slot is not None:
        ballots.fill(connection, item.id, slot, at.person.id, vote_id)
    return vote_id, status


def _slot(connection: Connection, at: Desk, item_id: int, number: int | None, now: float) -> int | None:
    """The slot for a vote: the person's own, else one that nobody holds; None where others hold them all."""
    if number is not None:
        own = row_of(connection, schema.slots, lock=True, item_id=item_id, number=number)
        if own is not None and own.person_id == at.person.id and own.vote_id is None:
            return number
    free = ballots.free_slot(connection, item_id, now)
    return None if free is None else free.number


def _fails_gold(connection: Connection, at: Desk, now: float) -> bool:
    """Pause a person whose share of right gold answers is too small; whether that was so."""
    right, total = gold_score(connection, at)
    if total < at.project.gold_min or right >= at.project.gold_floor * total:
        return False
    pause_in(connection, at.project_id, at.person.id, GOLD_PAUSE, None, now)
    return True


def gold_score(connection: Connection, at: Desk) -> tuple[int, int]:
    """A person's gold answers since they were last let go on: right ones, all."""
    votes, versions, items = schema.votes, schema.versions, schema.items
    rows = connection.execute(
        select(versions.c.answer, items.c.gold)
        .select_from(votes)
        .join(versions, (versions.c.vote_id == votes.c.id) & (versions.c.version == votes.c.version))
        .join(items, items.c.id == votes.c.item_id)
        .where(
            votes.c.person_id == at.person.id, votes.c.project_id == at.project_id,
            votes.c.status == "gold", ~votes.c.withdrawn, votes.c.at >= at.seat.gold_since,
        )
    ).all()  # fmt: skip
    right = sum(answers.agrees(at.project, answer_of(row.gold), answer_of(row.answer)) for row in rows)
    return right, len(rows)


def undo(connection: Connection, name: str, person_id: int, client_id: str | None, now: float) -> int | None:
    """Withdraw a person's newest vote, and lease its item to them again. Its number; None for no vote. The
    same client_id again is the same undo: no further vote is withdrawn."""
    at = desk(connection, name, person_id)
    known = requests.known(connection, at.person.id, at.project_id, "undo", client_id)
    if known is not None:
        return known.item_id
    refuse_paused(at, project=True)
    item = _withdraw_newest(connection, at, now)
    requests.note(connection, at.person.id, at.project_id, "undo", client_id, item, now)
    return item


def _withdraw_newest(connection: Connection, at: Desk, now: float) -> int | None:
    votes = schema.votes
    vote = connection.execute(
        select(votes)
        .where(
            votes.c.person_id == at.person.id, votes.c.project_id == at.project_id, ~votes.c.withdrawn
        )
        .order_by(votes.c.at.desc(), votes.c.id.desc())
        .limit(1)
    ).one_or_none()  # fmt: skip
    if vote is None:
        return None
    until, opened = now + 60 * at.project.lease_minutes, 0
    if vote.slot is not None:
        opened = ballots.open_more(connection, vote.item_id, 1)
        slot = {"item_id": vote.item_id, "number": vote.slot}
        change_rows(connection, schema.slots, slot, vote_id=None, person_id=at.person.id, leased_until=until)
    elif vote.status == "surplus":
        add_to(connection, schema.items, {"id": vote.item_id}, surplus=-1)
    mine = {"item_id": vote.item_id, "person_id": at.person.id}
    change_rows(
        connection, schema.encounters, mine, state="leased", slot=vote.slot, leased_at=now, leased_until=until
    )
    add_to(connection, schema.seats, {"id": at.seat.id}, done=-1)
    ballots.write_version(
        connection, vote, "undo", None, status=vote.status, at=now, by=at.person.id,
        change=audit.Change(open_items=opened, counted=-int(vote.slot is not None)),
    )  # fmt: skip
    return vote.item_id


def history(connection: Connection, name: str, person_id: int, limit: int) -> list[PastVote]:
    """A person's standing votes, the newest first."""
    at = desk(connection, name, person_id, lock=False)
    votes, versions, items, mine = schema.votes, schema.versions, schema.items, schema.encounters
    rows = connection.execute(
        select(
            items.c.id, items.c.key, items.c.prompt, versions.c.answer, versions.c.comment, mine.c.shown,
            votes.c.at, votes.c.version,
        )
        .select_from(votes)
        .join(versions, (versions.c.vote_id == votes.c.id) & (versions.c.version == votes.c.version))
        .join(items, items.c.id == votes.c.item_id)
        .join(mine, (mine.c.item_id == votes.c.item_id) & (mine.c.person_id == votes.c.person_id))
        .where(votes.c.person_id == at.person.id, votes.c.project_id == at.project_id, ~votes.c.withdrawn)
        .order_by(votes.c.at.desc(), votes.c.id.desc())
        .limit(limit)
    )  # fmt: skip
    return [
        PastVote(
            item=row.id,
            key=row.key,
            prompt=loads(row.prompt),
            answer=answer_of(row.answer, row.comment),
            shown=tuple(loads(row.shown)),
            at=row.at,
            version=row.version,
        )
        for row in rows
    ]


def progress(connection: Connection, name: str, person_id: int, now: float) -> Progress:
    """How far a person and the project have come. Gold items are among what is left, like others."""
    at = desk(connection, name, person_id, lock=False)
    tally = row_of(connection, schema.tallies, project_id=at.project_id)
    mine = {"person": at.person.id, "project": at.project_id}
    judged = connection.execute(_judged(bool(at.person.is_model)), mine).scalar_one()
    left = max(0, (tally.items if at.person.is_model else tally.open_items) - judged)
    today = connection.execute(_own_since(), {**mine, "since": now - now % 86400}).one()
    recent = connection.execute(_own_since(), {**mine, "since": now - _HOUR}).one()
    spent = now - recent.first if recent.number > 1 else 0.0
    return Progress(
        done=at.seat.done,
        left_for_me=left + gold_to_come(connection, at, left),
        total=tally.items,
        wanted=tally.items * at.project.votes_per_item,
        counted=tally.counted,
        today=today.number,
        pace_per_hour=(recent.number - 1) * _HOUR / spent if spent > 0 else 0.0,
        paused=at.paused,
    )


@cache
def _judged(is_model: bool) -> Any:
    """How many items a person has judged, of those that are open; a model: of all but gold."""
    items, mine = schema.items, schema.encounters
    return (
        select(func.count())
        .select_from(mine)
        .join(items, items.c.id == mine.c.item_id)
        .where(
            mine.c.person_id == bindparam("person"), mine.c.project_id == bindparam("project"),
            mine.c.state == "judged", items.c.gold.is_(None) if is_model else items.c.open_slots > 0,
        )
    )  # fmt: skip


@cache
def _own_since() -> Any:
    """How many standing votes a person has cast since then, and when the first of them."""
    votes = schema.votes
    return select(func.count().label("number"), func.min(votes.c.at).label("first")).where(
        votes.c.person_id == bindparam("person"), votes.c.project_id == bindparam("project"),
        votes.c.withdrawn == false(), votes.c.at >= bindparam("since"),
    )  # fmt: skip
