"""Fifty people at once through the server itself, and the server killed while they work. `make test-load`.

A client sends an answer again, with the same id, until it is acknowledged: as the pages do. The numbers are
printed (`-s` shows them) and stand in docs/results.md.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest

from keel.votes.kinds import NewItem, Project, Reply
from keel.votes.store import Store

pytest.importorskip("fastapi", reason="needs FastAPI (pip install 'keel-rlhf[label]')")
pytestmark = pytest.mark.load

PEOPLE, ITEMS, VOTES = 50, 200, 3
THINKING = 0.5  # seconds before a question and before an answer, on average; people need longer
COMING = 3.0  # seconds in which all of them have sat down
KILLS = 20


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path, start_postgres):
    """A database on a disk that is waited for."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'votes.db'}"
    return start_postgres(fsync=True).new_url()


class Server:
    """`keel label serve` in a process of its own, always on the same port."""

    def __init__(self, url):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.command = [
            sys.executable, "-m", "keel", "label", "serve", "--db", url, "--port", str(self.port),
            "--rate", "1000",
        ]  # fmt: skip
        self.process = self.start()

    def start(self):
        process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        deadline = time.time() + 90
        while time.time() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return process
            except OSError:
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.05)
        raise AssertionError("the server did not start")

    def kill(self):
        """kill -9, and start again."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process = self.start()

    def stop(self):
        self.process.terminate()
        assert self.process.wait(30) == 0, self.process.stderr.read()


class Account:
    """What the clients saw: answers that were acknowledged, times, and answers that should never come."""

    def __init__(self):
        self.acknowledged = []  # (person, item, choice as shown)
        self.votes, self.nexts, self.wrong = [], [], []
        self.finished = threading.Event()


class Client:
    """One person's program."""

    def __init__(self, port, token, person, account, deadline):
        self.port, self.person, self.account, self.deadline = port, person, account, deadline
        self.headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self.connection = None

    def ask(self, times, method, path, body=None):
        """The server's answer, however often it takes. The time is that of the try that was answered."""
        while time.time() < self.deadline:
            try:
                if self.connection is None:
                    self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
                start = time.perf_counter()
                self.connection.request(method, path, body and json.dumps(body), self.headers)
                answer = self.connection.getresponse()
                content = answer.read()
                times.append(time.perf_counter() - start)
            except (OSError, http.client.HTTPException):
                self.connection = None
                time.sleep(random.uniform(0.05, 0.2))
                continue
            if answer.status >= 400:
                self.account.wrong.append((answer.status, content))
            return answer.status, json.loads(content) if content else None
        raise AssertionError("nobody answered any more")

    def work(self):
        dice = random.Random(self.person)
        time.sleep(dice.uniform(0, COMING))
        try:
            while not self.account.finished.is_set():
                time.sleep(dice.expovariate(1 / THINKING))
                status, item = self.ask(self.account.nexts, "GET", "/api/projects/p/next")
                if status != 200:
                    continue
                time.sleep(dice.expovariate(1 / THINKING))
                choice = dice.choice("ab")
                body = {"client_id": f"{self.person}-{item['item']}-{time.time_ns()}", "choice": choice}
                path = f"/api/projects/p/items/{item['item']}/vote"
                status, _ = self.ask(self.account.votes, "POST", path, body)
                if status == 200:
                    self.account.acknowledged.append((self.person, item["item"], choice))
        except Exception as error:
            self.account.wrong.append(("client", repr(error)))


def _run(url, meanwhile, **settings):
    """Fifty people through a server until every vote is in; `meanwhile(server, account)` goes on beside."""
    store = Store.open(url)
    store.create_project(Project("p", votes_per_item=VOTES, **settings), None)
    pair = [Reply("one"), Reply("other")]
    store.add_items("p", [NewItem(f"k{i}", f"prompt {i}", pair) for i in range(ITEMS)], None)
    people = [store.add_person(f"n{i}") for i in range(PEOPLE)]
    tokens = {person.id: store.api_token(person.id, None) for person in people}
    server, account, deadline = Server(url), Account(), time.time() + 600
    _warm_up(store, server, deadline)
    clients = [Client(server.port, tokens[person.id], person.id, account, deadline) for person in people]
    threads = [threading.Thread(target=client.work) for client in clients]
    start = time.time()
    for thread in threads:
        thread.start()
    meanwhile(server, account)
    while store.counts("p")["open"] and time.time() < deadline and not account.wrong:
        time.sleep(0.2)
    account.finished.set()
    for thread in threads:
        thread.join()
    server.stop()
    _check(store, account)
    return store, account, time.time() - start


def _warm_up(store, server, deadline):
    """A few votes in another project: what is measured is a server that runs, not one that starts."""
    store.create_project(Project("warm"), None)
    pair = [Reply("one"), Reply("other")]
    store.add_items("warm", [NewItem(f"k{i}", "?", pair) for i in range(8)], None)
    token = store.api_token(store.add_person("warm").id, None)
    client = Client(server.port, token, 0, Account(), deadline)
    for number in range(8):
        _, item = client.ask([], "GET", "/api/projects/warm/next")
        path = f"/api/projects/warm/items/{item['item']}/vote"
        client.ask([], "POST", path, {"client_id": f"{number}", "choice": "a"})


def _check(store, account):
    """No answer that should not come; every acknowledged vote once, and exactly as many as were wanted."""
    assert not account.wrong
    names = {person.id: person.name for person in store.people()}
    rows = {(row.person, row.item): row for row in store.votes("p")}
    assert len(rows) == sum(1 for _ in store.votes("p")), "somebody judged an item twice"
    for person, item, choice in account.acknowledged:
        row = rows[names[person], item]
        assert row.answer.choice == "ab"[row.shown["ab".index(choice)]]
    counted = Counter(row.item for row in rows.values() if row.counted)
    assert sum(counted.values()) == ITEMS * VOTES
    assert set(counted.values()) == {VOTES}
    assert store.verify().broken is None


def _children():
    """Seconds of the processor that finished child processes have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _percentile(values, share):
    return round(sorted(values)[min(len(values) - 1, int(share * len(values)))] * 1e3, 1)


def _say(name, url, **numbers):
    print(f"\n{name} {url.partition(':')[0]} {json.dumps(numbers)} (load {os.getloadavg()[0]:.1f})")


def test_fifty_people_at_once_through_the_server(url):
    before = _children()
    store, account, seconds = _run(url, lambda server, account: None)
    _say(
        "server, fifty people", url, seconds=round(seconds, 1), votes=len(account.votes),
        vote_p50_ms=_percentile(account.votes, 0.5), vote_p95_ms=_percentile(account.votes, 0.95),
        next_p50_ms=_percentile(account.nexts, 0.5), next_p95_ms=_percentile(account.nexts, 0.95),
        server_cpu_s=round(_children() - before, 1),
    )  # fmt: skip
    store.close()
    assert len(account.acknowledged) == len(account.votes)
    assert _percentile(account.votes, 0.95) < 100


def test_a_server_killed_twenty_times_loses_no_acknowledged_vote(url, tmp_path):
    def kill(server, account):
        dice, done = random.Random(0), 0
        for _ in range(KILLS):
            wanted = done + dice.randint(5, 45)
            while len(account.acknowledged) < wanted and not account.wrong:
                time.sleep(0.005)
            server.kill()
            done = len(account.acknowledged)

    store, account, seconds = _run(url, kill, lease_minutes=1)
    store.backup(tmp_path / "backup.keel")
    Store.restore(tmp_path / "backup.keel", str(tmp_path / "restored.db"))
    with Store.open(str(tmp_path / "restored.db")) as restored:
        assert list(restored.votes("p")) == list(store.votes("p"))
        _check(restored, account)
    votes = sum(1 for _ in store.votes("p"))
    _say(
        "server, twenty kills", url, seconds=round(seconds, 1), kills=KILLS,
        acknowledged=len(account.acknowledged), in_database=votes,
    )  # fmt: skip
    store.close()
