"""Who is given what: leases, order, sides, hidden gold, skips."""

from __future__ import annotations

from collections import Counter

import pytest

from keel.errors import UsageError
from keel.votes.kinds import Answer, NewItem, NotFoundError, PausedError, Reply
from keel.votes.order import rank

NOW = 1.0e9
MINUTE = 60.0


def _all(store, name, person, now=NOW, choice="a"):
    """Everything a person is given until nothing is left, each answered with the item's own `choice`."""
    given = []
    while (got := store.next_item(name, person.id, now)) is not None:
        given.append(got)
        store.cast(name, person.id, got.item, Answer(choice), f"{person.id} {got.item}", 1.0, now)
        now += 1
    return given


def test_every_item_gets_its_votes_and_nobody_is_asked_twice(any_store, fill):
    p = fill(any_store, items=5, people=4, votes_per_item=2)
    given = {person.id: [got.item for got in _all(any_store, "p", person)] for person in p.people}
    assert all(len(set(items)) == len(items) for items in given.values())
    assert Counter(item for items in given.values() for item in items) == dict.fromkeys(range(1, 6), 2)
    assert any_store.counts("p") == {"items": 5, "open": 0, "counted": 10, "wanted": 10}
    assert any_store.verify().broken is None


def test_a_running_lease_comes_again_and_its_time_is_renewed(any_store, fill):
    p = fill(any_store, lease_minutes=10)
    first = any_store.next_item("p", p.people[0].id, NOW)
    again = any_store.next_item("p", p.people[0].id, NOW + 5 * MINUTE)
    assert (again.item, again.slot, again.shown) == (first.item, first.slot, first.shown)
    assert again.leased_until == NOW + 15 * MINUTE > first.leased_until


def test_people_are_given_different_slots_while_leases_run(any_store, fill):
    p = fill(any_store, items=2, people=4, votes_per_item=2)
    got = [any_store.next_item("p", person.id, NOW) for person in p.people]
    assert len({(g.item, g.slot) for g in got}) == 4
    late = any_store.add_person("late")
    assert any_store.next_item("p", late.id, NOW) is None  # all four slots are somebody's


def test_an_item_whose_lease_ran_out_goes_to_the_next_person(any_store, fill):
    p = fill(any_store, items=1, people=2, lease_minutes=1)
    one, other = p.people
    first = any_store.next_item("p", one.id, NOW)
    assert any_store.next_item("p", other.id, NOW + 59) is None
    assert any_store.next_item("p", other.id, NOW + 61).item == first.item
    assert any_store.next_item("p", one.id, NOW + 62) is None


def test_a_skipped_item_comes_again_only_when_nothing_else_is_left(any_store, fill):
    p = fill(any_store, items=3, people=1)
    person = p.people[0]
    skipped = [any_store.next_item("p", person.id, NOW).item]
    any_store.skip("p", person.id, skipped[0], NOW)
    skipped.append(any_store.next_item("p", person.id, NOW + 1).item)
    any_store.skip("p", person.id, skipped[1], NOW + 1)
    assert len(set(skipped)) == 2
    rest = [got.item for got in _all(any_store, "p", person, NOW + 2)]
    assert rest == [({1, 2, 3} - set(skipped)).pop(), *skipped]  # the longest skipped first


def test_a_skipped_item_is_free_for_others_at_once(store, fill):
    p = fill(store, items=1, people=2)
    item = store.next_item("p", p.people[0].id, NOW).item
    store.skip("p", p.people[0].id, item, NOW)
    assert store.next_item("p", p.people[1].id, NOW).item == item


def test_two_replies_stand_on_each_side_for_one_of_two_people(store, fill):
    p = fill(store, items=40, people=2, votes_per_item=2)
    shown = [{got.item: got.shown for got in _all(store, "p", person)} for person in p.people]
    assert all(shown[0][item] == shown[1][item][::-1] for item in shown[0])
    first = sum(order == (0, 1) for order in shown[0].values())
    assert 10 <= first <= 30  # a fair coin's 40 tosses; outside with probability 0.001


def test_each_of_k_replies_stands_once_in_every_place_among_k_people(store, fill):
    fill(store, items=1, people=0, votes_per_item=3, task="ranking")
    people = [store.add_person(name) for name in "xyz"]
    orders = [store.next_item("p", person.id, NOW).shown for person in people]
    assert all(sorted(column) == [0, 1, 2] for column in zip(*orders, strict=True))


def test_replies_come_in_the_shown_order_and_without_their_sources(store, fill):
    p = fill(store, items=8, people=1)
    for got in _all(store, "p", p.people[0]):
        number = got.key.removeprefix("k")
        assert [reply.content for reply in got.replies] == [f"reply {number}.{index}" for index in got.shown]
        assert all(reply.source is None for reply in got.replies)
    assert all(reply.source for row in store.items("p") for reply in row.replies)


def test_how_an_item_is_shown_stays_when_it_is_leased_again_in_another_slot(store, fill):
    """An old page may still be open, and its sides are what the answer means."""
    p = fill(store, items=1, people=3, votes_per_item=2, lease_minutes=1)
    one, two, three = p.people
    first = store.next_item("p", one.id, NOW)
    assert store.next_item("p", two.id, NOW).slot == 1
    assert store.next_item("p", three.id, NOW + 61).slot == first.slot  # one's lease ran out
    again = store.next_item("p", one.id, NOW + 61)
    assert again.slot == 1
    assert again.shown == first.shown


def test_the_order_is_random_and_the_same_for_everybody(store, fill):
    p = fill(store, items=30, people=2, votes_per_item=2)
    orders = [[got.key for got in _all(store, "p", person)] for person in p.people]
    assert orders[0] == orders[1] == sorted(orders[0], key=lambda key: rank(0, key))
    assert orders[0] != [f"k{i}" for i in range(30)]


def test_uncertain_items_come_by_priority_and_the_random_share_beside_them(store, fill):
    p = fill(store, items=60, people=1, order="uncertain", random_share=0.3)
    known = store.set_priorities("p", {f"k{i}": float(i) for i in range(0, 60, 2)} | {"nobody": 1.0})
    assert known == 30
    given = _all(store, "p", p.people[0])
    uncertain = [got.key for got in given if got.how == "uncertain"]
    random = [got.key for got in given if got.how == "random"]
    priority = [int(key[1:]) if int(key[1:]) % 2 == 0 else -1 for key in uncertain]
    assert priority == sorted(priority, reverse=True)  # those without a priority come last
    assert random == sorted(random, key=lambda key: rank(0, key))
    assert 8 <= len(random) <= 28
    first = [got.how for got in given[:20]]
    assert 2 <= first.count("random") <= 12  # they are spread, not at the end
    assert {row.key: row.how for row in store.votes("p")} == {got.key: got.how for got in given}


def test_which_items_come_at_random_does_not_depend_on_their_priorities(new_store, fill):
    chosen = []
    for priorities in ({}, {f"k{i}": float(i) for i in range(40)}):
        store = new_store()
        p = fill(store, items=40, people=1, order="uncertain", random_share=0.5)
        store.set_priorities("p", priorities)
        chosen.append({got.key for got in _all(store, "p", p.people[0]) if got.how == "random"})
    assert chosen[0] == chosen[1] != set()


def test_a_change_of_priorities_is_seen_by_who_is_far_along(store, fill):
    p = fill(store, items=10, people=1, order="uncertain", random_share=0.0)
    person, now = p.people[0], NOW
    for _ in range(4):
        got = store.next_item("p", person.id, now)
        store.cast("p", person.id, got.item, Answer("a"), f"c{now}", 1.0, now)
        now += 1
    left = [row.key for row in store.items("p") if row.missing]
    store.set_priorities("p", {left[-1]: 5.0})
    assert store.next_item("p", person.id, now).key == left[-1]


def test_gold_is_spread_evenly_and_looks_like_any_other_item(store, fill):
    p = fill(store, items=36, people=2, gold=10, votes_per_item=2, gold_share=0.25)
    for person in p.people:
        given, left = [], []
        while (got := store.next_item("p", person.id, NOW)) is not None:
            left.append(store.progress("p", person.id, NOW).left_for_me)
            result = store.cast("p", person.id, got.item, Answer("a"), f"{person.id} {got.item}", 1.0, NOW)
            assert result.status == "counted"
            given.append(got.how)
        blocks = [given[i : i + 4].count("gold") for i in range(0, 44, 4)]
        assert set(blocks[:-2]) == {1}  # one in each block of four
        assert given.count("gold") == 10  # of which the first ten blocks have one each, and no more there are
        places = {given[i : i + 4].index("gold") for i in range(0, 40, 4)}
        assert len(places) > 1  # not always in the same place
        assert left == list(range(len(given), 0, -1))  # what is said to be left gives nothing away
    assert store.counts("p") == {"items": 36, "open": 0, "counted": 72, "wanted": 72}
    assert sum(row.gold is not None and not row.counted for row in store.votes("p")) == 20


def test_who_fails_gold_is_paused_and_may_go_on_when_let(any_store, fill):
    p = fill(any_store, items=30, people=1, gold=8, gold_share=0.5, gold_floor=0.7, gold_min=3)
    person, now, paused = p.people[0], NOW, False
    while not paused:
        got = any_store.next_item("p", person.id, now)
        paused = any_store.cast("p", person.id, got.item, Answer("b"), f"c{now}", 1.0, now).paused
        now += 1
    assert [row.gold is not None for row in any_store.votes("p")].count(True) == 3
    assert "known answer" in any_store.progress("p", person.id, now).paused
    assert any_store.next_item("p", person.id, now) is None
    assert any_store.people("p")[0].paused
    assert any_store.people()[0].paused is None  # paused here, not elsewhere
    with pytest.raises(PausedError, match="person 0 is paused in p"):
        any_store.cast("p", person.id, got.item, Answer("a"), "new", 1.0, now)
    any_store.set_paused(person.id, None, project="p", now=now)
    got = any_store.next_item("p", person.id, now + 1)
    assert not any_store.cast("p", person.id, got.item, Answer("b"), "x", 1.0, now + 1).paused  # forgiven
    assert any_store.verify().broken is None


def test_who_answers_gold_rightly_is_not_paused(store, fill):
    p = fill(store, items=20, people=1, gold=8, gold_share=0.5, gold_min=1)
    assert sum(got.how == "gold" for got in _all(store, "p", p.people[0], choice="a")) == 8
    assert store.progress("p", p.people[0].id, NOW).paused is None


def test_a_model_judges_every_item_beside_the_people(store, fill):
    p = fill(store, items=5, people=1)
    machine = store.add_person("judge", is_model=True)
    _all(store, "p", p.people[0])
    assert len(_all(store, "p", machine)) == 5  # though no vote is missing
    assert store.counts("p")["counted"] == 5
    assert {(row.is_model, row.counted) for row in store.votes("p")} == {(True, False), (False, True)}
    assert store.progress("p", machine.id, NOW).left_for_me == 0


def test_an_item_comes_to_nobody_who_may_not_have_it(store, fill):
    p = fill(store)
    fill(store, name="q", people=0)
    viewer = store.add_person("viewer", "viewer")
    guest = store.session(store.accept(store.invite("annotator", "q", None), "guest"))
    for person in (viewer, guest):
        with pytest.raises(NotFoundError, match="no project named 'p'"):
            store.next_item("p", person.id, NOW)
    assert store.next_item("q", guest.id, NOW) is not None
    assert [project.name for project in store.projects(guest.id)] == ["q"]
    assert store.project_for("q", guest.id).name == "q"
    for name in ("p", "r"):
        with pytest.raises(NotFoundError, match=f"no project named '{name}'"):
            store.project_for(name, guest.id)
    assert store.project_for("p", p.people[0].id).name == "p"
    with pytest.raises(NotFoundError, match="no project named 'r'"):
        store.next_item("r", p.people[0].id, NOW)
    with pytest.raises(NotFoundError, match="no person number 99"):
        store.next_item("p", 99, NOW)


def test_new_items_reach_who_had_finished(store, fill):
    p = fill(store, items=3, people=1)
    _all(store, "p", p.people[0])
    store.add_items("p", [NewItem(f"n{i}", "?", [Reply("x"), Reply("y")]) for i in range(5)], None)
    assert len(_all(store, "p", p.people[0], NOW + 10)) == 5


def test_another_number_of_votes_opens_and_closes_items(any_store, fill):
    p = fill(any_store, items=4, people=3)
    _all(any_store, "p", p.people[0])
    any_store.change_project("p", None, votes_per_item=2)
    assert any_store.counts("p") == {"items": 4, "open": 4, "counted": 4, "wanted": 8}
    assert _all(any_store, "p", p.people[0]) == []
    got = any_store.next_item("p", p.people[1].id, NOW)
    any_store.cast("p", p.people[1].id, got.item, Answer("a"), "c", 1.0, NOW)
    any_store.change_project("p", None, votes_per_item=1)
    assert any_store.counts("p") == {"items": 4, "open": 0, "counted": 5, "wanted": 4}
    assert any_store.next_item("p", p.people[2].id, NOW) is None
    with pytest.raises(UsageError, match="`task` cannot be changed"):
        any_store.change_project("p", None, task="rating")


def test_skipping_is_no_way_around_gold(any_store, fill):
    p = fill(any_store, items=4, people=1, gold=2, gold_share=0.5)
    person, answered = p.people[0].id, []
    for step in range(40):
        got = any_store.next_item("p", person, NOW + step)
        if got is None:
            break
        left = any_store.progress("p", person, NOW + step).left_for_me
        assert left == 6 - len(answered)  # so the count does not tell which it was
        if got.how == "gold" and step < 20:
            any_store.skip("p", person, got.item, NOW + step)
        else:
            any_store.cast("p", person, got.item, Answer("a"), f"{step}", now=NOW + step)
            answered.append(got.how)
    assert (answered.count("gold"), len(answered)) == (2, 6)
