"""Votes: cast once, changed, withdrawn, late, repeated."""

from __future__ import annotations

import pytest
from sqlalchemy import select

from keel.errors import UsageError
from keel.votes import schema
from keel.votes.kinds import Answer, NotFoundError, PastJudgement, Scale

NOW = 1.0e9


def _versions(store):
    table = schema.versions
    return store.database.read(
        lambda c: c.execute(select(table.c.kind, table.c.answer, table.c.version).order_by(table.c.id)).all()
    )


def test_the_same_client_id_is_the_same_vote(any_store, fill):
    p = fill(any_store)
    person = p.people[0]
    item = any_store.next_item("p", person.id, NOW).item
    first = any_store.cast("p", person.id, item, Answer("a"), "c1", 2.0, NOW)
    again = any_store.cast("p", person.id, item, Answer("b"), "c1", 2.0, NOW + 1)
    assert (first.status, again.status, again.vote) == ("counted", "repeated", first.vote)
    (row,) = any_store.votes("p")
    assert (row.answer.choice, row.seconds, row.at, row.version) == ("a", 2.0, NOW, 1)
    other = any_store.next_item("p", person.id, NOW + 2).item
    with pytest.raises(UsageError, match="used for another item"):
        any_store.cast("p", person.id, other, Answer("a"), "c1", 2.0, NOW + 3)


def test_two_people_may_use_the_same_client_id(store, fill):
    p = fill(store, votes_per_item=2)
    for person in p.people[:2]:
        item = store.next_item("p", person.id, NOW).item
        assert store.cast("p", person.id, item, Answer("a"), "c1", None, NOW).status == "counted"


def test_an_edit_is_a_new_version_of_the_same_vote(any_store, fill):
    p = fill(any_store)
    person = p.people[0]
    item = any_store.next_item("p", person.id, NOW).item
    first = any_store.cast("p", person.id, item, Answer("a", comment="so"), "c1", 2.0, NOW)
    seen = any_store.assignment("p", person.id, item)
    assert (seen.how, seen.previous) == ("edit", Answer("a", comment="so"))
    edited = any_store.cast("p", person.id, item, Answer("tie"), "c2", 3.0, NOW + 5)
    assert (edited.vote, edited.status) == (first.vote, "counted")
    (row,) = any_store.votes("p")
    assert (row.answer.choice, row.version, row.at) == ("tie", 2, NOW + 5)
    assert [(v.kind, v.version) for v in _versions(any_store)] == [("cast", 1), ("edit", 2)]
    assert any_store.counts("p")["counted"] == 1


def test_undo_withdraws_the_newest_vote_and_leases_its_item_again(any_store, fill):
    p = fill(any_store)
    person = p.people[0]
    items = []
    for step in range(2):
        items.append(any_store.next_item("p", person.id, NOW + step).item)
        any_store.cast("p", person.id, items[-1], Answer("a"), f"c{step}", 1.0, NOW + step)
    holding = any_store.next_item("p", person.id, NOW + 3)
    assert any_store.undo("p", person.id, NOW + 4) == items[1]
    assert [row.item for row in any_store.votes("p")] == [items[0]]
    assert any_store.next_item("p", person.id, NOW + 5).item == items[1]  # before what was leased earlier
    assert any_store.cast("p", person.id, items[1], Answer("b"), "c9", 1.0, NOW + 6).status == "counted"
    assert any_store.next_item("p", person.id, NOW + 7).item == holding.item
    assert [v.kind for v in _versions(any_store)] == ["cast", "cast", "undo", "cast"]  # none is deleted
    assert any_store.undo("p", person.id, NOW + 8) == items[1]
    assert any_store.undo("p", person.id, NOW + 9) == items[0]
    assert any_store.undo("p", person.id, NOW + 10) is None
    assert any_store.progress("p", person.id, NOW + 11).done == 0
    assert any_store.verify().broken is None


def test_a_late_vote_is_kept_beside_the_one_that_filled_its_slot(any_store, fill):
    p = fill(any_store, items=1, people=2, lease_minutes=1)
    slow, quick = p.people
    item = any_store.next_item("p", slow.id, NOW).item
    any_store.next_item("p", quick.id, NOW + 61)
    assert any_store.cast("p", quick.id, item, Answer("a"), "q", 1.0, NOW + 62).status == "counted"
    assert any_store.cast("p", slow.id, item, Answer("b"), "s", 70.0, NOW + 70).status == "surplus"
    assert [(row.person, row.counted) for row in any_store.votes("p")] == [
        ("person 1", True), ("person 0", False),
    ]  # fmt: skip
    assert [row.person for row in any_store.votes("p", counted_only=True)] == ["person 1"]
    assert any_store.counts("p")["counted"] == 1


def test_a_late_vote_counts_while_nobody_else_has_the_item(store, fill):
    p = fill(store, items=1, people=1, lease_minutes=1)
    item = store.next_item("p", p.people[0].id, NOW).item
    assert store.cast("p", p.people[0].id, item, Answer("b"), "s", 1.0, NOW + 999).status == "counted"


@pytest.mark.parametrize("how", ["the lease runs out", "the item is skipped", "more votes are wanted"])
def test_a_surplus_vote_takes_the_next_slot_that_is_free(any_store, fill, how):
    p = fill(any_store, items=1, people=3, lease_minutes=1)
    slow, quick, third = p.people
    item = any_store.next_item("p", slow.id, NOW).item
    any_store.next_item("p", quick.id, NOW + 61)
    assert any_store.cast("p", slow.id, item, Answer("b"), "s", 1.0, NOW + 70).status == "surplus"
    if how == "the item is skipped":
        any_store.skip("p", quick.id, item, NOW + 71)
    elif how == "more votes are wanted":
        any_store.change_project("p", None, votes_per_item=2, now=NOW + 71)
    assert any_store.next_item("p", third.id, NOW + 200 if how == "the lease runs out" else NOW + 72) is None
    (row,) = any_store.votes("p")
    assert (row.person, row.counted, row.answer.choice, row.version) == ("person 0", True, "b", 2)
    assert any_store.verify().broken is None


def test_nobody_votes_on_an_item_that_was_not_theirs(any_store, fill):
    p = fill(any_store, items=2)
    one, other = p.people[:2]
    item = any_store.next_item("p", one.id, NOW).item
    for call in (
        lambda: any_store.cast("p", other.id, item, Answer("a"), "c", 1.0, NOW),
        lambda: any_store.assignment("p", other.id, item),
        lambda: any_store.skip("p", other.id, item),
        lambda: any_store.flag("p", other.id, item, "odd"),
        lambda: any_store.cast("p", one.id, 999, Answer("a"), "c", 1.0, NOW),
    ):
        with pytest.raises(NotFoundError, match="was given no item number"):
            call()
    fill(any_store, name="q", people=0)
    with pytest.raises(NotFoundError, match="was given no item number"):
        any_store.assignment("q", one.id, item)


@pytest.mark.parametrize(
    ("settings", "answer", "message"),
    [
        ({}, Answer("c"), "not one of a, b, tie, both_bad, cannot_judge"),
        ({"allow": ("tie",)}, Answer("both_bad"), "not one of a, b, tie"),
        ({}, Answer("a", strength=2), "does not ask how much"),
        ({"strength": True}, Answer("tie", strength=2), "not with 'tie'"),
        ({"strength": True}, Answer("a", strength=4), "not 1, 2 or 3"),
        ({}, Answer(ratings={"helpful": 3}), "pairwise project has no `ratings`"),
        ({"comment": False}, Answer("a", comment="x"), "takes no comments"),
        ({}, Answer("a", comment="x" * 10_001), "longer than 10,000"),
        ({"task": "thumbs"}, Answer("a"), "not one of up, down, cannot_judge"),
        ({"task": "rating"}, Answer(ratings={"helpful": 3}), "helpful, harmless, honest"),
        ({"task": "rating", "scales": (Scale("x", 1, 3),)}, Answer(ratings={"x": 4}), "from 1 to 3"),
        ({"task": "rating", "scales": (Scale("x", 1, 3),)}, Answer(ratings={"x": True}), "from 1 to 3"),
        ({"task": "ranking"}, Answer(ranking=[[0, 1]]), "each of the 3 replies once"),
        ({"task": "ranking"}, Answer(ranking=[[0, 1], [], [2]]), "empty group"),
        ({"task": "edit"}, Answer(text="  "), "is empty"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused_and_changes_nothing(store, fill, settings, answer, message):
    p = fill(store, people=1, **settings)
    item = store.next_item("p", p.people[0].id, NOW).item
    with pytest.raises(UsageError, match=message):
        store.cast("p", p.people[0].id, item, answer, "c", 1.0, NOW)
    assert list(store.votes("p")) == []
    assert store.verify().broken is None


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({"strength": True}, Answer("b", strength=3, comment="line\nline \u0000 \ud800 نص")),
        ({"task": "thumbs"}, Answer("up")),
        ({"task": "rating"}, Answer(ratings={"helpful": 1, "harmless": 5, "honest": 3})),
        ({"task": "ranking"}, Answer(ranking=[[2], [0, 1]])),
        ({"task": "edit"}, Answer(text="better \u0000 \ud800 文")),
    ],
)
def test_every_kind_of_answer_comes_back_as_it_was_given(any_store, fill, settings, answer):
    p = fill(any_store, people=1, **settings)
    item = any_store.next_item("p", p.people[0].id, NOW).item
    any_store.cast("p", p.people[0].id, item, answer, "c", float("nan"), NOW)
    (row,) = any_store.votes("p")
    expected = answer.comment.replace("\x00", "\ufffd").replace("\ud800", "\ufffd")
    assert row.answer == Answer(**{**_plain(answer), "comment": expected})
    assert row.seconds is None
    assert any_store.history("p", p.people[0].id)[0].answer == row.answer


def _plain(answer):
    return {name: getattr(answer, name) for name in ("choice", "strength", "ratings", "ranking", "text")}


def test_progress_counts_what_is_done_and_left(store, fill):
    p = fill(store, items=4, people=2, votes_per_item=2)
    one, other = p.people
    for step in range(3):
        item = store.next_item("p", one.id, NOW + 60 * step).item
        store.cast("p", one.id, item, Answer("a"), f"c{step}", 1.0, NOW + 60 * step)
    mine, theirs = (store.progress("p", person.id, NOW + 120) for person in (one, other))
    assert (mine.done, mine.left_for_me, mine.total, mine.wanted, mine.counted) == (3, 1, 4, 8, 3)
    assert (theirs.done, theirs.left_for_me, theirs.pace_per_hour) == (0, 4, 0)
    assert mine.pace_per_hour == pytest.approx(60)  # one a minute
    assert store.progress("p", one.id, NOW + 86400 * 2).today == 0


def test_history_is_a_persons_own_newest_first(store, fill):
    p = fill(store, items=3, people=2, votes_per_item=2)
    for step, person in enumerate([*p.people, p.people[0]]):
        item = store.next_item("p", person.id, NOW + step).item
        store.cast("p", person.id, item, Answer("a"), f"c{step}", 1.0, NOW + step)
    assert [past.at for past in store.history("p", p.people[0].id)] == [NOW + 2, NOW]
    assert len(store.history("p", p.people[0].id, 1)) == 1


def test_a_reviewers_word_stands_beside_the_votes(any_store, fill):
    p = fill(any_store, items=3, people=2, votes_per_item=2)
    admin = any_store.add_person("reviewer", "admin")
    choices = {p.people[0].id: ("a", "a", "a"), p.people[1].id: ("a", "b", "cannot_judge")}
    for person in p.people:
        for item, choice in zip((1, 2, 3), choices[person.id], strict=True):
            _vote_on(any_store, person, item, choice)
    flagged = any_store.next_item("p", admin.id, NOW)
    assert flagged is None  # all votes are in
    (dispute,) = any_store.disputed("p")
    assert (dispute.item, dispute.dispute, [row.answer.choice for row in dispute.votes]) == (
        2,
        1.0,
        ["a", "b"],
    )
    with pytest.raises(UsageError, match="person 0 is no admin"):
        any_store.adjudicate("p", p.people[0].id, 2, Answer("a"))
    before = any_store.revision("p")
    any_store.adjudicate("p", admin.id, 2, Answer("tie"), "both fine", NOW + 999)
    any_store.adjudicate("p", admin.id, 2, Answer("b"), "no", NOW + 1000)
    assert any_store.disputed("p") == []
    (word,) = any_store.adjudications("p")
    assert (word.answer.choice, word.note, word.person) == ("b", "no", "reviewer")
    assert len(any_store.adjudications("p", last_only=False)) == 2
    assert sorted(row.answer.choice for row in any_store.votes("p")) == [
        "a",
        "a",
        "a",
        "a",
        "b",
        "cannot_judge",
    ]
    assert any_store.revision("p") != before
    assert any_store.verify().broken is None


def _vote_on(store, person, item, choice):
    """This person's vote on this item, whatever the order; they skip what comes before."""
    while (got := store.next_item("p", person.id, NOW)).item != item:
        store.skip("p", person.id, got.item, NOW)
    store.cast("p", person.id, item, Answer(choice), f"{person.id} {item}", 1.0, NOW)


def test_a_flag_brings_an_item_before_the_reviewer(store, fill):
    p = fill(store, items=2, people=1)
    got = store.next_item("p", p.people[0].id, NOW)
    store.flag("p", p.people[0].id, got.item, "the prompt is cut off", NOW)
    (found,) = store.disputed("p")
    assert (found.item, found.flags[0].reason, found.votes) == (got.item, "the prompt is cut off", ())
    assert store.next_item("p", p.people[0].id, NOW).item == got.item  # it is still theirs


def test_votes_from_elsewhere_fill_slots_by_name(any_store, fill):
    fill(any_store, items=2, people=0, votes_per_item=2)
    judged = [
        PastJudgement("k0", name, Answer("a"), at=5.0 + i, seconds=3.0)
        for i, name in enumerate(["Ann", "Bob", "Cem"])
    ]
    judged.append(PastJudgement("k1", "gpt", Answer("b"), is_model=True))
    added = any_store.import_votes("p", judged, None)
    assert (added.added, added.known) == (4, 0)
    again = any_store.import_votes("p", judged, None)
    assert (again.added, again.known) == (0, 4)
    rows = list(any_store.votes("p"))
    assert [(row.person, row.counted, row.is_model) for row in rows] == [
        ("Ann", True, False), ("Bob", True, False), ("Cem", False, False), ("gpt", False, True),
    ]  # fmt: skip
    assert rows[0].at == 5.0
    new = [PastJudgement(key, "Dea", Answer("a")) for key in ("k1", "k9")]
    with pytest.raises(UsageError, match=r"vote 2 \(item 'k9'\): the project has no such item"):
        any_store.import_votes("p", new, None)
    assert [person.name for person in any_store.people()] == ["Ann", "Bob", "Cem", "gpt"]  # all or nothing
    assert any_store.verify().broken is None


def test_the_revision_changes_with_what_is_learned_and_with_nothing_else(store, fill):
    p = fill(store, items=2, people=1)
    person, seen = p.people[0], [store.revision("p")]
    got = store.next_item("p", person.id, NOW)
    store.progress("p", person.id, NOW)
    store.skip("p", person.id, got.item, NOW)
    store.change_project("p", None, title="another title")
    assert store.revision("p") == seen[0]
    item = store.next_item("p", person.id, NOW).item
    store.cast("p", person.id, item, Answer("a"), "c1", 1.0, NOW)
    seen.append(store.revision("p"))
    store.cast("p", person.id, item, Answer("a"), "c1", 1.0, NOW)
    assert store.revision("p") == seen[-1]
    store.cast("p", person.id, item, Answer("b"), "c2", 1.0, NOW)
    seen.append(store.revision("p"))
    store.undo("p", person.id, NOW)
    seen.append(store.revision("p"))
    assert len(set(seen)) == 4
