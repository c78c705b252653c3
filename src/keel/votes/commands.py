# pyright: strict
"""What `keel label` does with the database, command by command: plain values in, plain values out.

Each opens the database, does one thing and closes it; the command line says it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from keel.errors import UsageError
from keel.votes import missing, open_store, url_or_default
from keel.votes.kinds import (
    Added,
    AuditReport,
    Forgotten,
    Invitation,
    NewItem,
    Person,
    Progress,
    Project,
    Role,
)


def create(url: str | None, project: Project) -> tuple[Project, str | None, int]:
    """Make a project, and the database with it. Where nobody is an admin yet, also a code that makes one, and
    how many such codes it replaces: those work no longer."""
    with open_store(url) as store:
        made = store.create_project(project, by=None)
        code, replaced = store.first_admin_link() or (None, 0)
        return made, code, replaced


def add(url: str | None, project: str, items: Iterable[NewItem]) -> Added:
    """Add items to a project; a key that is there is left alone."""
    with open_store(url, create=False) as store:
        return store.add_items(project, items, by=None)


def projects(url: str | None) -> list[dict[str, Any]]:
    """All projects with their counts: name, task, why it is paused, items, votes (counted), wanted."""
    with open_store(url, create=False) as store:
        return [
            {"name": p.name, "task": p.task, "title": p.title, "paused": p.paused, **store.counts(p.name)}
            for p in store.projects()
        ]


def people(url: str | None, project: str | None = None) -> list[tuple[Person, Progress | None]]:
    """Who there is; with a project also how far each has come there."""
    with open_store(url, create=False) as store:
        found = store.people(project)
        if project is None:
            return [(person, None) for person in found]
        return [
            (person, None if person.role == "viewer" else store.progress(project, person.id))
            for person in found
        ]


def invite(
    url: str | None, role: Role, project: str | None, name: str = "", days: float = 7.0, again: bool = False
) -> str:
    """A code for an invitation; again: one that signs the person of this name in once more."""
    with open_store(url, create=False) as store:
        if again:
            return store.sign_in_link(store.person_named(name).id, by=None, days=days)
        return store.invite(role, project, by=None, name=name, days=days)


def invitations(url: str | None, project: str | None = None, *, closed: bool = False) -> list[Invitation]:
    """Links that can still be used, the newest first; closed: also those that cannot any more."""
    with open_store(url, create=False) as store:
        return [one for one in store.invitations(project) if closed or one.state == "open"]


def withdraw(url: str | None, number: int) -> Invitation:
    """Make an open invitation worthless."""
    with open_store(url, create=False) as store:
        return store.withdraw_invitation(number)


def pause_project(url: str | None, project: str, reason: str) -> Project:
    """Hand out nothing of a project any more; an empty reason: hand out again."""
    with open_store(url, create=False) as store:
        return store.pause_project(project, reason)


def set_role(url: str | None, name: str, role: Role) -> Person:
    """Give the person of this name another role."""
    with open_store(url, create=False) as store:
        return store.set_role(store.person_named(name).id, role)


def pause(url: str | None, name: str, reason: str | None, project: str | None = None) -> Person:
    """Pause the person of this name, in a project or everywhere; reason None: let them go on."""
    with open_store(url, create=False) as store:
        person = store.person_named(name)
        store.set_paused(person.id, reason, by=None, project=project)
        return store.person(person.id)


def sign_out(url: str | None, name: str) -> int:
    """End all sessions and tokens of the person of this name; how many there were."""
    with open_store(url, create=False) as store:
        return store.sign_out_everywhere(store.person_named(name).id, by=None)


def forget(url: str | None, name: str) -> Forgotten:
    """Take away a person's name, comments and sessions. Their votes stay, under a number."""
    with open_store(url, create=False) as store:
        return store.forget(store.person_named(name).id, by=None)


def verify(url: str | None, expected: str | None = None) -> AuditReport:
    """Check the log of changes; see `Store.verify`. The command exits with 3 where `broken` is not None."""
    with open_store(url, create=False) as store:
        return store.verify(expected)


def backup(url: str | None, path: str | Path) -> AuditReport:
    """Write everything into one new file."""
    with open_store(url, create=False) as store:
        return store.backup(path)


def restore(path: str | Path, url: str | None) -> AuditReport:
    """Bring a backup into an empty database."""
    if not Path(path).is_file():
        raise UsageError(f"{path} is not there")
    try:
        from keel.votes.store import Store
    except ModuleNotFoundError as error:
        raise missing(error) from None
    return Store.restore(path, url_or_default(url))
