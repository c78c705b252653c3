"""Backups: one SQLite file with keel's tables, whatever the database is.

Of an SQLite database it is an online copy; the rows of a PostgreSQL database are copied in one snapshot.
`restore` reads such a file into either. A backup is checked before it gets its name.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, func, select, text

from keel.errors import UsageError
from keel.votes import audit, migrations, schema
from keel.votes.database import Database, parse
from keel.votes.kinds import AuditReport

_AT_ONCE = 2000  # rows


def backup(database: Database, path: Path) -> AuditReport:
    """Write all of a database to a file that is not there yet. Raises UsageError, and leaves no file, where
    that cannot be, and where the copy does not verify."""
    if path.exists():
        raise UsageError(f"{path} is there already: a backup replaces nothing; give another name")
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent} is no folder: make it first")
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        if database.is_sqlite:
            _copy_file(database.path, part)
        else:
            with database.snapshot() as connection:
                _copy_rows_into_file(connection, part)
        report = check(part)
        if report.broken is not None:
            raise UsageError(f"the database does not verify, so nothing was written: {report.reason}")
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.link(part, path)  # fails where another backup took the name
    except FileExistsError:
        raise UsageError(f"{path} is there already: a backup replaces nothing; give another name") from None
    except (OSError, sqlite3.Error) as error:
        raise UsageError(f"{path} cannot be written: {error}") from None
    finally:
        _remove(part)
    return report


def _remove(path: Path) -> None:
    """Remove a database's file, with what SQLite keeps beside it."""
    for leftover in (path, *(Path(f"{path}{end}") for end in ("-wal", "-shm", "-journal"))):
        leftover.unlink(missing_ok=True)


def restore(path: Path, url: str) -> AuditReport:
    """Bring a backup into an empty database, made where there is none. UsageError for a file that is no
    backup or does not verify, and for a database that holds something."""
    with tempfile.TemporaryDirectory() as folder:
        if _revision(path) != schema.HEAD:  # of an older keel: a copy is brought to the newest schema first
            path = _upgraded(path, Path(folder))
        return _restore(path, url)


def _upgraded(path: Path, folder: Path) -> Path:
    copy = folder / path.name
    shutil.copyfile(path, copy)
    source = Database(parse(str(copy)))
    try:
        migrations.upgrade(source)
    finally:
        source.close()
    return copy


def _restore(path: Path, url: str) -> AuditReport:
    report = check(path)
    if report.broken is not None:
        raise UsageError(f"{path} does not verify: {report.reason}")
    target = Database(parse(url))
    try:
        if target.is_sqlite and target.path.exists() and target.path.stat().st_size:
            raise UsageError(f"{target.path} is there already: a restore replaces nothing; give another name")
        try:
            migrations.upgrade(target)
            source = Database(parse(str(path)))
            try:
                with source.snapshot() as reading:
                    target.write(_copy_rows, reading)
            finally:
                source.close()
        except BaseException:
            if target.is_sqlite:  # half of a restore is in nobody's way the next time
                target.close()
                _remove(target.path)
            raise
        return target.read(audit.verify, report.head)
    finally:
        target.close()


def check(path: Path) -> AuditReport:
    """Whether a backup is whole. UsageError for a file that is none. It is left as it is."""
    _revision(path)
    source = Database(parse(str(path)))
    try:
        return source.read(audit.verify)
    finally:
        source.close()


def _revision(path: Path) -> str:
    """The schema of a backup. UsageError for a file that is none, or damaged. It is left as it is."""
    if not path.is_file():
        raise UsageError(f"{path} is not there")
    try:
        raw = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        try:
            found = raw.execute("PRAGMA integrity_check").fetchone()[0]
            revision = raw.execute("SELECT version_num FROM alembic_version").fetchone()
        finally:
            raw.close()
    except sqlite3.Error:
        raise UsageError(f"{path} is no backup of keel's votes") from None
    if found != "ok" or revision is None:
        raise UsageError(f"{path} is damaged: {found}")
    return revision[0]


def _copy_file(source: Path, target: Path) -> None:
    """SQLite's online backup: writers go on meanwhile."""
    reading, writing = sqlite3.connect(source), sqlite3.connect(target)
    try:
        reading.backup(writing, pages=1000, sleep=0.005)
        writing.execute("PRAGMA journal_mode=DELETE")  # one file, no -wal beside it
    finally:
        writing.close()
        reading.close()


def _copy_rows_into_file(connection: Connection, path: Path) -> None:
    target = Database(parse(str(path)))
    try:
        migrations.upgrade(target)
        target.write(_copy_rows, connection)
    finally:
        target.close()
    raw = sqlite3.connect(path)
    try:
        raw.execute("PRAGMA journal_mode=DELETE")
    finally:
        raw.close()


def _copy_rows(target: Connection, source: Connection) -> None:
    """All rows of all tables, in the order of their references, into tables that are empty."""
    for table in schema.metadata.sorted_tables:
        first = target.execute(select(func.count()).select_from(table)).scalar_one()
        if table is schema.audit_head:
            target.execute(table.delete())
        elif first:
            raise UsageError("the database holds something already: restore into an empty one")
        rows = source.execution_options(yield_per=_AT_ONCE).execute(
            select(table).order_by(*table.primary_key.columns)
        )
        for part in rows.mappings().partitions(_AT_ONCE):
            target.execute(table.insert(), [dict(row) for row in part])
    if target.dialect.name == "postgresql":
        for table in schema.metadata.sorted_tables:
            _continue_numbers(target, table)


def _continue_numbers(target: Connection, table: Any) -> None:
    """PostgreSQL gives new rows the numbers after those that were copied."""
    if "id" not in table.c or table is schema.audit_head:
        return
    last = target.execute(select(func.max(table.c.id))).scalar()
    if last is not None:
        target.execute(
            text("SELECT setval(pg_get_serial_sequence(:name, 'id'), :last)"),
            {"name": table.name, "last": last},
        )
