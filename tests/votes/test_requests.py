"""Skips, flags and undos that arrive twice are done once; a paused project; items and votes that come in
together."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import func, select

from keel.errors import UsageError
from keel.votes import schema
from keel.votes.kinds import Answer, NewItem, PastJudgement, PausedError, Project, Reply, UsedError

NOW = 1.0e9
WEEK = 7 * 86400.0


def _votes(store, person, count):
    """This person's votes on so many items; the items."""
    items = []
    for step in range(count):
        items.append(store.next_item("p", person.id, NOW + step).item)
        store.cast("p", person.id, items[-1], Answer("a"), f"c{step}", 1.0, NOW + step)
    return items


def test_an_undo_that_arrives_twice_takes_one_vote_back(any_store, fill):
    p = fill(any_store)
    person = p.people[0]
    items = _votes(any_store, person, 3)
    assert any_store.undo("p", person.id, NOW + 9, client_id="u") == items[2]
    assert any_store.undo("p", person.id, NOW + 10, client_id="u") == items[2]
    assert len(list(any_store.votes("p"))) == 2
    assert any_store.undo("p", person.id, NOW + 11, client_id="v") == items[1]
    other = p.people[1]
    assert any_store.undo("p", other.id, NOW, client_id="u") is None  # another person's id is another one
    _votes(any_store, other, 1)
    assert any_store.undo("p", other.id, NOW + 12, client_id="u") is None  # as it was the first time
    assert len(list(any_store.votes("p"))) == 2
    assert any_store.verify().broken is None


def test_of_two_undos_at_once_with_one_id_one_is_done(any_store, fill):
    p = fill(any_store)
    _votes(any_store, p.people[0], 4)
    with ThreadPoolExecutor(4) as pool:
        undone = list(
            pool.map(lambda _: any_store.undo("p", p.people[0].id, NOW + 9, client_id="u"), range(4))
        )
    assert len(set(undone)) == 1
    assert len(list(any_store.votes("p"))) == 3


def test_a_skip_that_arrives_late_does_not_skip_what_came_back(any_store, fill):
    p = fill(any_store, items=1, people=1)
    person = p.people[0]
    item = any_store.next_item("p", person.id, NOW).item
    any_store.skip("p", person.id, item, NOW, client_id="s")
    again = any_store.next_item("p", person.id, NOW + 1)
    assert again.item == item  # nothing else is left
    any_store.skip("p", person.id, item, NOW + 2, client_id="s")
    held = any_store.database.read(lambda c: c.execute(select(schema.encounters.c.state)).scalar_one())
    assert held == "leased"
    any_store.skip("p", person.id, item, NOW + 3, client_id="t")
    held = any_store.database.read(lambda c: c.execute(select(schema.encounters.c.state)).scalar_one())
    assert held == "skipped"


def test_a_flag_that_arrives_twice_is_one(any_store, fill):
    p = fill(any_store)
    person = p.people[0]
    item = any_store.next_item("p", person.id, NOW).item
    for client_id in ("f", "f", "g"):
        any_store.flag("p", person.id, item, "cut off", NOW, client_id=client_id)
    assert len(any_store.flags("p")) == 2
    any_store.skip("p", person.id, item, NOW, client_id="f")  # a flag's id is free for a skip
    other = any_store.next_item("p", person.id, NOW).item
    for deed in (any_store.skip, lambda *given, **more: any_store.flag(*given[:3], "why", given[3], **more)):
        with pytest.raises(UsedError, match="used for another item"):
            deed("p", person.id, other, NOW, client_id="f")
    for wrong in ("", "x" * 201, "a\x00"):
        with pytest.raises(UsageError, match="1 to 200 characters"):
            any_store.undo("p", person.id, NOW, client_id=wrong)


def test_requests_are_forgotten_after_a_week_and_with_their_person(store, fill):
    p = fill(store, items=8)
    person = p.people[0]

    def kept():
        return store.database.read(lambda c: c.execute(select(func.count(schema.requests.c.at))).scalar_one())

    for step in range(3):
        item = store.next_item("p", person.id, NOW).item
        store.skip("p", person.id, item, NOW, client_id=f"s{step}")
    assert kept() == 3
    store.undo("p", person.id, NOW + WEEK + 1, client_id="later")
    assert kept() == 1
    store.forget(person.id, None)
    assert kept() == 0


# ---------------------------------------------------------------- a paused project


def test_a_paused_project_hands_out_nothing_and_loses_nothing(any_store, fill):
    p = fill(any_store, items=4)
    one, other = p.people[:2]
    done = any_store.next_item("p", one.id, NOW).item
    any_store.cast("p", one.id, done, Answer("a"), "before", 1.0, NOW)
    held, before = any_store.next_item("p", one.id, NOW + 1).item, any_store.revision("p")
    assert any_store.pause_project("p", " new rules ").paused == "new rules"
    assert any_store.revision("p") == before  # nothing that is learned from has changed
    for person in (one, other):
        assert any_store.next_item("p", person.id, NOW + 2) is None
        assert any_store.progress("p", person.id, NOW + 2).paused == "new rules"
    with pytest.raises(PausedError, match="new rules"):
        any_store.undo("p", one.id, NOW + 2)
    cast = any_store.cast("p", one.id, held, Answer("b"), "held", 1.0, NOW + 3)
    assert (cast.status, cast.paused) == ("counted", False)
    any_store.cast("p", one.id, done, Answer("tie"), "changed", 1.0, NOW + 3)
    any_store.change_project("p", None, title="New")
    assert any_store.project("p").paused == "new rules"
    any_store.pause_project("p", "")
    assert any_store.next_item("p", other.id, NOW + 4) is not None
    actions = any_store.database.read(
        lambda c: c.execute(
            select(schema.audit.c.action).where(schema.audit.c.subject == "projects:1").order_by("n")
        ).scalars().all()
    )  # fmt: skip
    assert actions == ["create", "paused", "change", "goes_on"]
    assert any_store.verify().broken is None


# ---------------------------------------------------------------- items with votes

ITEMS = [NewItem(f"n{i}", "?", [Reply("x"), Reply("y")]) for i in range(3)]


def test_items_and_votes_come_in_together_or_not_at_all(any_store):
    wrong = [PastJudgement("n0", "Ann", Answer("a")), PastJudgement("n1", "Ann", Answer("up"))]
    with pytest.raises(UsageError, match=r"vote 2 \(item 'n1'\)"):
        any_store.bring_in("new", ITEMS, wrong, None, make=Project("new"))
    assert (any_store.projects(), any_store.people()) == ([], [])
    added, voted = any_store.bring_in("new", iter(ITEMS), iter(wrong[:1]), None, make=Project("new"))
    assert (added.added, voted.added, len(list(any_store.votes("new")))) == (3, 1, 1)
    added, voted = any_store.bring_in("new", ITEMS, wrong[:1], None, make=Project("new", votes_per_item=9))
    assert (added.known, voted.known) == (3, 1)
    assert any_store.project("new").votes_per_item == 1  # one that is there keeps its settings
    assert any_store.verify().broken is None


def test_people_vote_while_items_and_votes_come_in(any_store, fill):
    p = fill(any_store, items=40, people=3, votes_per_item=3)

    def work(person):
        for step in range(12):
            item = any_store.next_item("p", person.id).item
            any_store.cast("p", person.id, item, Answer("a"), f"c{step}")

    def bring(number):
        new = [NewItem(f"new {number} {i}", "?", [Reply("x"), Reply("y")]) for i in range(5)]
        past = [PastJudgement(item.key, f"person {i % 3}", Answer("b")) for i, item in enumerate(new)]
        any_store.bring_in("p", new, past, None)

    with ThreadPoolExecutor(5) as pool:
        for done in [
            *(pool.submit(work, one) for one in p.people),
            *(pool.submit(bring, n) for n in range(4)),
        ]:
            done.result()
    assert len(list(any_store.votes("p"))) == 3 * 12 + 4 * 5
    assert any_store.verify().broken is None
