"""`keel label` on the command line, and the server it starts."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import subprocess
import sys
import urllib.request

import pytest
from typer.testing import CliRunner

from keel.cli.main import app
from keel.errors import UsageError
from keel.feedback import serving
from keel.feedback.scales import line_of, scales_of_text
from keel.votes import open_store

RUNNER = CliRunner()


def keel(*arguments: str, code: int = 0) -> str:
    result = RUNNER.invoke(app, ["label", *arguments])
    assert result.exit_code == code, (arguments, result.output, result.exception)
    return result.stdout


def test_a_project_from_its_making_to_its_backup(place):
    made = keel("create", "help", "--votes", "2", "--instructions", "rules.md", "--strength")
    link = re.findall(r"http://127.0.0.1:8011/join/(\S+)", made)[0]
    assert keel("add", "help", "My Pairs.jsonl") == "4 items added, 0 were there\n"
    assert json.loads(keel("add", "help", "My Pairs.jsonl", "--json")) == {"added": 0, "known": 4}
    invited = keel("invite", "--project", "help", "--name", "Ada", "--url", "https://label.example.org/")
    assert re.fullmatch(r"https://label\.example\.org/join/\S+\n", invited)
    with open_store("sqlite:///keel-label.db") as store:
        assert store.project("help").instructions == "Be *fair*."
        store.accept(link, "Eve")
        store.accept(invited.strip().rsplit("/", 1)[1])
        ada = store.person_named("Ada").id
        item = store.next_item("help", ada)
        assert item is not None
        from keel.votes.kinds import Answer

        store.cast("help", ada, item.item, Answer("a", strength=2, comment="mine"), "c", 2.0)
    assert re.search(r"Ada +annotator +1", keel("people", "help"))
    assert json.loads(keel("projects", "--json"))[0]["counted"] == 1
    assert "1 votes of 1 people on 1 items" in keel("stats", "help")
    assert json.loads(keel("stats", "help", "--json"))["counts"]["votes"] == 1
    assert keel("export", "help", "--to", "preference") == "help-preference.jsonl: 1 rows\n"
    assert json.loads((place / "help-preference.jsonl").read_text())["votes"][0]["annotator"] == "Ada"
    head = json.loads(keel("verify", "--json"))["head"]
    assert "hold" in keel("verify", "--head", head)
    keel("backup", "safe.db")
    assert "restored" in keel("restore", "safe.db", "--db", "sqlite:///again.db")
    assert "Ada" in keel("people", "--db", "sqlite:///again.db")
    assert "comments are gone" in keel("forget", "Ada", "--yes")
    assert "Ada" not in keel("people")
    keel("verify")
    keel("invite", "--again", "--name", "Eve")


def test_a_link_that_another_one_replaces_is_said(place):
    first = RUNNER.invoke(app, ["label", "create", "one"])
    again = RUNNER.invoke(app, ["label", "create", "two"])
    links = [re.findall(r"/join/(\S+)", result.stdout)[0] for result in (first, again)]
    assert "works no longer" not in first.stderr
    assert "the admin's link that was printed before works no longer" in again.stderr
    with open_store("sqlite:///keel-label.db") as store:
        assert [store.invitation_state(link) for link in links] == ["withdrawn", "open"]


def test_a_changed_row_is_named_with_exit_code_3(place):
    keel("create", "help")
    keel("add", "help", "My Pairs.jsonl")
    keel("verify")
    with sqlite3.connect("keel-label.db") as database:
        database.execute("UPDATE items SET prompt = '\"other\"' WHERE id = 2")
    said = keel("verify", code=3)
    assert re.search(r"row \d+ of the log does not hold", said)
    assert json.loads(keel("verify", "--json", code=3))["broken"] is not None


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["add", "nope", "My Pairs.jsonl"], "keel-label.db is not there"),
        (["create", "Not Good"], "small letters"),
        (["create", "x", "--task", "guess"], "--task is 'guess'"),
        (["create", "x", "--instructions", "none.md"], "none.md cannot be read"),
        (["create", "x", "--scale", "a b c", "--task", "rating"], "is not written as"),
        (["serve", "none.jsonl", "--port", "0"], "none.jsonl"),
        (["restore", "none.db"], "none.db is not there"),
        (["ask", "x", "--url", "http://127.0.0.1:9", "--model", "m", "--key-env", "NOT_SET"], "no NOT_SET"),
        (["projects", "--db", "mysql://x/y"], "mysql is not supported"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(place, arguments, word):
    result = RUNNER.invoke(app, ["label", *arguments])
    assert isinstance(result.exception, UsageError), (result.output, result.exception)
    assert word in str(result.exception)
    assert "\n" not in str(result.exception)


def test_a_port_that_is_taken_is_named():
    with serving.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"127.0.0.1:{port} cannot be listened on"):
            serving.listen("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "address"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "localhost"), ("localhost", "localhost")]
)
def test_the_address_is_one_that_a_browser_here_finds(host, address):
    with serving.listen(host, 0) as listener:
        assert serving.address_of(listener, host) == f"http://{address}:{listener.getsockname()[1]}"


def test_a_scale_is_written_in_a_line():
    text = "polite 1 7 rude | courteous\nclear 1 5\nwarm 0 10 | hot"
    assert "\n".join(map(line_of, scales_of_text(text))) == text
    assert [(s.low, s.high) for s in scales_of_text("clear")] == [(1, 5)]


def test_one_command_serves_a_file_and_ends_when_it_is_told(place):
    """Quick start: project, items and link in one; the second start keeps the project; no code in the log."""
    command = [sys.executable, "-m", "keel", "label", "serve", "My Pairs.jsonl", "--port", "0", "--log"]
    server = subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert server.stdout is not None
    try:
        link = re.findall(r"http://127\.0\.0\.1:\d+/join/\S+", server.stdout.readline())[0]
        with urllib.request.urlopen(link, timeout=10) as answer:
            assert answer.status == 200
            assert b'id="name"' in answer.read()
    finally:
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=20)
    assert server.returncode == 0, errors
    assert "project my-pairs: 4 items added" in errors
    assert "every vote is kept" in errors
    assert "GET /join/… 200" in errors
    assert link.rsplit("/", 1)[1] not in errors
    assert "Traceback" not in errors
    with open_store("sqlite:///keel-label.db") as store:
        assert serving.quick_project(store, place / "My Pairs.jsonl", None, 3) == ("my-pairs", 0, 4)
        assert store.project("my-pairs").votes_per_item == 1
        code = serving.first_link(store, "http://x")
        assert code is not None
        store.accept(code.rsplit("/", 1)[1], "Eve")
        assert serving.first_link(store, "http://x") is None
