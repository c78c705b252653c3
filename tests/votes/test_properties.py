"""Whatever people do, in whatever order: nobody judges an item twice, and the counts are right."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sqlalchemy import select

from keel.votes import schema
from keel.votes.kinds import Answer, NewItem, Project, Reply
from keel.votes.store import Store

ITEMS, PEOPLE, LEASE = 4, 4, 60.0
MEMORY = Path("/dev/shm")  # a disk that need not be waited for, where there is one


class People(RuleBasedStateMachine):
    """People who ask, answer, skip, undo and let leases run out, against a simple account of it all."""

    def __init__(self, empty: Path) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
        shutil.copy(empty, self.folder / "votes.db")
        self.store = Store.open(str(self.folder / "votes.db"))
        self.now, self.casts = 1e9, 0
        self.said: dict[tuple[int, int], str] = {}  # (person, item) → the choice that stands
        self.order: dict[int, list[int]] = {}  # person → items in the order of their votes
        self.given: dict[int, set[int]] = {}  # person → items they were ever given
        self.skipped: dict[int, set[int]] = {}

    @initialize(votes=st.integers(1, 3), order=st.sampled_from(["random", "uncertain"]), gold=st.booleans())
    def start(self, votes: int, order: str, gold: bool) -> None:
        project = Project(
            "p", votes_per_item=votes, lease_minutes=LEASE / 60, order=order, random_share=0.5,
            gold_share=0.4, gold_min=10**6,
        )  # fmt: skip
        self.store.create_project(project, None)
        pair = [Reply("x"), Reply("y")]
        items = [NewItem(f"k{i}", "?", pair, priority=float(i) if i % 2 else None) for i in range(ITEMS)]
        items += [NewItem("g", "?", pair, gold=Answer("a"))] if gold else []
        self.store.add_items("p", items, None)
        self.votes, self.gold = votes, {row.item for row in self.store.items("p") if row.gold is not None}
        self.people = [self.store.add_person(f"n{i}").id for i in range(PEOPLE)]
        for person in self.people:
            self.order[person], self.given[person], self.skipped[person] = [], set(), set()

    @rule(who=st.integers(0, PEOPLE - 1))
    def asks(self, who: int) -> None:
        person = self.people[who]
        got = self.store.next_item("p", person, self.now)
        if got is None:
            return
        assert (person, got.item) not in self.said, "an item came twice"
        if got.item in self.skipped[person]:
            left = {item for item in self._open() if (person, item) not in self.said}
            others = left - self.skipped[person] - self._held_by_others(person)
            assert not others, "a skipped item came before another one"
        self.given[person].add(got.item)
        self.skipped[person].discard(got.item)

    @rule(who=st.integers(0, PEOPLE - 1), which=st.integers(0, 9), choice=st.sampled_from("ab"))
    def answers(self, who: int, which: int, choice: str) -> None:
        person = self.people[who]
        if not self.given[person]:
            return
        item = sorted(self.given[person])[which % len(self.given[person])]
        self.casts += 1
        self.now += 1
        args = ("p", person, item, Answer(choice), f"c{self.casts}", 1.0, self.now)
        first, again = self.store.cast(*args), self.store.cast(*args)
        assert (again.status, again.vote) == ("repeated", first.vote)
        self.said[person, item] = choice
        if item in self.order[person]:
            self.order[person].remove(item)
        self.order[person].append(item)
        self.skipped[person].discard(item)

    @rule(who=st.integers(0, PEOPLE - 1), which=st.integers(0, 9))
    def skips(self, who: int, which: int) -> None:
        person = self.people[who]
        if self.given[person]:
            item = sorted(self.given[person])[which % len(self.given[person])]
            self.now += 1
            self.store.skip("p", person, item, self.now)
            if (person, item) not in self.said:
                self.skipped[person].add(item)

    @rule(who=st.integers(0, PEOPLE - 1))
    def takes_back(self, who: int) -> None:
        person = self.people[who]
        self.now += 1
        item = self.store.undo("p", person, self.now)
        expected = self.order[person].pop() if self.order[person] else None
        assert item == expected
        if item is not None:
            del self.said[person, item]

    @rule(seconds=st.sampled_from([LEASE / 2, LEASE + 1]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(votes=st.integers(1, 3))
    def other_number_of_votes(self, votes: int) -> None:
        self.store.change_project("p", None, votes_per_item=votes)
        self.votes = votes

    def _rows(self, table):
        return self.store.database.read(lambda c: c.execute(select(table)).all())

    def _open(self) -> set[int]:
        return {row.item_id for row in self._rows(schema.slots) if row.vote_id is None}

    def _held_by_others(self, person: int) -> set[int]:
        """Items of which every free slot is leased to somebody else."""
        free = {
            row.item_id
            for row in self._rows(schema.slots)
            if row.vote_id is None and (row.leased_until <= self.now or row.person_id == person)
        }
        return self._open() - free

    @invariant()
    def the_account_agrees(self) -> None:
        if not self.given:
            return
        rows = list(self.store.votes("p"))
        names = {f"n{i}": person for i, person in enumerate(self.people)}
        assert {(names[row.person], row.item): row.answer.choice for row in rows} == self.said
        assert len(rows) == len(self.said), "somebody judged an item twice"
        counted = Counter(row.item for row in rows if row.counted)
        slots = Counter(row.item_id for row in self._rows(schema.slots))
        filled = Counter(row.item_id for row in self._rows(schema.slots) if row.vote_id is not None)
        surplus = Counter(row.item for row in rows if not row.counted and row.gold is None)
        for row in self.store.items("p"):
            assert counted[row.item] == filled[row.item] <= slots[row.item]
            assert row.missing == slots[row.item] - filled[row.item]
            if row.item in self.gold:
                assert slots[row.item] == 0
            else:
                assert slots[row.item] >= self.votes
        stored = {row.id: row.surplus for row in self._rows(schema.items)}
        assert all(stored[item] == surplus[item] for item in stored)
        assert self.store.counts("p") == {
            "items": ITEMS, "open": len(self._open()), "counted": sum(counted.values()),
            "wanted": ITEMS * self.votes,
        }  # fmt: skip
        for person in self.people:
            assert self.store.progress("p", person, self.now).done == len(self.order[person])

    def teardown(self) -> None:
        report = self.store.verify()
        self.store.close()
        shutil.rmtree(self.folder)
        assert report.broken is None, report


def test_any_interleaving_of_what_people_do_keeps_the_counts_right(empty_file):
    run_state_machine_as_test(
        lambda: People(empty_file),
        settings=settings(
            max_examples=8, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


@pytest.mark.slow
def test_many_interleavings(empty_file):
    run_state_machine_as_test(
        lambda: People(empty_file),
        settings=settings(
            max_examples=400, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
