"""The tables. `migrations/` makes them; a test compares the two.

    projects ─┬─ tallies        counts, and the revision that changes with what is learned from
              ├─ items ─┬─ slots        votes_per_item rows an item, each leased to one person at a time
              │         ├─ encounters   person × item: how it was shown, leased, judged or skipped
              │         └─ votes ── versions   one vote a person an item; a change is one more version
              ├─ adjudications, flags   beside the votes
              └─ seats          person × project: who may work there, pauses, where they stand in the order
    people ── credentials, invitations          secrets are kept as hashes
           └─ requests                          skips, flags and undos by their client's id: a retry is known
    audit, audit_head                           the hash-chained log of changes

Text that belongs to a person (names, comments, notes) has a salted digest beside it. The log holds digests
alone, so that the text can be removed and the log still be checked.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

HEAD = "0002"  # the newest revision in migrations/versions

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)
_HASH = String(64)


def _id() -> Column[int]:
    return Column("id", Integer, primary_key=True)


def _to(target: str, name: str, *, nullable: bool = False, primary_key: bool = False) -> Column[int]:
    return Column(name, Integer, ForeignKey(f"{target}.id"), nullable=nullable, primary_key=primary_key)


people = Table(
    "people", metadata, _id(),
    Column("name", Text, nullable=False),
    Column("name_key", Text, nullable=False, unique=True),  # the name as it is compared
    Column("name_digest", _HASH, nullable=False),
    Column("salt", String(32), nullable=False),  # empty once the person is forgotten
    Column("role", String(16), nullable=False),
    Column("is_model", Boolean, nullable=False),
    Column("everywhere", Boolean, nullable=False),  # may work in every project
    Column("paused", Text),
    Column("created", Double, nullable=False),
    Column("removed", Double),
)  # fmt: skip

projects = Table(
    "projects", metadata, _id(),
    Column("name", String(200), nullable=False, unique=True),
    Column("settings", Text, nullable=False),  # JSON of kinds.Project
    Column("created", Double, nullable=False),
    _to("people", "created_by", nullable=True),
)  # fmt: skip

tallies = Table(
    "tallies", metadata, _to("projects", "project_id", primary_key=True),
    Column("items", Integer, nullable=False),  # gold ones aside
    Column("open_items", Integer, nullable=False),  # of which votes are missing
    Column("counted", Integer, nullable=False),  # votes in slots
    Column("order_version", Integer, nullable=False),  # the order has changed so many times
    Column("revision", _HASH, nullable=False),
)  # fmt: skip

batches = Table(
    "batches", metadata, _id(), _to("projects", "project_id"),
    Column("items", Integer, nullable=False),
    Column("digest", _HASH, nullable=False),  # of its items' digests, in order of id
    Column("at", Double, nullable=False),
    _to("people", "person_id", nullable=True),
    Index("ix_batches_project_id", "project_id"),
)  # fmt: skip

items = Table(
    "items", metadata, _id(), _to("projects", "project_id"), _to("batches", "batch_id"),
    Column("key", Text, nullable=False),
    Column("prompt", Text, nullable=False),  # JSON
    Column("replies", Text, nullable=False),  # JSON: [[content, source], …]
    Column("columns", Text, nullable=False),  # JSON
    Column("gold", Text),  # JSON of the known answer
    Column("digest", _HASH, nullable=False),
    Column("rank", BigInteger, nullable=False),  # random, a function of (seed, key): the order "random"
    Column("at_random", Boolean, nullable=False),  # belongs to the random share under "uncertain"
    Column("urgency", Double, nullable=False),  # −priority; lowest first
    Column("priority", Double),
    Column("open_slots", Integer, nullable=False),  # without a vote
    Column("surplus", Integer, nullable=False),  # votes beside those in slots
    UniqueConstraint("project_id", "key"),
    Index("ix_items_batch_id", "batch_id"),
    Index("ix_items_rank", "project_id", "rank"),
    Index("ix_items_open_rank", "project_id", "rank",
          sqlite_where=text("open_slots > 0"), postgresql_where=text("open_slots > 0")),
    Index("ix_items_open_urgency", "project_id", "at_random", "urgency", "rank",
          sqlite_where=text("open_slots > 0"), postgresql_where=text("open_slots > 0")),
    Index("ix_items_gold", "project_id", "rank",
          sqlite_where=text("gold IS NOT NULL"), postgresql_where=text("gold IS NOT NULL")),
)  # fmt: skip

votes = Table(
    "votes", metadata, _id(), _to("projects", "project_id"), _to("items", "item_id"),
    _to("people", "person_id"),
    Column("slot", Integer),  # the one it fills
    Column("status", String(16), nullable=False),  # counted, surplus, gold, model
    Column("withdrawn", Boolean, nullable=False),
    Column("version", Integer, nullable=False),  # the one that holds
    Column("at", Double, nullable=False),  # of that version
    UniqueConstraint("item_id", "person_id"),  # nobody judges an item twice
    Index("ix_votes_project_id", "project_id"),
    Index("ix_votes_person", "person_id", "project_id", "at"),
)  # fmt: skip

versions = Table(
    "versions", metadata, _id(), _to("votes", "vote_id"), _to("people", "person_id"),
    Column("version", Integer, nullable=False),
    Column("kind", String(16), nullable=False),  # cast, edit, undo, promote, demote, import
    Column("status", String(16), nullable=False),
    Column("client_id", String(200)),
    Column("answer", Text),  # JSON, None where the vote was withdrawn
    Column("comment", Text, nullable=False),
    Column("comment_digest", _HASH, nullable=False),
    Column("salt", String(32), nullable=False),
    Column("seconds", Double),
    Column("at", Double, nullable=False),
    UniqueConstraint("vote_id", "version"),
    UniqueConstraint("person_id", "client_id"),  # a retry is not a second vote
)  # fmt: skip

slots = Table(
    "slots", metadata, _to("items", "item_id", primary_key=True),
    Column("number", Integer, primary_key=True),
    _to("people", "person_id", nullable=True),
    Column("leased_until", Double, nullable=False),  # 0: free
    _to("votes", "vote_id", nullable=True),
)  # fmt: skip

encounters = Table(
    "encounters", metadata, _to("items", "item_id", primary_key=True),
    _to("people", "person_id", primary_key=True), _to("projects", "project_id"),
    Column("slot", Integer),  # the one last leased; None for gold and for a model
    Column("shown", Text, nullable=False),  # JSON: shown position → reply; it stays for good
    Column("how", String(16), nullable=False),
    Column("state", String(16), nullable=False),  # leased, judged, skipped
    Column("leased_at", Double, nullable=False),
    Column("leased_until", Double, nullable=False),
    Index("ix_encounters_person", "person_id", "project_id", "state"),
)  # fmt: skip

adjudications = Table(
    "adjudications", metadata, _id(), _to("projects", "project_id"), _to("items", "item_id"),
    _to("people", "person_id"),
    Column("answer", Text, nullable=False),
    Column("note", Text, nullable=False),
    Column("note_digest", _HASH, nullable=False),
    Column("salt", String(32), nullable=False),
    Column("at", Double, nullable=False),
    Index("ix_adjudications_item_id", "item_id"),
    Index("ix_adjudications_project_id", "project_id"),
)  # fmt: skip

flags = Table(
    "flags", metadata, _id(), _to("projects", "project_id"), _to("items", "item_id"),
    _to("people", "person_id"),
    Column("reason", Text, nullable=False),
    Column("reason_digest", _HASH, nullable=False),
    Column("salt", String(32), nullable=False),
    Column("at", Double, nullable=False),
    Index("ix_flags_project_id", "project_id"),
)  # fmt: skip

seats = Table(
    "seats", metadata, _id(), _to("projects", "project_id"), _to("people", "person_id"),
    Column("invited", Boolean, nullable=False),
    Column("paused", Text),
    Column("gold_since", Double, nullable=False),  # gold answers before this are forgiven
    Column("served", Integer, nullable=False),  # items that were handed out
    Column("gold_served", Integer, nullable=False),
    Column("done", Integer, nullable=False),  # standing votes
    Column("order_version", Integer, nullable=False),  # of the order that the cursors are about
    Column("rank_cursor", BigInteger),  # all open items up to here were judged by this person
    Column("urgency_cursor", Double),
    Column("urgency_rank_cursor", BigInteger),
    UniqueConstraint("project_id", "person_id"),
    Index("ix_seats_person_id", "person_id"),
)  # fmt: skip

invitations = Table(
    "invitations", metadata, _id(),
    Column("hash", _HASH, nullable=False, unique=True),
    Column("role", String(16), nullable=False),
    _to("projects", "project_id", nullable=True),
    Column("name", Text, nullable=False),  # that was suggested
    _to("people", "person_id", nullable=True),  # whom it signs in, or who took it
    _to("people", "created_by", nullable=True),
    Column("created", Double, nullable=False),
    Column("expires", Double, nullable=False),
    Column("used", Double),
    Column("withdrawn", Double),
    Column("origin", String(16)),  # first: made by a server that had no admin yet
)  # fmt: skip

credentials = Table(
    "credentials", metadata, _id(),
    Column("hash", _HASH, nullable=False, unique=True),
    Column("kind", String(16), nullable=False),  # session, api
    _to("people", "person_id"),
    Column("created", Double, nullable=False),
    Column("expires", Double),
    Index("ix_credentials_person_id", "person_id"),
)  # fmt: skip

requests = Table(
    "requests", metadata, _to("people", "person_id", primary_key=True),
    Column("deed", String(16), primary_key=True),  # skip, flag, undo; votes have theirs in versions
    Column("client_id", String(200), primary_key=True),
    _to("projects", "project_id"),
    _to("items", "item_id", nullable=True),  # that it was about; of an undo the one that came back
    Column("at", Double, nullable=False),
)  # fmt: skip

audit = Table(
    "audit", metadata,
    Column("n", Integer, primary_key=True, autoincrement=False),
    Column("at", Double, nullable=False),
    Column("person_id", Integer),  # who did it; None: at the machine itself
    Column("action", String(32), nullable=False),
    Column("project_id", Integer),
    Column("subject", String(100), nullable=False),  # table:id
    Column("digest", _HASH, nullable=False),  # of the row as it became; empty: it is gone
    Column("previous", _HASH, nullable=False),
    Column("hash", _HASH, nullable=False),
)  # fmt: skip

audit_head = Table(
    "audit_head", metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("n", Integer, nullable=False),
    Column("hash", _HASH, nullable=False),
)  # fmt: skip

secrets = Table(
    "secrets", metadata,
    Column("name", String(32), primary_key=True),
    Column("value", String(64), nullable=False),  # what a server signs its cookies with
)  # fmt: skip


def sees_all(row: Any) -> Any:
    """Whether a person may work in every project: of a row of people, or of its columns. An admin may for as
    long as they are one."""
    return row.everywhere | (row.role == "admin")
