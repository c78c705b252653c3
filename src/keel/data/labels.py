"""`label:PROJECT`: what people said in a project of `keel label`, as rows.

A database of votes changes while others read it. What a source held when it was first read is kept with the
run's cache, so that the rows that are trained on and the fingerprint they count under are the same ones.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from keel.data.values import nearest
from keel.errors import UsageError
from keel.types import DataSource

if TYPE_CHECKING:
    from keel.data.stored.cache import Cache

PREFIX = "label:"
OPTIONS = ("db", "models", "surplus", "adjudicated")


@dataclass(frozen=True, slots=True)
class Held:
    """What a source held."""

    rows: tuple[dict[str, Any], ...]
    digest: str


def is_label(source: str) -> bool:
    return source.startswith(PREFIX)


def shown(source: str) -> str:
    """A source as messages and columns show it: without the address of its database, which may hold a
    password."""
    return source.partition("@")[0] if is_label(source) else source


def read(source: DataSource, cache: Cache | None = None) -> Held:
    """The rows of a project's votes; the same ones for as long as a cache lasts.

    UsageError for an option that does not exist, a database or project that is not there, a package that is
    missing, and a project without votes.
    """
    name, options = _settings(source)
    key = repr((PREFIX, name, sorted(options.items())))
    if cache is not None and key in cache.snapshots:
        return cache.snapshots[key]
    try:
        held = _read(name, options)
    except UsageError as error:
        raise UsageError(f"{shown(source.source)}: {error}") from None
    if cache is not None:
        cache.snapshots[key] = held
    return held


def _settings(source: DataSource) -> tuple[str, dict[str, Any]]:
    """The project's name, and the options with the database among them."""
    name, at, url = source.source.removeprefix(PREFIX).partition("@")
    where, options = shown(source.source), dict(source.options)
    if not name or (at and not url):
        raise UsageError(f"{where}: write label:PROJECT, or label:PROJECT@sqlite:///FILE")
    for option, value in options.items():
        if option not in OPTIONS:
            close = nearest(option, OPTIONS)
            hint = f"did you mean {close}?" if close else f"known: {', '.join(OPTIONS)}"
            raise UsageError(f"{where}: unknown option {option!r}; {hint}")
        if option in ("models", "surplus") and not isinstance(value, bool):
            raise UsageError(f"{where}: option {option} is true or false, not {value!r}")
    if options.get("adjudicated", "label") not in ("label", "beside"):
        raise UsageError(f"{where}: option adjudicated is label or beside, not {options['adjudicated']!r}")
    if at and options.get("db"):
        raise UsageError(f"{where}: the database is given twice, behind @ and as the option db")
    return name, {**options, "db": url or options.get("db")}


def _read(name: str, options: dict[str, Any]) -> Held:
    from keel import votes  # needs an extra, and few runs read votes
    from keel.votes import rows as training_rows

    with votes.open_store(options["db"], create=False) as store:
        project = store.project(name)
        taken = {option: options[option] for option in OPTIONS[1:] if option in options}
        rows = tuple(training_rows.rows(store, project.name, **taken))
        if not rows:
            counts = store.counts(name)
            raise UsageError(
                f"there is nothing to learn from yet: {counts['counted']} of {counts['wanted']} votes are "
                "in, none of which decides; people vote at the address that keel label serve prints"
            )
    text = json.dumps(rows, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return Held(rows, hashlib.sha256(text).hexdigest())
