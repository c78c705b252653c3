"""Many at once: threads of one process and processes of one database."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from keel.errors import UsageError
from keel.votes.kinds import Answer

NOW = 1.0e9


def _url(store):
    return store.database.url.render_as_string(hide_password=False)


def test_ten_people_at_once_give_exactly_the_votes_that_are_wanted(any_store, fill):
    p = fill(any_store, items=15, people=8, votes_per_item=3, gold=2, gold_share=0.2)

    def work(person):
        while (got := any_store.next_item("p", person.id)) is not None:
            any_store.cast("p", person.id, got.item, Answer("a"), str(got.item))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, p.people))
    rows = list(any_store.votes("p"))
    assert Counter(row.item for row in rows if row.counted) == dict.fromkeys(range(1, 16), 3)
    assert max(Counter((row.item, row.person) for row in rows).values()) == 1
    assert any_store.counts("p") == {"items": 15, "open": 0, "counted": 45, "wanted": 45}
    assert any_store.verify().broken is None


def test_one_person_in_two_windows_holds_one_item(any_store, fill):
    p = fill(any_store, items=8, people=1)
    person, start = p.people[0], threading.Barrier(6)

    def ask(_):
        start.wait()
        return any_store.next_item("p", person.id, NOW).item

    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(ask, range(6)))) == 1


def test_the_same_answer_sent_six_times_at_once_is_one_vote(any_store, fill):
    p = fill(any_store, items=2, people=1)
    person, start = p.people[0], threading.Barrier(6)
    item = any_store.next_item("p", person.id, NOW).item

    def send(_):
        start.wait()
        return any_store.cast("p", person.id, item, Answer("a"), "one", 1.0, NOW).status

    with ThreadPoolExecutor(6) as pool:
        statuses = Counter(pool.map(send, range(6)))
    assert statuses == {"counted": 1, "repeated": 5}
    (row,) = any_store.votes("p")
    assert row.version == 1


def test_two_invitations_taken_at_once_under_one_name_make_one_person(any_store):
    codes, start = [any_store.invite("annotator", None, None) for _ in range(4)], threading.Barrier(4)

    def take(code):
        start.wait()
        try:
            return any_store.accept(code, "Ann") and "in"
        except UsageError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        said = Counter(pool.map(take, codes))
    assert said == {"in": 1, "there is somebody named 'Ann' already: choose another name": 3}


def test_settings_items_and_votes_change_at_once(any_store, fill):
    """What locks many rows meets what locks few, in every order: nobody waits for ever, and all agrees."""
    p = fill(any_store, items=6, people=4, votes_per_item=2)

    def vote(person):
        for step in range(12):
            got = any_store.next_item("p", person.id)
            if got is not None:
                any_store.cast("p", person.id, got.item, Answer("a"), f"{step}")
                if step % 3 == 2:
                    any_store.undo("p", person.id)

    def settings(_):
        for number in (3, 1, 2, 3):
            any_store.change_project("p", None, votes_per_item=number)

    with ThreadPoolExecutor(5) as pool:
        jobs = [pool.submit(vote, person) for person in p.people] + [pool.submit(settings, None)]
        for job in jobs:
            job.result()
    counts = any_store.counts("p")
    rows = list(any_store.votes("p"))
    assert counts["counted"] == sum(row.counted for row in rows)
    assert counts["open"] == sum(row.missing > 0 for row in any_store.items("p"))
    assert any_store.verify().broken is None


PROGRAM = """
import sys
from keel.errors import UsageError
from keel.votes.kinds import Answer
from keel.votes.store import Store

with Store.open(sys.argv[1]) as store:
    person = int(sys.argv[2])
    while (got := store.next_item("p", person)) is not None:
        store.cast("p", person, got.item, Answer("a"), str(got.item))
"""


def test_processes_share_a_database(any_store, fill):
    p = fill(any_store, items=8, people=3, votes_per_item=2)
    workers = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, _url(any_store), str(person.id)])
        for person in p.people
    ]
    assert [worker.wait(120) for worker in workers] == [0, 0, 0]
    assert any_store.counts("p")["counted"] == 16
    assert any_store.verify().broken is None


def test_processes_make_a_database_at_once(tmp_path):
    program = "import sys; from keel.votes.store import Store; Store.open(sys.argv[1]).close()"
    path = str(tmp_path / "new.db")
    workers = [subprocess.Popen([sys.executable, "-c", program, path]) for _ in range(3)]
    assert [worker.wait(120) for worker in workers] == [0, 0, 0]
