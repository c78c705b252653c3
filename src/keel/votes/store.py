"""The store: everything that can be done with people's judgements, each call one short transaction.

What a call returned is on disk. What it raised changed nothing. A store may be used by many threads, and its
database by many processes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from keel.errors import UsageError
from keel.votes import (
    adjudication,
    assignment,
    audit,
    backup,
    forgetting,
    importing,
    invitations,
    items,
    listing,
    migrations,
    people,
    projects,
    sessions,
    voting,
)
from keel.votes.database import Database, parse
from keel.votes.invitations import INVITATION_DAYS
from keel.votes.kinds import (
    Added,
    Adjudication,
    Answer,
    Assignment,
    AuditReport,
    CastResult,
    Disputed,
    Flag,
    Forgotten,
    Invitation,
    InvitationState,
    ItemRow,
    NewItem,
    PastJudgement,
    PastVote,
    Person,
    Progress,
    Project,
    Role,
    VoteRow,
)
from keel.votes.sessions import SESSION_DAYS

_PAGE = 1000  # items


def _at(now: float | None) -> float:
    return time.time() if now is None else now


class Store:
    """A database of judgements. `now`, where it can be given, stands for the clock."""

    def __init__(self, database: Database) -> None:
        self.database = database

    @classmethod
    def open(cls, url: str, *, create: bool = True) -> Store:
        """The database at an address, sqlite:///FILE or postgresql://USER@HOST/NAME; a path is a file's.

        An older schema is brought to the newest. create False: UsageError where nothing is there.
        """
        database = Database(parse(url))
        if database.is_sqlite and not create and not database.path.exists():
            raise UsageError(f"{database.path} is not there: make it with keel label create, or give --db")
        store = cls(database)
        try:
            if not create and database.read(migrations.revision_of) is None:
                raise UsageError(f"{database.shown} holds no labels: make them with keel label create")
            store.upgrade()
        except BaseException:
            store.close()
            raise
        return store

    def upgrade(self) -> bool:
        """Bring the tables to the newest schema; whether there was anything to do."""
        return migrations.upgrade(self.database)

    def close(self) -> None:
        """Close all connections."""
        self.database.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------ projects

    def create_project(self, project: Project, by: int | None, now: float | None = None) -> Project:
        """A new project. UsageError where there is one of that name, or where settings make no sense."""
        return self.database.write(projects.create, project, by, _at(now))

    def project(self, name: str) -> Project:
        """NotFoundError where there is none of that name."""
        return self.database.glance(projects.project, name)

    def project_for(self, name: str, person_id: int) -> Project:
        """A project in which this person may work. NotFoundError for any other."""
        return self.database.glance(projects.project_for, name, person_id)

    def projects(self, person_id: int | None = None) -> list[Project]:
        """All projects, or those that a person may work in."""
        return self.database.read(projects.projects, person_id)

    def change_project(
        self, name: str, by: int | None, *, now: float | None = None, **fields: Any
    ) -> Project:
        """Change settings that no vote depends on; `votes_per_item` adds or takes away slots."""
        return self.database.write(projects.change, name, by, fields, _at(now))

    def pause_project(
        self, name: str, reason: str, by: int | None = None, now: float | None = None
    ) -> Project:
        """Hand out nothing of a project any more; an empty reason: hand out again. What people hold they may
        still judge."""
        return self.database.write(projects.set_paused, name, reason, by, _at(now))

    def revision(self, project: str) -> str:
        """A text that changes whenever an item, a vote or an adjudication does."""
        return self.database.read(projects.revision, project)

    def counts(self, project: str) -> dict[str, int]:
        """A project's `items` (gold ones aside), of these `open`, votes `counted` and `wanted`."""
        return self.database.read(projects.counts, project)

    # ------------------------------------------------------------ items

    def add_items(
        self, project: str, items_: Iterable[NewItem], by: int | None, now: float | None = None
    ) -> Added:
        """Add items, all or none. A key that is there is left alone; UsageError if it says something else."""
        given = items_ if isinstance(items_, (list, tuple)) else list(items_)  # it may be run twice
        return self.database.write(items.add, project, given, by, _at(now))

    def items(self, project: str) -> Iterator[ItemRow]:
        """All items, in the order in which they were added."""
        after = 0
        while page := self.database.read(items.page, project, after, _PAGE):
            yield from page
            after = page[-1].item

    def item(self, project: str, item: int) -> ItemRow:
        """One item by its number."""
        return self.database.read(items.item, project, item)

    def items_after(self, project: str, after: int, size: int) -> list[ItemRow]:
        """At most `size` items whose numbers are above `after`, in order."""
        return self.database.read(items.page, project, after, size)

    def item_id(self, project: str, key: str) -> int:
        """The number of the item with this key."""
        return self.database.read(items.item_id, project, key)

    def set_priorities(
        self, project: str, priorities: Mapping[str, float | None], by: int | None = None
    ) -> int:
        """Key → priority; with order "uncertain" the highest comes first. How many keys are there."""
        return self.database.write(items.set_priorities, project, priorities, by, time.time())

    # ------------------------------------------------------------ voting

    def next_item(self, project: str, person_id: int, now: float | None = None) -> Assignment | None:
        """What this person judges next, leased to them; None where nothing is left, or they are paused."""
        return self.database.lease(assignment.next_item, project, person_id, _at(now))

    def assignment(self, project: str, person_id: int, item: int) -> Assignment:
        """An item that this person was given, with what they said. NotFoundError for any other."""
        return self.database.read(assignment.assignment, project, person_id, item)

    def cast(
        self, project: str, person_id: int, item: int, answer: Answer, client_id: str,
        seconds: float | None = None, now: float | None = None,
    ) -> CastResult:  # fmt: skip
        """An answer, or a changed one. The same `client_id` again is the same answer."""
        return self.database.write(
            voting.cast, project, person_id, item, answer, client_id, seconds, _at(now)
        )

    def skip(
        self, project: str, person_id: int, item: int, now: float | None = None, *,
        client_id: str | None = None,
    ) -> None:  # fmt: skip
        """Give an item back: it comes to this person again only when nothing else is left. The same
        `client_id` again is the same skip."""
        self.database.lease(assignment.skip, project, person_id, item, client_id, _at(now))

    def flag(
        self, project: str, person_id: int, item: int, reason: str, now: float | None = None, *,
        client_id: str | None = None,
    ) -> None:  # fmt: skip
        """Note that something is wrong with an item. The same `client_id` again is the same remark."""
        self.database.write(assignment.flag, project, person_id, item, reason, client_id, _at(now))

    def undo(
        self, project: str, person_id: int, now: float | None = None, *, client_id: str | None = None
    ) -> int | None:
        """Withdraw this person's newest vote; its item is leased to them again. None for no vote. The same
        `client_id` again is the same undo."""
        return self.database.write(voting.undo, project, person_id, client_id, _at(now))

    def history(self, project: str, person_id: int, limit: int = 50) -> list[PastVote]:
        """This person's votes, the newest first."""
        return self.database.read(voting.history, project, person_id, limit)

    def progress(self, project: str, person_id: int, now: float | None = None) -> Progress:
        """How far this person and the project have come; also why the person is paused."""
        return self.database.read(voting.progress, project, person_id, _at(now))

    # ------------------------------------------------------------ reading and reviewing

    def votes(self, project: str, *, counted_only: bool = False) -> Iterator[VoteRow]:
        """All standing votes, in one snapshot. counted_only: without surplus, gold and models' votes."""
        with self.database.snapshot() as connection:
            yield from adjudication.votes(connection, project, counted_only)

    def votes_of(self, project: str, item: int) -> list[VoteRow]:
        """The standing votes on one item, the oldest first."""
        return self.database.read(listing.votes_of, project, item)

    def tallies(self, project: str) -> dict[int, listing.Tally]:
        """Person's number → how many standing votes, and how many right answers to gold items."""
        return self.database.read(listing.tallies, project)

    def disputed(self, project: str, least: float = 1e-9) -> list[Disputed]:
        """What a reviewer should look at, the most disputed first."""
        return self.database.read(adjudication.disputed, project, least)

    def adjudicate(
        self, project: str, person_id: int, item: int, answer: Answer, note: str = "",
        now: float | None = None,
    ) -> None:  # fmt: skip
        """A reviewer's word on an item, beside the votes."""
        self.database.write(adjudication.adjudicate, project, person_id, item, answer, note, _at(now))

    def adjudications(self, project: str, *, last_only: bool = True) -> list[Adjudication]:
        """What reviewers said."""
        return self.database.read(adjudication.adjudications, project, last_only=last_only)

    def flags(self, project: str) -> list[Flag]:
        """What people remarked on items."""
        return self.database.read(adjudication.flags, project)

    def import_votes(
        self, project: str, judgements: Iterable[PastJudgement], by: int | None, now: float | None = None
    ) -> Added:
        """Bring in votes that were cast elsewhere, all or none; people are made by name."""
        return self.database.write(importing.votes, project, list(judgements), by, _at(now))

    def bring_in(
        self, project: str, items_: Iterable[NewItem], judgements: Iterable[PastJudgement], by: int | None,
        now: float | None = None, *, make: Project | None = None,
    ) -> tuple[Added, Added]:  # fmt: skip
        """Items and the votes on them in one transaction: all or none. make: the project as it is made where
        there is none of this name. What became of items, and of votes."""
        given = list(items_), list(judgements)  # it may be run twice
        return self.database.write(importing.both, project, *given, by, _at(now), make)

    # ------------------------------------------------------------ people

    def add_person(
        self, name: str, role: Role = "annotator", *, project: str | None = None, is_model: bool = False,
        by: int | None = None,
    ) -> Person:  # fmt: skip
        """A person without an invitation, or a model that votes."""
        return self.database.write(people.add, name, role, project, is_model, by, time.time())

    def person(self, person_id: int) -> Person:
        """NotFoundError for nobody."""
        return self.database.read(people.person, person_id)

    def person_named(self, name: str) -> Person:
        """NotFoundError for nobody."""
        return self.database.read(people.named, name)

    def people(self, project: str | None = None) -> list[Person]:
        """Everybody, or who may work in a project, with their pauses there."""
        return self.database.read(people.people, project)

    def invite(
        self, role: Role, project: str | None, by: int | None, name: str = "",
        days: float = INVITATION_DAYS, now: float | None = None,
    ) -> str:  # fmt: skip
        """A code that makes one person, once. project: the only one they may work in."""
        return self.database.write(invitations.invite, role, project, by, name, days, _at(now))

    def sign_in_link(
        self, person_id: int, by: int | None, days: float = INVITATION_DAYS, now: float | None = None
    ) -> str:
        """A code that signs a person in again, once."""
        return self.database.write(invitations.sign_in_link, person_id, by, days, _at(now))

    def first_admin_link(
        self, days: float = INVITATION_DAYS, now: float | None = None
    ) -> tuple[str, int] | None:
        """A code for the first admin, and how many such codes it replaces: those work no longer. None where
        there is an admin."""
        return self.database.write(invitations.first_admin, days, _at(now))

    def invitations(self, project: str | None = None, now: float | None = None) -> list[Invitation]:
        """All invitations, the newest first; or those that let into a project, or all of them."""
        return self.database.read(invitations.invitations, project, _at(now))

    def withdraw_invitation(self, number: int, by: int | None = None, now: float | None = None) -> Invitation:
        """Make an open invitation worthless. UsageError for one that is not open, NotFoundError for none."""
        return self.database.write(invitations.withdraw, number, by, _at(now))

    def invitation_state(self, code: str, now: float | None = None) -> InvitationState | None:
        """What has become of a code; None for one that never was."""
        return self.database.read(invitations.state_of_code, code, _at(now))

    def set_role(self, person_id: int, role: Role, by: int | None = None, now: float | None = None) -> Person:
        """Give a person another role, at once. An admin may work in every project."""
        return self.database.write(people.set_role, person_id, role, by, _at(now))

    def invitation(self, code: str, now: float | None = None) -> str | None:
        """The name that a code suggests, which may be empty; None for a code that cannot be used."""
        return self.database.read(invitations.invitation, code, _at(now))

    def accept(self, code: str, name: str = "", days: float = SESSION_DAYS, now: float | None = None) -> str:
        """A session token for whom a code invites. UsageError for a code that cannot be used."""
        return self.database.write(invitations.accept, code, name, days, _at(now))

    def session(self, token: str, now: float | None = None) -> Person | None:
        """Who is signed in by this token."""
        return self.database.glance(sessions.bearer, token, "session", _at(now))

    def sign_out(self, token: str) -> None:
        """End a session, or make an API token worthless."""
        self.database.write(sessions.sign_out, token, time.time())

    def sign_out_everywhere(self, person_id: int, by: int | None = None, but: str | None = None) -> int:
        """End all of a person's sessions and tokens. but: the one that stays."""
        return self.database.write(sessions.sign_out_everywhere, person_id, by, time.time(), but)

    def api_token(self, person_id: int, by: int | None, days: float | None = None) -> str:
        """A token for programs, shown once."""
        return self.database.write(sessions.api_token, person_id, by, days, time.time())

    def person_of_token(self, token: str, now: float | None = None) -> Person | None:
        """Whose API token this is."""
        return self.database.glance(sessions.bearer, token, "api", _at(now))

    def set_paused(
        self, person_id: int, reason: str | None, by: int | None = None, project: str | None = None,
        now: float | None = None,
    ) -> None:  # fmt: skip
        """Pause a person, in a project or everywhere; reason None: let them go on."""
        self.database.write(people.set_paused, person_id, reason, by, project, _at(now))

    def forget(self, person_id: int, by: int | None) -> Forgotten:
        """Take away a person's name, comments and sessions. Their votes stay, under a number."""
        forgotten = self.database.write(forgetting.forget, person_id, by, time.time())
        self.database.scrub()
        return forgotten

    def secret(self) -> bytes:
        """32 random bytes of this database's own, with which servers sign cookies."""
        return self.database.write(listing.secret)

    # ------------------------------------------------------------ safety

    def verify(self, expected: str | None = None) -> AuditReport:
        """Check the log of changes and all it speaks of. expected: a head that was noted earlier."""
        return self.database.read(audit.verify, expected)

    def backup(self, path: str | Path) -> AuditReport:
        """Write everything into one new file, while people work."""
        return backup.backup(self.database, Path(path))

    @staticmethod
    def restore(path: str | Path, url: str) -> AuditReport:
        """Bring a backup into an empty database."""
        return backup.restore(Path(path), url)
