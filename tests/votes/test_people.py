"""People: invitations, sessions, tokens, and being forgotten."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import select

from keel.errors import UsageError
from keel.votes import people, schema
from keel.votes.kinds import Answer, NotFoundError

NOW, DAY = 1.0e9, 86400.0


def test_an_invitation_makes_one_person_once(any_store, fill):
    fill(any_store, people=0)
    code = any_store.invite("annotator", "p", None, name="Ann", now=NOW)
    assert any_store.invitation(code, NOW) == "Ann"
    token = any_store.accept(code, "", now=NOW)
    person = any_store.session(token, NOW)
    assert (person.name, person.role) == ("Ann", "annotator")
    assert any_store.invitation(code, NOW) is None
    for used in (code, "never was"):
        with pytest.raises(UsageError, match="was used, has expired, or never was"):
            any_store.accept(used, "Eve", now=NOW)
    assert [p.name for p in any_store.people("p")] == ["Ann"]
    assert any_store.verify().broken is None


def test_invitations_sessions_and_tokens_expire(store):
    code = store.invite("viewer", None, None, days=1, now=NOW)
    with pytest.raises(UsageError, match="has expired"):
        store.accept(code, "Ann", now=NOW + DAY)
    token = store.accept(store.invite("viewer", None, None, now=NOW), "Ann", days=2, now=NOW)
    person = store.session(token, NOW + 2 * DAY - 1)
    assert store.session(token, NOW + 2 * DAY) is None
    lasting, short = store.api_token(person.id, None), store.api_token(person.id, None, days=0.0)
    assert store.person_of_token(lasting, NOW + 9999 * DAY) == person
    assert store.person_of_token(short) is None


def test_a_session_is_no_token_and_a_token_no_session(store):
    session = store.accept(store.invite("admin", None, None), "Ann")
    token = store.api_token(store.session(session).id, None)
    assert token.startswith("keel_")
    assert store.session(token) is None
    assert store.person_of_token(session) is None


def test_who_signs_out_is_out(store):
    session = store.accept(store.invite("admin", None, None), "Ann")
    ann = store.session(session)
    again = store.accept(store.sign_in_link(ann.id, None))
    assert store.session(again) == ann
    store.sign_out(session)
    assert store.session(session) is None
    assert store.session(again) == ann
    token = store.api_token(ann.id, ann.id)
    assert store.sign_out_everywhere(ann.id) == 2
    assert store.session(again) is None
    assert store.person_of_token(token) is None
    assert store.verify().broken is None


def test_no_code_or_token_stands_in_the_database(store):
    code = store.invite("admin", None, None)
    session = store.accept(code, "Ann")
    token = store.api_token(1, None)
    store.close()
    content = b"".join(path.read_bytes() for path in store.database.path.parent.glob("votes0.db*"))
    assert not any(secret.encode() in content for secret in (code, session, token))


@pytest.mark.parametrize("name", ["", "   ", "x" * 81, "a\u200bb", "removed-3", "Removed-x"])
def test_names_that_nobody_could_read_or_that_mean_something_are_refused(store, name):
    with pytest.raises(UsageError, match="name"):
        store.add_person(name)


def test_names_are_compared_as_people_read_them(store):
    store.add_person("Ann  Lee")
    for same in ("ann lee", "ＡＮＮ ＬＥＥ"):
        with pytest.raises(UsageError, match="already"):
            store.add_person(same)
    assert store.person_named("ANN LEE").name == "Ann Lee"
    with pytest.raises(NotFoundError, match="nobody named 'Bob'"):
        store.person_named("Bob")
    with pytest.raises(UsageError, match="one of admin, annotator, viewer"):
        store.add_person("Bob", "boss")


def test_who_is_forgotten_leaves_votes_under_a_number(any_store, fill):
    p = fill(any_store, items=3, people=2)
    admin = any_store.add_person("root", "admin")
    gone = any_store.session(any_store.accept(any_store.invite("annotator", None, None), "Zaphod Beeblebrox"))
    token = any_store.api_token(gone.id, None)
    item = any_store.next_item("p", gone.id, NOW).item
    any_store.cast("p", gone.id, item, Answer("a", comment="two heads are better"), "c", 1.0, NOW)
    any_store.flag("p", gone.id, item, "forty-two", NOW)
    leased = any_store.next_item("p", gone.id, NOW).item
    before = any_store.revision("p")
    forgotten = any_store.forget(gone.id, admin.id)
    name = f"removed-{gone.id}"
    assert (forgotten.name, forgotten.votes, forgotten.comments, forgotten.credentials) == (name, 1, 2, 2)
    (row,) = any_store.votes("p")
    assert (row.person, row.answer) == (name, Answer("a"))
    assert any_store.flags("p")[0].reason == ""
    assert any_store.person_of_token(token) is None
    assert any_store.next_item("p", p.people[0].id, NOW).item == leased
    assert any_store.revision("p") != before
    assert any_store.verify().broken is None
    with pytest.raises(NotFoundError):
        any_store.next_item("p", gone.id, NOW)
    any_store.add_person("Zaphod Beeblebrox")  # the name is free again


def test_nothing_of_who_is_forgotten_stays_in_the_file(store, fill):
    fill(store, people=0)
    gone = store.add_person("Zaphod Beeblebrox")
    item = store.next_item("p", gone.id, NOW).item
    store.cast("p", gone.id, item, Answer("a", comment="two heads are better"), "c", 1.0, NOW)

    def content() -> bytes:
        files: list[Path] = list(store.database.path.parent.glob("votes0.db*"))
        return b"".join(path.read_bytes() for path in files).lower()

    assert b"beeblebrox" in content()
    store.forget(gone.id, None)
    assert b"beeblebrox" not in content()
    assert b"two heads" not in content()


def test_the_only_admin_is_not_forgotten(store):
    admin = store.add_person("root", "admin")
    with pytest.raises(UsageError, match="the only admin"):
        store.forget(admin.id, admin.id)
    other = store.add_person("other", "admin")
    store.forget(admin.id, other.id)


def test_a_pause_everywhere_holds_in_every_project(store, fill):
    p = fill(store, people=1)
    store.set_paused(p.people[0].id, "holiday")
    assert store.next_item("p", p.people[0].id, NOW) is None
    assert store.progress("p", p.people[0].id, NOW).paused == "holiday"
    store.set_paused(p.people[0].id, None)
    assert store.next_item("p", p.people[0].id, NOW) is not None


def test_hashes_are_what_is_kept(store):
    store.accept(store.invite("admin", None, None), "Ann")
    hashes = store.database.read(lambda c: c.execute(select(schema.credentials.c.hash)).scalars().all())
    assert len(hashes[0]) == 64


def test_of_two_who_use_an_invitation_at_once_one_comes_in(any_store, fill, monkeypatch):
    fill(any_store, people=0)
    code, made = any_store.invite("annotator", "p", None), people.add

    def slow(*args):
        time.sleep(0.15)  # so that both have looked at the code before one of them has used it
        return made(*args)

    monkeypatch.setattr(people, "add", slow)

    def use(name: str) -> bool:
        try:
            return bool(any_store.accept(code, name))
        except UsageError:
            return False

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(use, ("Ann", "Eve"))) == [False, True]
    assert len(any_store.people("p")) == 1
