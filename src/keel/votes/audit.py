"""The hash-chained log of changes, and the check of it.

Every change of a row that matters appends a row to the log: who, when, what, and the digest of the row as it
became. Each row's hash covers the one before it:

    hash_n = SHA-256(hash_{n−1}, n, at, person, action, project, subject, digest)

`verify` computes all of them again, and compares the last digest of each subject with the row that is there
now. So a changed, added or removed row is found, in the log or in the tables. What it cannot show by itself
is that the newest rows of the log were cut off together with what they speak of; the head's hash, kept
elsewhere, does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import Connection, Table, false, func, select

from keel.votes import schema
from keel.votes.codec import digest, dumps, salted
from keel.votes.database import change_rows, row_of
from keel.votes.kinds import AuditReport

START = "0" * 64
_INSERT = schema.audit.insert()
GONE = ""  # the digest of a row that was removed


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of a project's counts with a change."""

    items: int = 0
    open_items: int = 0
    counted: int = 0
    reorders: bool = False  # whether the order in which items come has changed
    revises: bool = True  # whether what is learned from the project has changed


def _columns(*names: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    return lambda row: {name: row[name] for name in names}


_INVITATION = _columns(
    "id", "hash", "role", "project_id", "person_id", "created_by", "created", "expires", "used"
)


def _invitation(row: Mapping[str, Any]) -> dict[str, Any]:
    """Columns that came with a later schema count where they say something: what was logged before holds."""
    later = {name: row[name] for name in ("withdrawn", "origin") if row[name] is not None}
    return {**_INVITATION(row), **later}


# What of each table's row the log covers.
COVERED: dict[str, tuple[Table, Callable[[Mapping[str, Any]], dict[str, Any]]]] = {
    "people": (
        schema.people,
        _columns("id", "name_digest", "role", "is_model", "everywhere", "paused", "created", "removed"),
    ),
    "projects": (schema.projects, _columns("id", "name", "settings", "created", "created_by")),
    "batches": (schema.batches, _columns("id", "project_id", "items", "digest", "at", "person_id")),
    "versions": (
        schema.versions,
        _columns(
            "id", "vote_id", "person_id", "version", "kind", "status", "client_id", "answer",
            "comment_digest", "seconds", "at",
        ),
    ),
    "adjudications": (
        schema.adjudications,
        _columns("id", "project_id", "item_id", "person_id", "answer", "note_digest", "at"),
    ),
    "flags": (schema.flags, _columns("id", "project_id", "item_id", "person_id", "reason_digest", "at")),
    "seats": (schema.seats, _columns("id", "project_id", "person_id", "invited", "paused", "gold_since")),
    "invitations": (schema.invitations, _invitation),
    "credentials": (
        schema.credentials, _columns("id", "hash", "kind", "person_id", "created", "expires"),
    ),
}  # fmt: skip
_PRIVATE = {  # table → text, its digest
    "people": ("name", "name_digest"),
    "versions": ("comment", "comment_digest"),
    "adjudications": ("note", "note_digest"),
    "flags": ("reason", "reason_digest"),
}


def append(
    connection: Connection,
    table: str,
    row_id: int,
    action: str,
    *,
    at: float,
    by: int | None,
    project_id: int | None = None,
    change: Change | None = None,
) -> None:
    """Log a row of a table of `COVERED` as it is now; one that is not there is logged as gone.

    change: what becomes of the project's counts. They are changed here, before the head of the log is locked,
    so that transactions never wait for each other in a circle.
    """
    source, content = COVERED[table]
    row = row_of(connection, source, id=row_id)
    now = GONE if row is None else digest(content(row._mapping))
    append_digest(
        connection, f"{table}:{row_id}", now, action, at=at, by=by, project_id=project_id, change=change
    )


def append_digest(
    connection: Connection,
    subject: str,
    content: str,
    action: str,
    *,
    at: float,
    by: int | None,
    project_id: int | None = None,
    change: Change | None = None,
) -> None:
    """Log a digest under a subject; see `append`."""
    if change is not None and project_id is not None:
        _count(connection, project_id, content, change)
    head = schema.audit_head
    last = row_of(connection, head, lock=True, id=1)
    n = last.n + 1
    row = {
        "n": n, "at": at, "person_id": by, "action": action, "project_id": project_id, "subject": subject,
        "digest": content,
    }  # fmt: skip
    now = _hash(last.hash, row)
    connection.execute(_INSERT, {**row, "previous": last.hash, "hash": now})
    change_rows(connection, head, {"id": 1}, n=n, hash=now)


def _count(connection: Connection, project_id: int, content: str, change: Change) -> None:
    tallies = schema.tallies
    before = row_of(connection, tallies, lock=True, project_id=project_id)
    revision = before.revision
    if change.revises:
        revision = hashlib.sha256(f"{revision} {content}".encode()).hexdigest()
    change_rows(
        connection, tallies, {"project_id": project_id}, items=before.items + change.items,
        open_items=before.open_items + change.open_items, counted=before.counted + change.counted,
        order_version=before.order_version + change.reorders, revision=revision,
    )  # fmt: skip


def _hash(previous: str, row: Mapping[str, Any]) -> str:
    content = [
        row[key] for key in ("n", "at", "person_id", "action", "project_id", "subject", "digest")
    ]  # the order is part of the format
    return hashlib.sha256(f"{previous} {dumps(content)}".encode()).hexdigest()


# ---------------------------------------------------------------- checking


@dataclass(frozen=True, slots=True)
class _Broken(Exception):
    n: int
    reason: str


def verify(connection: Connection, expected: str | None = None) -> AuditReport:
    """Check the whole log, and what it speaks of. expected: a head's hash that was noted earlier.

    `broken` is the number of the first row of the log that is wrong, or that a row of a table disagrees with;
    one more than the log has rows where something is missing from it.
    """
    rows, head, subjects, seen = 0, START, {}, expected in (None, START)
    try:
        for row in _stream(connection, schema.audit, schema.audit.c.n):
            _check_link(row, rows, head)
            rows, head = row["n"], row["hash"]
            seen = seen or head == expected
            subjects[row["subject"]] = (rows, row["digest"])
        stored = connection.execute(select(schema.audit_head.c.n, schema.audit_head.c.hash)).one()
        if (stored.n, stored.hash) != (rows, head):
            raise _Broken(rows + 1, f"the log ends at row {rows}, but had {stored.n}")
        if not seen:
            raise _Broken(rows + 1, "the hash that was noted earlier is not in the log: rows were taken away")
        problems = list(_disagreements(connection, subjects, rows + 1))
        if problems:
            raise min(problems, key=lambda problem: problem.n)
    except _Broken as broken:
        return AuditReport(rows, broken.n, broken.reason, head)
    return AuditReport(rows, None, "", head)


def _check_link(row: Mapping[str, Any], before: int, head: str) -> None:
    if row["n"] != before + 1:
        raise _Broken(before + 1, f"row {before + 1} of the log is missing")
    if row["previous"] != head:
        raise _Broken(row["n"], f"row {row['n']} of the log does not follow from the one before it")
    if row["hash"] != _hash(head, row):
        raise _Broken(row["n"], f"row {row['n']} of the log was changed ({row['action']} {row['subject']})")


def _disagreements(
    connection: Connection, subjects: dict[str, tuple[int, str]], after: int
) -> Iterator[_Broken]:
    """Rows of the tables that are not what the log says of them; uses up `subjects`."""
    gone = select(schema.people.c.id).where(schema.people.c.removed.is_not(None))
    removed = set(connection.execute(gone).scalars())
    votes = {row["id"]: row for row in _stream(connection, schema.votes, schema.votes.c.id)}
    without = set(votes)
    for name, (table, content) in COVERED.items():
        for row in _stream(connection, table, table.c.id):
            subject = f"{name}:{row['id']}"
            n, logged = subjects.pop(subject, (after, None))
            if logged is None:
                yield _Broken(n, f"{subject} is not in the log")
            elif digest(content(row)) != logged:
                yield _Broken(n, f"{subject} was changed")
            elif name in _PRIVATE and not _private_holds(name, row, removed):
                yield _Broken(n, f"the text of {subject} was changed")
            elif name == "batches" and (reason := _batch_differs(connection, row)):
                yield _Broken(n, reason)
            elif name == "versions":
                without.discard(row["vote_id"])
                if reason := _vote_differs(votes.get(row["vote_id"]), row):
                    yield _Broken(n, reason)
    for vote in without:
        yield _Broken(after, f"votes:{vote} is not in the log")
    for subject, (n, logged) in subjects.items():
        if subject.partition(":")[0] in COVERED and logged != GONE:
            yield _Broken(n, f"{subject} was removed")
    for name in connection.execute(_miscounted()).scalars():
        yield _Broken(after, f"the counts of {name} are not those of its votes")


def _private_holds(name: str, row: Mapping[str, Any], removed: set[int]) -> bool:
    text, kept = _PRIVATE[name]
    if row["salt"]:
        return salted(row["salt"], row[text]) == row[kept]
    # without its salt a text was forgotten, which happens only to people who are gone
    person = row["id"] if name == "people" else row["person_id"]
    return person in removed and (name == "people" or not row[text])


def item_digest(row: Mapping[str, Any]) -> str:
    """Digest of what an item is: never changed after it was added."""
    return digest([row[name] for name in ("key", "prompt", "replies", "columns", "gold")])


def batch_digest(digests: Iterable[str]) -> str:
    """Digest of items that were added together, from their digests in order of id."""
    total = hashlib.sha256()
    for one in digests:
        total.update(one.encode())
    return total.hexdigest()


def _batch_differs(connection: Connection, batch: Mapping[str, Any]) -> str:
    """What is wrong with the items of a batch; empty where nothing is."""
    items, digests = schema.items, list[str]()
    where = items.c.batch_id == batch["id"]
    for row in _stream(connection, items, items.c.id, where):
        if item_digest(row) != row["digest"]:
            return f"items:{row['id']} was changed"
        digests.append(row["digest"])
    if len(digests) != batch["items"]:
        return f"batches:{batch['id']} had {batch['items']} items, and has {len(digests)}"
    return "" if batch_digest(digests) == batch["digest"] else f"items of batches:{batch['id']} were changed"


def _vote_differs(vote: Mapping[str, Any] | None, version: Mapping[str, Any]) -> str:
    """What is wrong with the vote that a version belongs to; empty where nothing is."""
    if vote is None:
        return f"votes:{version['vote_id']} was removed"
    if vote["version"] < version["version"]:
        return f"votes:{vote['id']} was set back to an older version"
    same = (vote["status"], vote["withdrawn"], vote["at"], vote["person_id"]) == (
        version["status"], version["answer"] is None, version["at"], version["person_id"],
    )  # fmt: skip
    return "" if same or vote["version"] > version["version"] else f"votes:{vote['id']} was changed"


def _miscounted() -> Any:
    """The names of projects of which the votes in slots are not as many as are counted."""
    projects, tallies, votes, slots = schema.projects, schema.tallies, schema.votes, schema.slots
    standing = select(func.count()).where(
        votes.c.project_id == projects.c.id, votes.c.status == "counted", votes.c.withdrawn == false()
    )
    filled = (
        select(func.count())
        .select_from(slots)
        .join(votes, votes.c.id == slots.c.vote_id)
        .where(votes.c.project_id == projects.c.id)
    )
    return (
        select(projects.c.name)
        .join(tallies, tallies.c.project_id == projects.c.id)
        .where(
            (tallies.c.counted != standing.scalar_subquery())
            | (tallies.c.counted != filled.scalar_subquery())
        )
    )


def _stream(connection: Connection, table: Table, order: Any, *where: Any) -> Iterator[Mapping[str, Any]]:
    """All rows of a table by a key, a few thousand in memory at a time."""
    last: Any = None
    while True:
        query = select(table).where(*where).order_by(order).limit(2000)
        if last is not None:
            query = query.where(order > last)
        rows = connection.execute(query).mappings().all()
        yield from cast("list[Mapping[str, Any]]", rows)
        if len(rows) < 2000:
            return
        last = rows[-1][order.name]
