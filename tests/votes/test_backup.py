"""Backups: one file from either database into either, and never over something."""

from __future__ import annotations

import sqlite3
import threading

import pytest

from keel.errors import UsageError
from keel.votes import backup, migrations, schema
from keel.votes.kinds import Answer, NewItem, Reply
from keel.votes.store import Store

NOW = 1.0e9


def _work(store, fill):
    p = fill(store, items=4, people=2, votes_per_item=2, gold=1)
    for person in p.people:
        for step in range(3):
            item = store.next_item("p", person.id, NOW + step).item
            answer = Answer("a", comment="naïve\n文")
            store.cast("p", person.id, item, answer, f"c{step}", 1.5, NOW + step)
    return store.accept(store.invite("annotator", "p", None), "guest")


@pytest.mark.parametrize(
    ("any_store", "into"),
    [
        ("sqlite", "postgresql"),
        ("postgresql", "sqlite"),
        ("sqlite", "sqlite"),
        pytest.param("postgresql", "postgresql", marks=pytest.mark.slow),
    ],
    indirect=["any_store"],
)
def test_a_backup_is_read_into_either_database(any_store, fill, tmp_path, into, request):
    session = _work(any_store, fill)
    path = tmp_path / "backup.keel"
    report = any_store.backup(path)
    assert report == any_store.verify()
    assert [one.name for one in tmp_path.iterdir()] == ["backup.keel"]
    url = str(tmp_path / "new.db") if into == "sqlite" else request.getfixturevalue("postgres").new_url()
    assert Store.restore(path, url) == report
    with Store.open(url) as copy:
        assert list(copy.votes("p")) == list(any_store.votes("p"))
        assert list(copy.items("p")) == list(any_store.items("p"))
        assert copy.revision("p") == any_store.revision("p")
        guest = copy.session(session)
        assert guest.name == "guest"
        got = copy.next_item("p", guest.id)  # new rows get numbers of their own
        assert copy.cast("p", guest.id, got.item, Answer("b"), "x").status == "counted"
        copy.add_items("p", [NewItem("new", "?", [Reply("a"), Reply("b")])], None)
        copy.add_person("another")
        assert copy.verify().broken is None


def test_a_backup_is_taken_while_people_work(store, fill, tmp_path):
    p = fill(store, items=40, people=1)
    done, errors = threading.Event(), []

    def vote():
        try:
            while (got := store.next_item("p", p.people[0].id)) is not None:
                store.cast("p", p.people[0].id, got.item, Answer("a"), f"{got.item}")
        except Exception as error:
            errors.append(error)
        done.set()

    worker, number = threading.Thread(target=vote), 0
    worker.start()
    while number < 2 or not (done.is_set() or number > 20):
        assert store.backup(tmp_path / f"{number}.db").broken is None
        number += 1
    worker.join()
    assert not errors
    assert store.counts("p")["counted"] == 40


def test_a_backup_replaces_nothing_and_a_restore_neither(store, fill, tmp_path, new_store):
    _work(store, fill)
    path = tmp_path / "backup.db"
    store.backup(path)
    with pytest.raises(UsageError, match="is there already"):
        store.backup(path)
    with pytest.raises(UsageError, match="is no folder"):
        store.backup(tmp_path / "none" / "backup.db")
    other = new_store()
    with pytest.raises(UsageError, match="is there already: a restore replaces nothing"):
        Store.restore(path, str(other.database.path))


def test_a_restore_into_a_database_that_is_used_is_refused(store, fill, tmp_path, postgres):
    fill(store)
    store.backup(tmp_path / "b.db")
    url = postgres.new_url()
    with Store.open(url) as other:
        other.add_person("somebody")
    with pytest.raises(UsageError, match="restore into an empty one"):
        Store.restore(tmp_path / "b.db", url)
    with Store.open(url) as other:
        assert [person.name for person in other.people()] == ["somebody"]
        assert other.verify().broken is None


def test_what_is_no_whole_backup_is_not_restored(store, fill, tmp_path):
    _work(store, fill)
    good = tmp_path / "good.db"
    store.backup(good)
    changed, text, cut, empty = (tmp_path / name for name in ("changed.db", "text.db", "cut.db", "empty.db"))
    changed.write_bytes(good.read_bytes())
    with sqlite3.connect(changed) as raw:
        raw.execute("UPDATE versions SET seconds = 99 WHERE id = 1")
    raw.close()
    text.write_text("no database at all, but a text")
    content = good.read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    sqlite3.connect(empty).execute("CREATE TABLE x (y)").connection.close()
    for path, reason in (
        (changed, "versions:1 was changed"), (text, "is no backup"), (cut, "is no backup|is damaged"),
        (empty, "is no backup"), (tmp_path / "none.db", "is not there"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=reason):
            Store.restore(path, str(tmp_path / "target.db"))
        assert not (tmp_path / "target.db").exists()


def test_a_backup_of_an_older_keel_is_upgraded_and_one_of_a_newer_refused(
    store, fill, tmp_path, newer, monkeypatch
):
    fill(store)
    old, new = tmp_path / "old.db", tmp_path / "new.db"
    store.backup(old)
    content = old.read_bytes()
    with monkeypatch.context() as later:
        later.setattr(schema, "HEAD", "0003")
        later.setattr(migrations, "FOLDER", newer)
        assert Store.restore(old, str(new)).broken is None
        assert old.read_bytes() == content
        with Store.open(str(new)) as restored:
            assert len(restored.people()) == 3
    with pytest.raises(UsageError, match="written by a newer keel"):
        Store.restore(new, str(tmp_path / "again.db"))


def test_a_database_that_does_not_verify_gives_no_backup(store, fill, tmp_path):
    _work(store, fill)
    with sqlite3.connect(store.database.path) as raw:
        raw.execute("UPDATE versions SET seconds = 99 WHERE id = 1")
    raw.close()
    with pytest.raises(UsageError, match="does not verify, so nothing was written: versions:1"):
        store.backup(tmp_path / "b.db")
    assert list(tmp_path.iterdir()) == []


def test_a_restore_that_fails_leaves_nothing_and_can_be_done_again(store, fill, tmp_path, monkeypatch):
    _work(store, fill)
    good, target = tmp_path / "good.db", tmp_path / "target.db"
    store.backup(good)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(backup, "_copy_rows", full)
        with pytest.raises(OSError, match="No space"):
            Store.restore(good, str(target))
    assert not list(tmp_path.glob("target.db*"))
    assert Store.restore(good, str(target)).broken is None
