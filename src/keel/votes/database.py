"""Connections and transactions, on SQLite and PostgreSQL.

A transaction is a function of a connection. It is run again where the database says that it may succeed the
second time (a deadlock, a lock that others held too long). A change that lasts is on disk when `write`
returns: SQLite with WAL and synchronous=FULL, PostgreSQL as its server is set. Leases need not survive a
power cut: `lease` does without the wait for the disk. What is written later and waited for brings them along.
"""

from __future__ import annotations

import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from sqlalchemy import Connection, Engine, Table, bindparam, create_engine, event, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, DisconnectionError, OperationalError

from keel.errors import KeelError, UsageError
from keel.votes import missing

P = ParamSpec("P")
T = TypeVar("T")

BUSY_SECONDS = 15.0  # how long a transaction waits for another process's
TRIES = 8
WRITERS, READERS = 2, 3  # transactions that a process has open at a time; on SQLite one writes
IDLE_SECONDS = 5.0  # after which a connection to a server is tried before it is used
_BUSY = {"40001", "40P01", "55P03"}  # PostgreSQL: serialization failure, deadlock, lock not available
_UNIQUE = "23505"  # somebody else was faster: the next time a transaction sees what they did
_FULL = (
    "the disk of the database is full, or does not work: nothing of this was recorded; make room, then do it "
    "again"
)


class StoreError(KeelError):
    """The database could not do it: disk full, server gone. Nothing of the transaction was recorded."""


def parse(url: str) -> URL:
    """The address of a database. A path is that of an SQLite file. UsageError for anything else."""
    if "://" not in url:
        return URL.create("sqlite", database=url)
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise UsageError(f"{url.partition('://')[0]}://… is no address of a database") from None
    backend = parsed.drivername.partition("+")[0]
    if backend in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise UsageError(f"{backend} is not supported: give sqlite:///FILE or postgresql://USER@HOST/NAME")
    if not parsed.database or parsed.database == ":memory:":
        raise UsageError("votes are kept in a file: give sqlite:///FILE")
    return parsed.set(drivername="sqlite")


class Database:
    """An engine, and how transactions are run on it."""

    def __init__(self, url: URL) -> None:
        self.url = url
        self.is_sqlite = url.drivername == "sqlite"
        # Threads of one process queue up here: SQLite's own waiting polls, PostgreSQL's locks would be held
        # while a thread waits for the interpreter, and many threads that work at once make each other slower.
        self._writer = threading.BoundedSemaphore(1 if self.is_sqlite else WRITERS)
        self._reader = threading.BoundedSemaphore(READERS)
        try:
            self.engine = _engine(url, self.is_sqlite)
        except ModuleNotFoundError as error:
            raise missing(error) from None

    @property
    def shown(self) -> str:
        """The address without its password."""
        return self.url.render_as_string(hide_password=True)

    @property
    def path(self) -> Path:
        """The file of an SQLite database."""
        return Path(self.url.database or "")

    def read(self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `work` finds, in one snapshot of the database."""
        return self._attempts(lambda: self._once("read", work, args, kwargs), reading=True)

    def glance(self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As `read`, for what needs no single snapshot: fewer words with a server."""
        return self._attempts(lambda: self._once("glance", work, args, kwargs), reading=True)

    def write(self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `work` returns, once its changes are on disk. Where it raises, nothing has changed."""
        return self._attempts(lambda: self._once("write", work, args, kwargs))

    def lease(self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As `write`, for changes that may be lost in a power cut (never by a killed process)."""
        return self._attempts(lambda: self._once("lease", work, args, kwargs))

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """A connection on which several reads see the same state."""
        with _said(self.shown), self.engine.connect() as connection:
            self._prepare(connection, "read")
            with connection.begin():
                yield connection

    def _once(self, kind: str, work: Callable[..., T], args: Any, kwargs: Any) -> T:
        gate = self._reader if kind in ("read", "glance") else self._writer
        with gate, self.engine.connect() as connection:
            self._prepare(connection, kind)
            with connection.begin():
                return work(connection, *args, **kwargs)

    def _prepare(self, connection: Connection, kind: str) -> None:
        """Say what the transaction that `begin` opens will be like."""
        connection.info["begin"] = "BEGIN" if kind in ("read", "glance") else "BEGIN IMMEDIATE"
        if self.is_sqlite:
            mode = "NORMAL" if kind == "lease" else "FULL"
            if connection.info.get("synchronous") != mode:
                driver = connection.connection.driver_connection
                assert driver is not None
                driver.execute(f"PRAGMA synchronous={mode}")
                connection.info["synchronous"] = mode
        elif kind == "glance":
            connection.info["asynchronous"] = False
            connection.execution_options(isolation_level="AUTOCOMMIT")
        elif kind == "read":
            connection.info["asynchronous"] = False
            connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        else:
            connection.info["asynchronous"] = kind == "lease"

    def _attempts(self, once: Callable[[], T], *, reading: bool = False) -> T:
        with _said(self.shown):
            deadline = time.monotonic() + BUSY_SECONDS
            for attempt in range(TRIES):
                try:
                    return once()
                except DBAPIError as error:
                    full = attempt == 0 and self.is_sqlite and _is_full(error)
                    gone = error.connection_invalidated and attempt < 2 and reading
                    again = full or gone or (_may_succeed(error) and time.monotonic() < deadline)
                    if attempt == TRIES - 1 or not again:
                        raise
                if full:
                    self._make_room()
                time.sleep(random.uniform(0, 0.01 * 2**attempt))
        raise AssertionError("not reached")

    def _make_room(self) -> None:
        """Move SQLite's write-ahead log into the database. It does so by itself only after a transaction that
        went through: a disk that the log filled would stay full."""
        with suppress(sqlite3.Error), self._writer, self.engine.connect() as connection:
            driver = connection.connection.driver_connection
            assert driver is not None
            driver.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def scrub(self) -> None:
        """Take what was removed out of SQLite's file, too. PostgreSQL's own vacuum does it there."""
        if not self.is_sqlite:
            return
        with _said(self.shown), self._writer, self.engine.connect() as connection:
            driver = connection.connection.driver_connection
            assert driver is not None
            driver.execute("VACUUM")
            driver.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        self.engine.dispose()


# ---------------------------------------------------------------- statements
#
# SQLAlchemy takes four times as long to build a statement as to run one that is there (85 and 21 µs for a row
# by its key). What every vote runs is built once.


def insert_row(connection: Connection, table: Table, **values: Any) -> int:
    """Insert one row; the number that it was given."""
    key = connection.execute(_insert(table), values).inserted_primary_key
    return cast("tuple[int, ...]", key)[0]


def row_of(connection: Connection, table: Table, *, lock: bool = False, **where: Any) -> Any:
    """The row in which these columns have these values; None where there is none. lock: until the end of the
    transaction."""
    return connection.execute(_select(table, tuple(where), lock), where).one_or_none()


def change_rows(connection: Connection, table: Table, where: Mapping[str, Any], **values: Any) -> int:
    """Set columns of the rows in which others have given values. How many there are."""
    statement = _update(table, tuple(where), tuple(values), ())
    return connection.execute(statement, _named(where, values)).rowcount


def add_to(connection: Connection, table: Table, where: Mapping[str, Any], **by: float) -> int:
    """Add to columns of the rows in which others have given values. How many there are."""
    statement = _update(table, tuple(where), tuple(by), tuple(by))
    return connection.execute(statement, _named(where, by)).rowcount


def _named(where: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"is_{k}": v for k, v in where.items()} | {f"new_{k}": v for k, v in values.items()}


@cache
def _insert(table: Table) -> Any:
    return table.insert()


@cache
def _select(table: Table, names: tuple[str, ...], lock: bool) -> Any:
    statement = select(table).where(*(table.c[name] == bindparam(name) for name in names))
    return statement.with_for_update() if lock else statement


@cache
def _update(table: Table, where: tuple[str, ...], names: tuple[str, ...], added: tuple[str, ...]) -> Any:
    new = {name: bindparam(f"new_{name}", type_=table.c[name].type) for name in names}
    values = {name: table.c[name] + value if name in added else value for name, value in new.items()}
    return update(table).where(*(table.c[name] == bindparam(f"is_{name}") for name in where)).values(values)


def insert_ignore(connection: Connection, table: Table, values: Any) -> int:
    """Insert rows, leaving out those that are there. How many were new."""
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    return connection.execute(dialect.insert(table).values(values).on_conflict_do_nothing()).rowcount


def insert_new(connection: Connection, table: Table, rows: list[dict[str, Any]]) -> int:
    """Insert many rows, leaving out those that are there. How many were new."""
    return connection.execute(_insert_new(connection.dialect.name, table), rows).rowcount


@cache
def _insert_new(name: str, table: Table) -> Any:
    statement = (sqlite if name == "sqlite" else postgresql).insert(table).on_conflict_do_nothing()
    return statement.execution_options(preserve_rowcount=True)


def upsert(connection: Connection, table: Table, values: dict[str, Any], changed: tuple[str, ...]) -> None:
    """Insert a row, or change these columns of the one with its primary key."""
    connection.execute(_upsert(connection.dialect.name, table, changed), values)


@cache
def _upsert(name: str, table: Table, changed: tuple[str, ...]) -> Any:
    statement = (sqlite if name == "sqlite" else postgresql).insert(table)
    return statement.on_conflict_do_update(
        index_elements=list(table.primary_key.columns),
        set_={column: statement.excluded[column] for column in changed},
    )


def _engine(url: URL, is_sqlite: bool) -> Engine:
    options: dict[str, Any] = {"pool_size": 8, "max_overflow": 24, "pool_timeout": 30, "pool_use_lifo": True}
    if is_sqlite:
        options["connect_args"] = {"timeout": BUSY_SECONDS, "check_same_thread": False}
    else:
        options["pool_recycle"] = 3600
    engine = create_engine(url, **options)
    event.listen(engine, "begin", _begin)
    if is_sqlite:
        event.listen(engine, "connect", _pragmas)
    else:
        event.listen(engine, "checkin", _note_idle)
        event.listen(engine, "checkout", _try_idle)
    return engine


def _note_idle(_connection: object, record: Any) -> None:
    record.info["idle_since"] = time.monotonic()


def _try_idle(connection: Any, record: Any, _proxy: object) -> None:
    """Whether the server is still there, asked of a connection that was not used for a while. The pool takes
    another one where it is not."""
    if time.monotonic() - record.info.get("idle_since", time.monotonic()) < IDLE_SECONDS:
        return
    try:
        connection.execute("SELECT 1")
        connection.rollback()
    except Exception as error:
        raise DisconnectionError from error


def _pragmas(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # transactions are opened by `_begin`, never by the driver
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "temp_store=MEMORY"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(connection.info.get("begin", "BEGIN"))
    elif connection.info.get("asynchronous"):
        connection.exec_driver_sql("SET LOCAL synchronous_commit = off")


def _may_succeed(error: DBAPIError) -> bool:
    """Whether the same transaction may go through the next time."""
    original = error.orig
    if isinstance(original, sqlite3.OperationalError):
        return "locked" in str(original) or "busy" in str(original)
    return getattr(original, "sqlstate", None) in _BUSY | {_UNIQUE}


def _is_full(error: DBAPIError) -> bool:
    """Whether the disk had no room, or did not do what it should."""
    text = str(error.orig)
    full = any(words in text for words in ("disk is full", "No space left", "disk I/O"))
    return full or getattr(error.orig, "sqlstate", None) == "53100"


@contextmanager
def _said(where: str) -> Iterator[None]:
    """What goes wrong in a database, in keel's words."""
    try:
        yield
    except DBAPIError as error:
        raise _in_words(error, where) from error


def _in_words(error: DBAPIError, where: str) -> Exception:
    text = str(error.orig).strip().partition("\n")[0]
    state = getattr(error.orig, "sqlstate", None)
    if _is_full(error):
        return StoreError(_FULL)
    if "locked" in text or "busy" in text or state in _BUSY:
        return StoreError(f"{where} is busy: another program has held it for {BUSY_SECONDS:g} s; try again")
    if "unable to open database file" in text:
        return UsageError(f"{where} cannot be opened: its folder is not there, or you may not write there")
    if "readonly" in text:
        return UsageError(f"{where} cannot be written: its file or folder is read-only")
    if "file is not a database" in text or "malformed" in text:
        return UsageError(f"{where} is no SQLite database, or it is damaged; restore a backup")
    if isinstance(error, OperationalError):
        return StoreError(f"{where} does not answer as it should: {text}")
    return error
