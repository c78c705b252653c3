"""Addresses, schemas old and new, what goes wrong on a disk, and life without the extra."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text

from keel.errors import UsageError
from keel.votes import audit, migrations, open_store, schema
from keel.votes.codec import digest
from keel.votes.database import Database, StoreError, parse
from keel.votes.kinds import NewItem, Project, Reply, Scale
from keel.votes.store import Store


def test_a_server_that_was_started_again_is_found_again(start_postgres):
    server = start_postgres()
    with Store.open(server.new_url()) as store:
        store.create_project(Project("p"), None)
        server.stop("immediate")
        with pytest.raises(StoreError, match="does not answer as it should"):
            store.project("p")
        server.start()
        assert store.project("p").name == "p"
        server.stop()
        server.start()
        assert store.project("p").name == "p"  # at once, by a connection that died
        store.create_project(Project("q"), None)


def test_the_migrations_make_the_tables_of_the_schema(any_store):
    def differences(connection):
        return compare_metadata(MigrationContext.configure(connection), schema.metadata)

    assert any_store.database.read(differences) == []
    assert ScriptDirectory(str(migrations.FOLDER)).get_current_head() == schema.HEAD


def test_an_older_schema_is_upgraded_and_keeps_its_rows(any_new_store, fill, newer):
    fill(any_new_store, people=2)
    assert not any_new_store.upgrade()
    assert migrations.upgrade(any_new_store.database, "0003", newer)
    assert not migrations.upgrade(any_new_store.database, "0003", newer)
    assert [person.name for person in any_new_store.people()] == ["person 0", "person 1"]
    assert any_new_store.verify().broken is None


def test_a_database_of_the_first_schema_is_read_on(tmp_path):
    """What was logged before there were columns for it holds: they count where they say something."""
    database = Database(parse(str(tmp_path / "old.db")))
    assert migrations.upgrade(database, "0001")

    def invite(connection):
        row = {
            "id": 1, "hash": "h", "role": "admin", "project_id": None, "person_id": None, "created_by": None,
            "created": 1.0, "expires": 9e9, "used": None,
        }  # fmt: skip
        names = ", ".join(row)
        values = ", ".join(f":{name}" for name in row)
        connection.execute(text(f"INSERT INTO invitations ({names}, name) VALUES ({values}, '')"), row)
        audit.append_digest(connection, "invitations:1", digest(row), "invite", at=1.0, by=None)

    database.write(invite)
    database.close()
    with Store.open(str(tmp_path / "old.db"), create=False) as store:
        assert store.verify().broken is None
        assert [one.state for one in store.invitations(now=2.0)] == ["open"]
        store.withdraw_invitation(1)
        assert store.verify().broken is None
        store.database.write(lambda c: c.execute(text("UPDATE invitations SET withdrawn = NULL")))
        assert "invitations:1 was changed" in store.verify().reason


def test_a_newer_schema_is_refused_in_one_line(any_new_store, newer):
    migrations.upgrade(any_new_store.database, "0003", newer)
    url = any_new_store.database.url.render_as_string(hide_password=False)
    with pytest.raises(UsageError, match=r"written by a newer keel \(schema 0003, this one knows 0002\)"):
        Store.open(url)


def test_a_migration_that_fails_changes_nothing(store, newer):
    file = newer / "versions" / "0003_motto.py"
    file.write_text(file.read_text() + "    raise RuntimeError('half way')\n")
    with pytest.raises(RuntimeError, match="half way"):
        migrations.upgrade(store.database, "0003", newer)
    assert store.database.read(migrations.revision_of) == "0002"
    columns = store.database.read(
        lambda c: [row[1] for row in c.exec_driver_sql("PRAGMA table_info(people)")]
    )
    assert "motto" not in columns


def test_a_database_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as raw:
        raw.execute("CREATE TABLE recipes (title)")
    raw.close()
    with pytest.raises(UsageError, match="holds tables of something else"):
        Store.open(str(path))
    (tmp_path / "text.db").write_text("a text that is no database, long enough to be read as one" * 20)
    with pytest.raises(UsageError, match="is no SQLite database, or it is damaged"):
        Store.open(str(tmp_path / "text.db"))


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("mysql://x/y", "mysql is not supported"),
        ("sqlite:///:memory:", "kept in a file"),
        ("sqlite://", "kept in a file"),
        ("postgresql://u:secret@127.0.0.1:1/x", "does not answer"),
        ("nonsense://", "nonsense"),
        ("/nowhere/at/all/votes.db", "cannot be opened: its folder is not there"),
    ],
)
def test_an_address_that_leads_nowhere_is_said_in_one_line_without_its_password(url, reason):
    with pytest.raises((UsageError, StoreError), match=reason) as caught:
        Store.open(url)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_not_there_is_only_made_when_it_may_be(tmp_path, monkeypatch):
    path = tmp_path / "votes.db"
    with pytest.raises(UsageError, match="is not there: make it with keel label create"):
        open_store(str(path), create=False)
    assert not path.exists()
    monkeypatch.setenv("KEEL_LABEL_DB", f"sqlite:///{path}")
    open_store().close()
    open_store(create=False).close()


def test_sqlite_waits_for_the_disk_where_something_must_last(store):
    def modes(connection):
        return [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        ]

    assert store.database.write(modes) == ["wal", 2, 1]
    assert store.database.lease(modes) == ["wal", 1, 1]  # 1: NORMAL; a lease need not survive a power cut
    assert store.database.write(modes) == ["wal", 2, 1]


FULL = """
import resource, sys
from keel.votes.kinds import NewItem, Project, Reply
from keel.votes.store import Store

with Store.open(sys.argv[1]) as store:
    store.create_project(Project("p"), None)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))
    done = 0
    try:
        for number in range(1000):
            store.add_items("p", [NewItem(str(number), "x" * 20_000, [Reply("a"), Reply("b")])], None)
            done += 1
    except Exception as error:
        print(done, type(error).__name__, error)
"""


def test_a_full_disk_is_said_and_loses_nothing_that_was_acknowledged(tmp_path):
    path = str(tmp_path / "votes.db")
    found = subprocess.run([sys.executable, "-c", FULL, path], capture_output=True, text=True, check=True)
    done, kind, message = found.stdout.split(" ", 2)
    assert kind == "StoreError"
    assert "nothing of this was recorded" in message
    with Store.open(path) as store:
        assert sum(1 for _ in store.items("p")) == int(done) > 0
        assert store.verify().broken is None
        store.add_items("p", [NewItem("more", "?", [Reply("a"), Reply("b")])], None)


@pytest.mark.parametrize("missing", ["sqlalchemy", "alembic", "psycopg"])
def test_without_the_extra_keel_says_how_to_install_it(tmp_path, missing):
    """A stand-in that cannot be imported takes the package's place."""
    program = f"""
import sys
sys.modules[{missing!r}] = None
import keel.votes.kinds, keel.votes.commands
from keel.errors import UsageError
from keel.votes import open_store
try:
    open_store({"'postgresql://x/y'" if missing == "psycopg" else repr(str(tmp_path / "v.db"))})
except UsageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    extra = "label-postgres" if missing == "psycopg" else "label"
    assert done.stdout.strip() == f"labels need {missing}: pip install 'keel-rlhf[{extra}]'", done.stderr


def test_only_an_opened_store_imports_sqlalchemy():
    names = "sys, keel, keel.votes.kinds, keel.votes.rows, keel.votes.commands"
    program = f"import {names}; print('sqlalchemy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_path_is_an_sqlite_file_and_a_server_is_reached_by_psycopg():
    assert parse("votes.db").render_as_string() == "sqlite:///votes.db"
    assert parse("sqlite:////tmp/votes.db").database == "/tmp/votes.db"
    assert parse("postgres://me@host/x").drivername == "postgresql+psycopg"
    assert Database(parse("x.db")).path == Path("x.db")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"name": "Big"}, "small letters"),
        ({"name": ""}, "small letters"),
        ({"task": "quiz"}, "a task is one of"),
        ({"order": "best"}, "an order is one of"),
        ({"allow": ("a",)}, "`allow` names 'a'"),
        ({"strength": True, "task": "edit"}, "`strength` is for pairwise"),
        ({"scales": (Scale("x"),)}, "`scales` are for rating"),
        ({"task": "rating", "scales": (Scale("x"), Scale("x"))}, "a name of its own"),
        ({"task": "rating", "scales": (Scale("x", 3, 3),)}, "goes from 3 to 3"),
        ({"votes_per_item": 0}, "between 1 and 100"),
        ({"gold_share": 1.5}, "not between 0 and 1"),
        ({"lease_minutes": 0}, "between 0 and a week"),
    ],
)
def test_settings_that_make_no_sense_are_refused(store, settings, reason):
    with pytest.raises(UsageError, match=reason):
        store.create_project(Project(**{"name": "p", **settings}), None)
    assert store.projects() == []


PAIR = [Reply("x"), Reply("y")]


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (NewItem("", "?", PAIR), "a key is a text"),
        (NewItem("k", "?", PAIR[:1]), "has 1 replies; a pairwise project wants 2"),
        (NewItem("k", " ", PAIR), "item 'k': the prompt is empty"),
        (NewItem("k", [], PAIR), "the prompt has no turns"),
        (NewItem("k", [{"content": "x"}], PAIR), "turn 1 is no"),
        (NewItem("k", "?", [Reply("x"), Reply("")]), "reply 2 is empty"),
        (NewItem("k", "?", PAIR, columns={"a": {1, 2}}), "its columns cannot be kept as JSON"),
        (NewItem("k", "?", PAIR, columns={"a": float("nan")}), "its columns cannot be kept as JSON"),
        (NewItem("k", "?", PAIR, priority=float("inf")), "not a finite number"),
        (NewItem("there", "other", PAIR), "already, and it says something else"),
    ],
)
def test_items_that_cannot_be_asked_about_are_refused_and_none_is_added(store, item, reason):
    store.create_project(Project("p"), None)
    store.add_items("p", [NewItem("there", "?", PAIR)], None)
    with pytest.raises(UsageError, match=reason):
        store.add_items("p", [NewItem("fine", "?", PAIR), item], None)
    assert [row.key for row in store.items("p")] == ["there"]


def test_the_same_items_again_are_known(any_store):
    any_store.create_project(Project("p"), None)
    items = [NewItem(f"k{i}", [{"role": "user", "content": "x"}], PAIR, {"n": i}) for i in range(5)]
    first, again = (
        any_store.add_items("p", items, None),
        any_store.add_items("p", iter([*items, *items]), None),
    )
    assert (first.added, first.known, again.added, again.known) == (5, 0, 0, 10)
    assert [(row.key, row.columns) for row in any_store.items("p")] == [(f"k{i}", {"n": i}) for i in range(5)]
    rows = any_store.verify().rows
    any_store.add_items("p", items, None)
    assert any_store.verify().rows == rows  # nothing happened
