"""What the pages of an admin show: items by the page, one item's votes, counts by person; and the secret with
which a server signs its cookies."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from sqlalchemy import Connection, func, select

from keel.votes import adjudication, answers, schema
from keel.votes.codec import answer_of, project_of
from keel.votes.database import insert_ignore
from keel.votes.kinds import VoteRow
from keel.votes.projects import project_row


@dataclass(frozen=True, slots=True)
class Tally:
    """One person's votes in a project: standing ones, and of those on gold items how many are right."""

    votes: int
    gold: int
    gold_right: int


def votes_of(connection: Connection, name: str, item: int) -> list[VoteRow]:
    """The standing votes on one item, the oldest first."""
    row, votes = project_row(connection, name), schema.votes
    query = adjudication.standing(row.id).where(votes.c.item_id == item).order_by(votes.c.id)
    return [adjudication.vote_row(found) for found in connection.execute(query)]


def tallies(connection: Connection, name: str) -> dict[int, Tally]:
    """Person's number → their tally."""
    row, votes, items, versions = project_row(connection, name), schema.votes, schema.items, schema.versions
    project = project_of(name, row.settings)
    mine = (votes.c.project_id == row.id) & ~votes.c.withdrawn
    counts = connection.execute(
        select(votes.c.person_id, func.count()).where(mine).group_by(votes.c.person_id)
    )
    found = {person: Tally(count, 0, 0) for person, count in counts}
    gold = connection.execute(
        select(votes.c.person_id, versions.c.answer, items.c.gold)
        .select_from(votes)
        .join(items, items.c.id == votes.c.item_id)
        .join(versions, (versions.c.vote_id == votes.c.id) & (versions.c.version == votes.c.version))
        .where(mine, items.c.gold.is_not(None))
    )
    for person, said, known in gold:
        before = found[person]
        right = answers.agrees(project, answer_of(known), answer_of(said))
        found[person] = Tally(before.votes, before.gold + 1, before.gold_right + right)
    return found


def secret(connection: Connection) -> bytes:
    """32 random bytes, drawn once for a database."""
    table = schema.secrets
    insert_ignore(connection, table, {"name": "cookies", "value": secrets.token_hex(32)})
    value = connection.execute(select(table.c.value).where(table.c.name == "cookies")).scalar_one()
    return bytes.fromhex(value)
