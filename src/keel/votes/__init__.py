# pyright: strict
"""The database of people's judgements: who was asked what, what they said, and a log that shows changes.

    store = open_store("sqlite:///keel-label.db")
    project = store.create_project(Project("helpdesk", votes_per_item=3), by=None)

It needs SQLAlchemy and Alembic (`pip install 'keel-rlhf[label]'`), and imports them when a store is opened.
`kinds` holds the plain values that go in and out, `rows` makes training data of votes.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from keel.errors import UsageError

if TYPE_CHECKING:
    from keel.votes.store import Store

DEFAULT_URL = "sqlite:///keel-label.db"
URL_VARIABLE = "KEEL_LABEL_DB"
_EXTRAS = {"sqlalchemy": "label", "alembic": "label", "psycopg": "label-postgres"}


def url_or_default(url: str | None) -> str:
    """The address given, else that of the environment, else a file in the working directory."""
    return url or os.environ.get(URL_VARIABLE) or DEFAULT_URL


def open_store(url: str | None = None, *, create: bool = True) -> Store:
    """The database at `url` (see `url_or_default`). UsageError where a package that it needs is missing."""
    try:
        from keel.votes.store import Store
    except ModuleNotFoundError as error:
        raise missing(error) from None
    return Store.open(url_or_default(url), create=create)


def missing(error: ModuleNotFoundError) -> Exception:
    """The error that says how to install what is missing; the error itself for another module."""
    package = (error.name or "").partition(".")[0]
    if package not in _EXTRAS:
        return error
    return UsageError(f"labels need {package}: pip install 'keel-rlhf[{_EXTRAS[package]}]'")
