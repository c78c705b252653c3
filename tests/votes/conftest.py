"""Databases to try: a new SQLite file, or a new database of a PostgreSQL server that lives as long as the
session."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("sqlalchemy", reason="needs SQLAlchemy (pip install 'keel-rlhf[label]')")

from sqlalchemy import Connection, text

from keel.votes import audit, migrations, schema
from keel.votes.kinds import Answer, NewItem, Project, Reply
from keel.votes.store import Store

MEMORY = Path("/dev/shm")
BINARIES = (*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True), Path("/usr/local/pgsql/bin"))


class Postgres:
    """A PostgreSQL server of our own on a free port of the loopback, run by a user that is not root."""

    def __init__(self, folder: Path, *, fsync: bool) -> None:
        found = shutil.which("pg_ctl")
        binaries = [path for path in BINARIES if (path / "pg_ctl").exists()]
        binaries += [Path(found).resolve().parent] if found else []
        if not binaries:
            pytest.skip("needs PostgreSQL's server (apt install postgresql)")
        pytest.importorskip("psycopg", reason="needs psycopg (pip install 'keel-rlhf[label-postgres]')")
        self.folder, self.binaries, self.data = folder, binaries[0], folder / "data"
        self.user = "postgres" if os.geteuid() == 0 else None  # the server refuses to be root
        if self.user:
            shutil.chown(folder, self.user)
        self.run("initdb", "-D", str(self.data), "-U", "keel", "-A", "trust", "-E", "UTF8", "--no-sync")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.options = f"-p {self.port} -k {folder} -c listen_addresses=127.0.0.1 -c max_connections=200"
        self.options += "" if fsync else " -c fsync=off"
        self.start()
        self.count, self.shared = 0, ""

    def run(self, name: str, *arguments: str) -> None:
        command = [str(self.binaries / name), *arguments]
        done = subprocess.run(
            command, user=self.user, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        assert done.returncode == 0, done.stderr.decode()

    def start(self) -> None:
        log = str(self.folder / "log")
        self.run("pg_ctl", "-D", str(self.data), "-w", "-l", log, "-o", self.options, "start")

    def stop(self, how: str = "fast") -> None:
        self.run("pg_ctl", "-D", str(self.data), "-w", "-m", how, "stop")

    def shared_url(self) -> str:
        """The address of a database that tests leave empty."""
        self.shared = self.shared or self.new_url()
        return self.shared

    def new_url(self) -> str:
        """The address of a new, empty database."""
        self.count += 1
        name = f"votes{self.count}"
        import psycopg

        address = f"postgresql://keel@127.0.0.1:{self.port}"
        with psycopg.connect(f"{address}/postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"{address}/{name}"


@pytest.fixture(scope="session")
def start_postgres() -> Iterator[Callable[..., Postgres]]:
    """Start a server: `start_postgres(fsync=True)` for one that waits for the disk."""
    started: list[Postgres] = []
    folders: list[tempfile.TemporaryDirectory[str]] = []

    def start(*, fsync: bool = False) -> Postgres:
        place = None if fsync or not MEMORY.is_dir() else MEMORY
        folders.append(tempfile.TemporaryDirectory(prefix="keel-pg-", dir=place))
        started.append(Postgres(Path(folders[-1].name), fsync=fsync))
        return started[-1]

    yield start
    for server in started:
        server.stop("immediate")
    for folder in folders:
        folder.cleanup()


@pytest.fixture(scope="session")
def postgres(start_postgres: Callable[..., Postgres]) -> Postgres:
    """A server for tests of what is done, not of how long it takes or lasts."""
    return start_postgres(fsync=False)


@pytest.fixture(scope="session")
def empty_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite database with the tables and nothing in them."""
    path = tmp_path_factory.mktemp("empty") / "empty.db"
    Store.open(str(path)).close()
    return path


@pytest.fixture
def new_store(empty_file: Path) -> Iterator[Callable[[], Store]]:
    """Makes empty stores on SQLite, on a disk that need not be waited for where there is one."""
    opened: list[Store] = []
    with tempfile.TemporaryDirectory(prefix="keel-votes-", dir=MEMORY if MEMORY.is_dir() else None) as folder:

        def make() -> Store:
            path = Path(folder) / f"votes{len(opened)}.db"
            shutil.copy(empty_file, path)
            opened.append(Store.open(str(path)))
            return opened[-1]

        yield make
        for store in opened:
            store.close()


@pytest.fixture
def store(new_store: Callable[[], Store]) -> Store:
    return new_store()


@pytest.fixture(params=["sqlite", "postgresql"])
def any_store(request: pytest.FixtureRequest, new_store: Callable[[], Store]) -> Iterator[Store]:
    """An empty store on each kind of database."""
    if request.param == "sqlite":
        yield new_store()
        return
    server = request.getfixturevalue("postgres")
    with Store.open(server.shared_url()) as store:
        yield store
        store.database.write(_empty)


def _empty(connection: Connection) -> None:
    """Take all rows out of all tables, much faster than a new database."""
    names = ", ".join(table.name for table in schema.metadata.sorted_tables)
    connection.execute(text(f"TRUNCATE {names} RESTART IDENTITY CASCADE"))
    connection.execute(schema.audit_head.insert().values(id=1, n=0, hash=audit.START))


@pytest.fixture(params=["sqlite", "postgresql"])
def any_new_store(request: pytest.FixtureRequest, new_store: Callable[[], Store]) -> Iterator[Store]:
    """As `any_store`, for tests that change the tables themselves."""
    if request.param == "sqlite":
        yield new_store()
        return
    with Store.open(request.getfixturevalue("postgres").new_url()) as store:
        yield store


@pytest.fixture
def fill() -> Callable[..., SimpleNamespace]:
    """Makes a project with items and people: `fill(store, items=20, people=3, gold=0, **settings)`."""

    def make(store: Store, items: int = 6, people: int = 3, gold: int = 0, **settings) -> SimpleNamespace:
        project = store.create_project(Project(settings.pop("name", "p"), **settings), by=None)
        replies = {"pairwise": 2, "ranking": 3}.get(project.task, 1)
        new = [
            NewItem(f"k{i}", f"prompt {i}", [Reply(f"reply {i}.{r}", f"model-{r}") for r in range(replies)])
            for i in range(items)
        ]
        new += [
            NewItem(f"gold{i}", f"gold {i}", [Reply("good"), Reply("bad")], gold=Answer("a"))
            for i in range(gold)
        ]
        store.add_items(project.name, new, by=None)
        return SimpleNamespace(
            project=project,
            name=project.name,
            people=[store.add_person(f"person {i}") for i in range(people)],
        )

    return make


NEXT = '''"""One more column."""
import sqlalchemy as sa
from alembic import op

revision, down_revision = "0003", "0002"


def upgrade():
    op.add_column("people", sa.Column("motto", sa.Text(), nullable=True))
'''


@pytest.fixture
def newer(tmp_path) -> Path:
    """The migrations of a keel to come."""
    folder = tmp_path / "migrations"
    shutil.copytree(migrations.FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "versions" / "0003_motto.py").write_text(NEXT)
    return folder
