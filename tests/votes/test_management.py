"""Invitations that are listed and withdrawn, and roles that change."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select

from keel.errors import UsageError
from keel.votes import schema
from keel.votes.kinds import Answer, GoneError, NotFoundError, TakenError

NOW, DAY = 1.0e9, 86400.0


def _log(store, subject):
    table = schema.audit
    return store.database.read(
        lambda c: c.execute(
            select(table.c.action, table.c.person_id).where(table.c.subject == subject).order_by(table.c.n)
        ).all()
    )


def test_invitations_are_listed_and_withdrawn(any_store, fill):
    fill(any_store, people=0)
    fill(any_store, name="q", people=0)
    root = any_store.add_person("root", "admin")
    kept = any_store.invite("annotator", "p", root.id, name="Ann", now=NOW)
    lost = any_store.invite("viewer", None, None, days=1, now=NOW)
    other = any_store.invite("annotator", "q", None, now=NOW)
    listed = any_store.invitations(now=NOW)
    assert [(i.id, i.role, i.project, i.name, i.by, i.state, i.again) for i in listed] == [
        (3, "annotator", "q", "", None, "open", False),
        (2, "viewer", None, "", None, "open", False),
        (1, "annotator", "p", "Ann", "root", "open", False),
    ]
    assert [i.id for i in any_store.invitations("p", now=NOW)] == [2, 1]
    assert not any(code in repr(listed) for code in (kept, lost, other))
    withdrawn = any_store.withdraw_invitation(2, root.id, now=NOW + 1)
    assert (withdrawn.id, withdrawn.state) == (2, "withdrawn")
    assert _log(any_store, "invitations:2") == [("invite", None), ("withdraw", root.id)]
    assert any_store.invitation(lost, NOW + 2) is None
    assert any_store.invitation_state(lost, NOW + 2) == "withdrawn"
    with pytest.raises(GoneError):
        any_store.accept(lost, "Eve", now=NOW + 2)
    any_store.accept(kept, now=NOW + 2)
    states = {i.id: i.state for i in any_store.invitations(now=NOW + 8 * DAY)}
    assert states == {1: "used", 2: "withdrawn", 3: "expired"}
    for number, reason in ((1, "was used"), (2, "was withdrawn before"), (3, "has expired")):
        with pytest.raises(UsageError, match=reason):
            any_store.withdraw_invitation(number, now=NOW + 8 * DAY)
    with pytest.raises(NotFoundError, match="no invitation number 9"):
        any_store.withdraw_invitation(9)
    assert any_store.invitation_state("never was") is None
    assert any_store.verify().broken is None


def test_a_link_that_signs_in_again_is_told_from_one_that_makes_a_person(store, fill):
    p = fill(store, people=1)
    store.sign_in_link(p.people[0].id, None)
    store.accept(store.invite("annotator", "p", None), "Eve")
    found = {one.name: one.again for one in store.invitations("p")}
    assert found == {"person 0": True, "Eve": False}


def test_a_withdrawal_and_its_use_at_once_are_one_of_the_two(any_store, fill):
    fill(any_store, people=0)
    code = any_store.invite("annotator", "p", None)

    def tried(deed):
        try:
            deed()
        except UsageError:
            return False
        return True

    with ThreadPoolExecutor(2) as pool:
        deeds = (lambda: any_store.accept(code, "Ann"), lambda: any_store.withdraw_invitation(1))
        assert sorted(pool.map(tried, deeds)) == [False, True]
    assert any_store.verify().broken is None


def test_the_first_admins_link_is_replaced_and_others_are_not(any_store):
    first, replaced = any_store.first_admin_link(now=NOW)
    assert replaced == 0
    asked = any_store.invite("admin", None, None, now=NOW)  # by keel label invite
    second, replaced = any_store.first_admin_link(now=NOW + 1)
    assert replaced == 1
    assert any_store.invitation_state(first, NOW + 2) == "withdrawn"
    assert any_store.invitation_state(asked, NOW + 2) == "open"
    any_store.accept(second, "Ann", now=NOW + 2)
    assert any_store.first_admin_link(now=NOW + 3) is None
    assert any_store.verify().broken is None


def test_a_role_changes_at_once(any_store, fill):
    p = fill(any_store, items=3, people=2)
    root = any_store.add_person("root", "admin")
    ann = any_store.session(any_store.accept(any_store.invite("annotator", "p", None), "Ann"))
    token = any_store.api_token(ann.id, None)
    done = any_store.next_item("p", ann.id, NOW).item
    any_store.cast("p", ann.id, done, Answer("a"), "c", 1.0, NOW)
    held = any_store.next_item("p", ann.id, NOW).item
    assert any_store.set_role(ann.id, "viewer", root.id).role == "viewer"
    assert any_store.person_of_token(token).role == "viewer"
    with pytest.raises(NotFoundError):
        any_store.next_item("p", ann.id, NOW)
    assert any_store.next_item("p", p.people[0].id, NOW).item == held  # it is free again
    assert [row.person for row in any_store.votes("p")] == ["Ann"]  # the votes stay
    fill(any_store, name="q", people=0)
    assert "Ann" not in [one.name for one in any_store.people("q")]
    any_store.set_role(ann.id, "admin", root.id)
    assert "Ann" in [one.name for one in any_store.people("q")]  # admins see every project
    any_store.set_role(root.id, "annotator", ann.id)
    assert _log(any_store, f"people:{ann.id}")[-2:] == [("role:viewer", root.id), ("role:admin", root.id)]
    rows = any_store.verify().rows
    any_store.set_role(root.id, "annotator", ann.id)
    assert any_store.verify().rows == rows  # nothing happened
    assert any_store.verify().broken is None


def test_who_is_no_longer_admin_sees_again_what_they_were_let_into(any_store, fill):
    fill(any_store, people=0)
    fill(any_store, name="q", people=0)
    root = any_store.add_person("root", "admin")
    any_store.accept(any_store.invite("annotator", "p", root.id), "Ann")
    ann = any_store.person_named("Ann")
    any_store.set_role(ann.id, "admin", root.id)
    assert [one.name for one in any_store.projects(ann.id)] == ["p", "q"]
    assert any_store.next_item("q", ann.id, NOW) is not None
    assert any_store.project_for("q", ann.id).name == "q"
    any_store.set_role(ann.id, "annotator", root.id)
    assert [one.name for one in any_store.projects(ann.id)] == ["p"]
    assert "Ann" not in [one.name for one in any_store.people("q")]
    with pytest.raises(NotFoundError):
        any_store.next_item("q", ann.id, NOW)
    with pytest.raises(NotFoundError):
        any_store.project_for("q", ann.id)
    assert any_store.next_item("p", ann.id, NOW) is not None
    assert any_store.verify().broken is None


def test_a_link_for_somebody_who_is_forgotten_works_no_longer(any_store, fill):
    p = fill(any_store, people=2)
    gone, other = p.people
    code = any_store.sign_in_link(gone.id, None)
    kept = any_store.sign_in_link(other.id, None)
    any_store.forget(gone.id, None)
    states = {one.id: one.state for one in any_store.invitations()}
    assert states == {1: "withdrawn", 2: "open"}
    assert any_store.invitation(code) is None
    with pytest.raises(GoneError):
        any_store.accept(code)
    assert any_store.accept(kept)
    assert any_store.verify().broken is None


def test_roles_that_cannot_be_are_refused(store):
    root = store.add_person("root", "admin")
    model = store.add_person("gpt", is_model=True)
    with pytest.raises(UsageError, match="the only admin"):
        store.set_role(root.id, "viewer", root.id)
    with pytest.raises(UsageError, match="is a model"):
        store.set_role(model.id, "admin", root.id)
    with pytest.raises(UsageError, match="one of admin, annotator, viewer"):
        store.set_role(root.id, "king", root.id)
    with pytest.raises(NotFoundError):
        store.set_role(99, "viewer", root.id)
    assert store.set_role(root.id, "viewer").role == "viewer"  # who owns the machine can make another one
    with pytest.raises(TakenError):
        store.add_person("ROOT")
