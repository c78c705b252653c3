"""Fifty people at once, a hundred thousand items, killed servers and a full disk. Run with `make test-load`.

The numbers are printed (`-s` shows them) and stand in docs/results.md.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress

import pytest

from keel.votes.database import StoreError
from keel.votes.kinds import Answer, NewItem, PastJudgement, Project, Reply
from keel.votes.store import Store

pytestmark = pytest.mark.load

PEOPLE, ITEMS, VOTES = 50, 200, 3
THINKING = 0.5  # seconds before a question and before an answer, on average; people need longer
PAIR = [Reply("one"), Reply("other")]


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path, start_postgres):
    """A database on a disk that is waited for: what is measured here is what people get."""
    if request.param == "sqlite":
        return str(tmp_path / "votes.db")
    return _server(start_postgres).new_url()


_servers: list = []


def _server(start_postgres):
    if not _servers:
        _servers.append(start_postgres(fsync=True))
    return _servers[0]


def _percentile(values, share):
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] * 1e3


def _say(name, url, **numbers):
    shown = {key: round(value, 1) if isinstance(value, float) else value for key, value in numbers.items()}
    load = os.getloadavg()[0]
    print(f"\n{name} {'sqlite' if '://' not in url else 'postgresql'} {json.dumps(shown)} (load {load:.1f})")


def _prepare(url, items=ITEMS, people=PEOPLE, **settings):
    store = Store.open(url)
    store.create_project(Project("p", **{"votes_per_item": VOTES, "lease_minutes": 0.1, **settings}), None)
    store.add_items("p", (NewItem(f"k{i}", f"prompt {i}", PAIR) for i in range(items)), None)
    ids = [store.add_person(f"n{i}").id for i in range(people)]
    return store, ids


def _check(store, acknowledged):
    """Every acknowledged vote is there once, with what was said; every item has what it was to have."""
    names = {person.id: person.name for person in store.people()}
    rows = {(row.person, row.item): row for row in store.votes("p")}
    assert len(rows) == sum(1 for _ in store.votes("p"))
    for person, item, choice in acknowledged:
        assert rows[names[person], item].answer.choice == choice
    counted = Counter(item for (_, item), row in rows.items() if row.counted)
    assert sum(counted.values()) == ITEMS * VOTES
    assert set(counted.values()) == {VOTES}
    assert store.counts("p") == {"items": ITEMS, "open": 0, "counted": 600, "wanted": 600}
    assert store.verify().broken is None


def _warm_up(store):
    """One vote in another project: what is measured is a server that runs, not one that starts."""
    store.create_project(Project("warm"), None)
    store.add_items("warm", [NewItem("k", "?", PAIR)], None)
    person = store.add_person("warm")
    store.cast("warm", person.id, store.next_item("warm", person.id).item, Answer("a"), "c", 1.0)


def test_fifty_people_at_once(url):
    store, people = _prepare(url)
    _warm_up(store)
    votes, nexts, errors, said = [], [], [], []

    def work(person):
        dice = random.Random(person)
        try:
            while True:
                time.sleep(dice.expovariate(1 / THINKING))
                start = time.perf_counter()
                got = store.next_item("p", person)
                nexts.append(time.perf_counter() - start)
                if got is None:
                    if store.counts("p")["open"] == 0:
                        return
                    continue
                time.sleep(dice.expovariate(1 / THINKING))
                choice, start = dice.choice("ab"), time.perf_counter()
                store.cast("p", person, got.item, Answer(choice), f"c{got.item}", 1.0)
                votes.append(time.perf_counter() - start)
                said.append((person, got.item, choice))
        except Exception as error:
            errors.append(error)

    threads, start = [threading.Thread(target=work, args=(person,)) for person in people], time.time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    _check(store, said)
    _say(
        "fifty people", url, seconds=time.time() - start, votes=len(votes),
        vote_p50_ms=_percentile(votes, 0.5), vote_p95_ms=_percentile(votes, 0.95),
        vote_max_ms=max(votes) * 1e3, next_p95_ms=_percentile(nexts, 0.95),
    )  # fmt: skip
    assert _percentile(votes, 0.95) < 100
    store.close()


@pytest.mark.parametrize("order", ["random", "uncertain"])
def test_the_next_of_a_hundred_thousand_items(url, order):
    store, people = _prepare(url, items=0, people=20, order=order, lease_minutes=30)
    start = time.perf_counter()
    store.add_items("p", (NewItem(f"k{i}", f"prompt {i}", PAIR) for i in range(100_000)), None)
    added = time.perf_counter() - start
    if order == "uncertain":
        store.set_priorities("p", {f"k{i}": random.Random(i).random() for i in range(0, 100_000, 2)})
    busy = store.add_person("busy")  # has judged 3,000 items that others have not
    judged = [PastJudgement(f"k{i}", "busy", Answer("a")) for i in range(3000)]
    store.import_votes("p", judged, None)
    times, progress = [], []
    for turn in range(15):
        for person in [*people, busy.id]:
            start = time.perf_counter()
            got = store.next_item("p", person)
            times.append(time.perf_counter() - start)
            store.cast("p", person, got.item, Answer("a"), f"{turn}", 1.0)
            start = time.perf_counter()
            store.progress("p", person)
            progress.append(time.perf_counter() - start)
    _say(
        f"100,000 items {order}", url, add_s=added, next_p50_ms=_percentile(times, 0.5),
        next_p95_ms=_percentile(times, 0.95), next_max_ms=max(times) * 1e3,
        progress_p95_ms=_percentile(progress, 0.95),
    )  # fmt: skip
    assert _percentile(times, 0.95) < 100
    store.close()


WORKERS = """
import os, random, sys, threading, time
from keel.votes.database import StoreError
from keel.votes.kinds import Answer
from keel.votes.store import Store

store, thinking = Store.open(sys.argv[1]), float(sys.argv[2])

def work(person):
    dice = random.Random(time.time_ns() + person)
    while True:
        time.sleep(dice.expovariate(1 / thinking))
        got = store.next_item("p", person)
        if got is None:
            if store.counts("p")["open"] == 0:
                return
            continue
        choice = dice.choice("ab")
        result = store.cast("p", person, got.item, Answer(choice), f"{time.time_ns()}", 1.0)
        os.write(1, f"{person} {got.item} {choice} {result.status}\\n".encode())  # the acknowledgement

os.write(1, b"ready\\n")
threads = [threading.Thread(target=work, args=(int(person),)) for person in sys.argv[3:]]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
os.write(1, b"finished\\n")
"""


def _start(url, people):
    command = [sys.executable, "-c", WORKERS, url, "0.4", *map(str, people)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_twenty_kills_lose_no_acknowledged_vote(url, tmp_path):
    """All fifty people work in one process, which is killed while they do. An answer whose acknowledgement
    did not come may be there or not; people go on with what they are given next."""
    store, people = _prepare(url)
    said, kills = [], 0
    while True:
        workers = _start(url, people)
        assert workers.stdout.readline() == "ready\n"
        if kills < 20:
            threading.Timer(random.uniform(0.2, 1.0), workers.send_signal, (signal.SIGKILL,)).start()
        output, errors = workers.communicate()
        lines = output.split("\n")
        said += [line.split() for line in lines[:-1] if line != "finished"]
        if workers.returncode == 0:
            break
        assert workers.returncode == -signal.SIGKILL, errors
        kills += 1
    assert kills == 20, "everything was done before the last kill: let people think longer"
    _check(store, [(int(person), int(item), choice) for person, item, choice, _ in said])
    backup = tmp_path / "backup.keel"
    store.backup(backup)
    Store.restore(backup, str(tmp_path / "restored.db"))
    with Store.open(str(tmp_path / "restored.db")) as restored:
        _check(restored, [])
        assert list(restored.votes("p")) == list(store.votes("p"))
    _say("twenty kills", url, acknowledged=len(said), in_database=len(list(store.votes("p"))))
    store.close()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of eight megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def _fill_up(path):
    """Write until there is no room."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


def test_a_full_disk_loses_no_acknowledged_vote(small_disk):
    """Somebody else fills the disk after 100 votes, and makes room after 200."""
    store, people = _prepare(str(small_disk / "votes.db"))
    filler, said, refused = small_disk / "filler", [], []
    for number in range(300):
        if number == 100:
            _fill_up(filler)
        if number == 200:
            filler.unlink()
        person = people[number % 10]
        try:
            got = store.next_item("p", person)
            store.cast("p", person, got.item, Answer("a", comment="x" * 2000), f"{number}", 1.0)
        except StoreError as error:
            refused.append((number, str(error)))
        else:
            said.append((person, got.item))
    names = {person.id: person.name for person in store.people()}
    rows = Counter((row.person, row.item) for row in store.votes("p"))
    assert refused
    assert all(100 <= number < 200 for number, _ in refused)
    assert all("nothing of this was recorded" in message for _, message in refused)
    assert rows == Counter((names[person], item) for person, item in said)
    assert store.verify().broken is None
    _say("full disk", "", acknowledged=len(said), refused=len(refused))
    store.close()
