"""What an admin does with people, invitations and the project: by the pages, and by the command line."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from typer.testing import CliRunner

from keel.cli.main import app as program
from keel.errors import UsageError
from keel.feedback import formats, serving
from keel.votes import open_store

PEOPLE = "/projects/pairs/people"
RUNNER = CliRunner()


def keel(*arguments: str, code: int = 0) -> str:
    """What `keel label` prints."""
    result = RUNNER.invoke(program, ["label", *arguments])
    assert result.exit_code == code, (arguments, result.output, result.exception)
    return result.stdout


def _actions(store: Any) -> list[str]:
    from sqlalchemy import select

    from keel.votes import schema

    return store.database.read(
        lambda c: c.execute(select(schema.audit.c.action).order_by(schema.audit.c.n)).scalars().all()
    )


def test_an_invitation_is_withdrawn_on_the_page(enter, store):
    eve = enter("admin", name="Eve")
    eve.see(PEOPLE)
    page = eve.submit(f"{PEOPLE}/invite", {"role": "annotator", "name": "Grace"}).text
    link = re.findall(r'id="link">http://testserver(/join/[^<]+)<', page)[0]
    assert "Open invitations" in page
    path = re.findall(r'action="(/projects/pairs/people/invitations/\d+/withdraw)"', page)[0]
    assert "works no longer" in eve.submit(path).text
    assert "Open invitations" not in eve.text
    stranger = enter(None)
    assert "withdrawn" in stranger.see(link, 410)
    assert "nothing to withdraw" in eve.submit(path, status=422).text
    code = store.invite("annotator", "thumbs", by=None)  # another project's is none of this page's
    number = next(one.id for one in store.invitations() if one.project == "thumbs")
    eve.submit(f"{PEOPLE}/invitations/{number}/withdraw", status=404)
    assert store.invitation_state(code) == "open"
    assert "withdraw" in _actions(store)


def test_a_role_changes_and_a_person_is_removed_on_the_page(enter, store):
    eve, ada = enter("admin", name="Eve"), enter()
    ada.vote("pairs", {"choice": "a", "comment": "mine"})
    number = store.person_named("Ada").id
    eve.see(PEOPLE)
    assert "role was changed" in eve.submit(f"{PEOPLE}/{number}/role", {"role": "viewer"}).text
    ada.see("/projects/pairs/work", 403)
    ada.see("/projects/pairs/statistics")
    eve.submit(f"{PEOPLE}/{number}/role", {"role": "king"}, 422)
    assert "Nothing was removed" in eve.submit(f"{PEOPLE}/{number}/remove", status=422).text
    assert "under a number" in eve.submit(f"{PEOPLE}/{number}/remove", {"sure": "1"}).text
    (row,) = store.votes("pairs")
    assert (row.person, row.answer.comment) == (f"removed-{number}", "")
    assert ada.get("/account", follow_redirects=False).headers["location"] == "/sign-in"
    own = store.person_named("Eve").id
    for deed, fields in (("remove", {"sure": "1"}), ("role", {"role": "viewer"})):
        assert "only admin" in eve.submit(f"{PEOPLE}/{own}/{deed}", fields, 422).text
    for deed in ("role", "remove"):
        eve.submit(f"{PEOPLE}/9999/{deed}", {"role": "viewer", "sure": "1"}, 404)
    assert {"role:viewer", "forget"} <= set(_actions(store))
    assert store.verify().broken is None


def test_a_project_is_paused_and_goes_on_by_the_page(enter, store):
    eve, ada = enter("admin", name="Eve"), enter()
    ada.see("/projects/pairs/work")
    path, fields = ada.action(), {"client_id": ada.field("client_id"), "choice": "a"}
    eve.see("/projects/pairs/settings")
    eve.submit("/projects/pairs/pause", {"paused": "1", "reason": "New <b>rules</b>"})
    for see in (ada.see("/projects/pairs/work"), eve.see("/projects/pairs/overview")):
        assert "The project is paused" in see
        assert "New &lt;b&gt;rules" in see
    assert "paused" in ada.see("/")
    kept = ada.submit(path, fields)
    assert "Saved." in kept.text
    assert "The project is paused" in kept.text
    undone = ada.submit("/projects/pairs/undo")
    assert "The project is paused" in undone.text
    assert len(list(store.votes("pairs"))) == 1
    eve.see("/projects/pairs/settings")
    eve.submit("/projects/pairs/pause")
    assert "The project is paused" not in ada.see("/projects/pairs/work")
    eve.submit("/projects/pairs/pause", {"paused": "1"})
    assert "Paused by an admin." in ada.see("/projects/pairs/work")


def test_a_form_that_is_sent_twice_skips_flags_and_undoes_once(enter, store):
    ada = enter(project="pairs")
    for _ in range(3):
        ada.vote("pairs", {"choice": "a"})
    ada.see("/projects/pairs/work")
    assert len(set(re.findall(r'name="client_id" value="([^"]+)"', ada.text))) == 1
    own = ada.action().replace("/vote", "")
    fields = {"client_id": ada.field("client_id")}
    for _ in range(2):
        ada.submit(f"{own}/flag", {**fields, "reason": "cut off"})
    assert len(store.flags("pairs")) == 1
    for _ in range(2):
        assert "taken back" in ada.submit("/projects/pairs/undo", fields).text
    assert len(list(store.votes("pairs"))) == 2
    own = ada.action().replace("/vote", "")
    fields = {"client_id": ada.field("client_id")}
    for _ in range(2):
        ada.submit(f"{own}/skip", fields)
    assert len(list(store.votes("pairs"))) == 2


def test_an_annotator_of_several_projects_is_not_told_the_votes_of_all(enter, store):
    ada, eve = enter(), enter("admin", name="Eve")
    ada.vote("pairs", {"choice": "a"})
    assert "of 60 votes" not in ada.see("/")
    assert "1 of 30 done" in ada.text
    assert "1 of 60 votes" in eve.see("/")


# ---------------------------------------------------------------- the command line


def test_management_by_command(place, tmp_path):
    keel("create", "help")
    keel("add", "help", "My Pairs.jsonl")
    keel("invite", "--project", "help", "--name", "Ada")
    keel("invite", "--role", "viewer")
    listed = keel("invitations")
    assert re.search(r"3 +viewer +every project +the server", listed)
    assert re.search(r"2 +annotator +Ada +help", listed)
    assert "withdrawn" in keel("withdraw", "3")
    assert [one["id"] for one in json.loads(keel("invitations", "--json"))] == [2, 1]
    assert re.search(r"3 .* withdrawn", keel("invitations", "--all"))
    with open_store("sqlite:///keel-label.db") as store:
        ada = store.add_person("Grace", project="help")
        assert "viewer now" in keel("role", "Grace", "viewer")
        assert store.person(ada.id).role == "viewer"
        keel("role", "Grace", "annotator")
        assert "help is paused: lunch" in keel("pause", "help", "--reason", "lunch")
        assert store.next_item("help", ada.id) is None
        assert "lunch" in keel("projects")
        assert "goes on" in keel("resume", "help")
        assert "Grace in help is paused" in keel("pause", "help", "--person", "Grace")
        assert store.progress("help", ada.id).paused == "by an admin"
        keel("resume", "help", "--person", "Grace")
        keel("pause", "--person", "Grace", "--reason", "holiday")
        assert store.person(ada.id).paused == "holiday"
        assert json.loads(keel("resume", "--person", "Grace", "--json"))["paused"] is None
        assert store.next_item("help", ada.id) is not None
        assert store.verify().broken is None


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["withdraw", "7"], "no invitation number 7"),
        (["role", "Nobody", "viewer"], "nobody named 'Nobody'"),
        (["pause"], "name a project, or a person"),
        (["pause", "help", "--reason", " "], "--reason is empty"),
        (["pause", "nope"], "no project named 'nope'"),
        (["resume", "--person", "Nobody"], "nobody named"),
    ],
)
def test_management_that_cannot_be_is_said_in_one_line(place, arguments, word):
    keel("create", "help")
    result = RUNNER.invoke(program, ["label", *arguments])
    assert isinstance(result.exception, UsageError), (result.output, result.exception)
    assert word in str(result.exception)


def test_the_help_shows_every_command_of_management():
    shown = RUNNER.invoke(program, ["label", "--help"]).output
    for command in ("invite", "invitations", "withdraw", "role", "pause", "resume", "sign-out", "forget"):
        assert re.search(rf"\b{command} ", shown), command


def test_a_link_for_the_first_admin_is_made_anew_and_the_old_one_is_withdrawn(place):
    said: list[str] = []
    with open_store("sqlite:///keel-label.db") as store:
        links = [serving.first_link(store, "http://x", said.append) for _ in range(3)]
        assert said == ["the admin's link that was printed before works no longer"] * 2
        states = [store.invitation_state(str(link).rsplit("/", 1)[1]) for link in links]
        assert states == ["withdrawn", "withdrawn", "open"]


def test_a_file_whose_votes_do_not_fit_leaves_nothing(place):
    row = {"key": "k", "prompt": "p", "replies": [{"content": "x"}, {"content": "y"}]}
    (place / "votes.jsonl").write_text(json.dumps({**row, "votes": [{"person": "Ann", "choice": "up"}]}))
    with open_store("sqlite:///keel-label.db") as store:
        with pytest.raises(UsageError, match="vote 1"):
            serving.quick_project(store, place / "votes.jsonl", None, 1)
        assert store.projects() == []
        keel("create", "help")
        with pytest.raises(UsageError, match="vote 1"):
            formats.into_project(store, "help", formats.read(place / "votes.jsonl"))
        assert list(store.items("help")) == []
        assert "Ann" not in [person.name for person in store.people()]
