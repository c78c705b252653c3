"""The log: whatever is changed behind keel's back is named."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from keel.votes.kinds import Answer

NOW = 1.0e9


@pytest.fixture
def used(any_store, fill):
    """A store in which something of everything has happened."""
    p = fill(any_store, items=4, people=2, gold=1)
    admin = any_store.add_person("root", "admin")
    any_store.accept(any_store.invite("annotator", "p", None), "guest")
    for step in range(3):
        item = any_store.next_item("p", p.people[0].id, NOW + step).item
        any_store.cast("p", p.people[0].id, item, Answer("a", comment="c"), f"c{step}", 1.0, NOW + step)
    any_store.flag("p", p.people[0].id, item, "odd", NOW)
    any_store.adjudicate("p", admin.id, item, Answer("b"), "so", NOW)
    any_store.set_paused(p.people[1].id, "tired", project="p")
    report = any_store.verify()
    assert report.broken is None
    assert report.rows >= 12
    return any_store


def _do(store, statement):
    rows = store.database.write(lambda c: c.execute(text(statement)).rowcount)
    assert rows > 0


CHANGES = [
    ("UPDATE versions SET answer = '{\"choice\":\"b\"}' WHERE id = 2", "versions:2 was changed"),
    ("UPDATE versions SET comment = 'other' WHERE id = 2", "the text of versions:2 was changed"),
    ("UPDATE versions SET comment = '', salt = '' WHERE id = 2", "the text of versions:2 was changed"),
    ("UPDATE votes SET withdrawn = true WHERE id = 1", "votes:1 was changed"),
    ("UPDATE tallies SET counted = 7", "the counts of p are not those of its votes"),
    ("UPDATE slots SET vote_id = NULL", "the counts of p are not those of its votes"),
    ("INSERT INTO votes (id, project_id, item_id, person_id, status, withdrawn, version, at)"
     " VALUES (77, 1, 1, 3, 'gold', false, 1, 0)", "votes:77 is not in the log"),
    ("UPDATE votes SET status = 'surplus' WHERE id = 1", "votes:1 was changed"),
    ("DELETE FROM adjudications", "adjudications:1 was removed"),
    ("UPDATE adjudications SET answer = '{\"choice\":\"a\"}'", "adjudications:1 was changed"),
    ("UPDATE flags SET reason = 'fine'", "the text of flags:1 was changed"),
    ("UPDATE items SET prompt = '\"other\"' WHERE id = 2", "items:2 was changed"),
    ("UPDATE items SET gold = NULL WHERE id = 5", "items:5 was changed"),
    ("UPDATE projects SET settings = '{}'", "projects:1 was changed"),
    ("UPDATE people SET role = 'admin' WHERE id = 1", "people:1 was changed"),
    ("UPDATE people SET name = 'Eve' WHERE id = 1", "the text of people:1 was changed"),
    ("UPDATE seats SET paused = NULL WHERE paused = 'tired'", "was changed"),
    ("UPDATE invitations SET withdrawn = 5", "invitations:1 was changed"),
    ("UPDATE invitations SET origin = 'first'", "invitations:1 was changed"),
    ("UPDATE credentials SET person_id = 3", "credentials:1 was changed"),
    ("INSERT INTO credentials (id, hash, kind, person_id, created) VALUES (9, 'x', 'api', 3, 0)",
     "credentials:9 is not in the log"),
    ("UPDATE audit SET at = 1 WHERE n = 4", "row 4 of the log was changed"),
    ("UPDATE audit SET hash = previous WHERE n = 4", "row 4 of the log was changed"),
    ("DELETE FROM audit WHERE n = 4", "row 4 of the log is missing"),
    ("DELETE FROM audit WHERE n = (SELECT max(n) FROM audit)", "the log ends at row"),
]  # fmt: skip


# each in SQLite, every third one in PostgreSQL as well; the others there by `make test-slow`
@pytest.mark.parametrize(
    ("any_store", "statement", "reason"),
    [
        pytest.param(kind, *change, marks=pytest.mark.slow if kind == "postgresql" and number % 3 else ())
        for kind in ("sqlite", "postgresql")
        for number, change in enumerate(CHANGES)
    ],
    indirect=["any_store"],
)
def test_what_is_changed_behind_keels_back_is_named(used, statement, reason):
    _do(used, statement)
    report = used.verify()
    assert report.broken is not None
    assert reason in report.reason
    if "row 4" in reason:
        assert report.broken == 4


def test_the_first_of_several_is_named(used):
    first = used.database.read(
        lambda c: c.execute(text("SELECT n FROM audit WHERE subject = 'versions:1'")).scalar()
    )
    _do(used, "UPDATE versions SET seconds = 9")
    assert used.verify().broken == first


def test_a_head_that_was_noted_shows_that_the_end_was_cut_off(used):
    noted = used.verify().head
    assert used.verify(noted).broken is None
    p = used.people()[0]
    item = used.next_item("p", p.id, NOW + 50).item
    used.cast("p", p.id, item, Answer("a"), "late", 1.0, NOW + 50)
    assert used.verify(noted).broken is None  # the log has grown, as it may
    later = used.verify().head
    last = "(SELECT max(n) FROM audit)"
    for statement in (
        "UPDATE slots SET vote_id = NULL WHERE vote_id = (SELECT max(id) FROM votes)",
        "UPDATE tallies SET counted = counted - 1",
        "DELETE FROM versions WHERE id = (SELECT max(id) FROM versions)",
        "DELETE FROM votes WHERE id = (SELECT max(id) FROM votes)",
        f"DELETE FROM audit WHERE n = {last}",
        f"UPDATE audit_head SET n = {last}, hash = (SELECT hash FROM audit WHERE n = {last})",
    ):
        _do(used, statement)
    assert used.verify().broken is None  # by itself it cannot know
    assert "rows were taken away" in used.verify(later).reason


def test_settings_and_reading_do_not_disturb_the_log(used):
    rows = used.verify().rows
    used.change_project("p", None, title="new")
    assert used.verify().rows == rows + 1
    list(used.votes("p"))
    used.progress("p", 1)
    used.next_item("p", 1)
    assert used.verify().rows == rows + 1
