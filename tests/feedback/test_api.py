"""`/api/`: the same work as JSON, and its description held to by random requests."""

from __future__ import annotations

import json
from typing import Any

import pytest

from keel.feedback.wire import Limit
from keel.votes.kinds import Answer, NewItem, Reply


@pytest.fixture
def program(enter, store) -> Any:
    """A client that bears Ada's token, and never a cookie."""
    store.add_person("Ada", "annotator")
    client = enter(None)
    client.headers["Authorization"] = f"Bearer {store.api_token(store.person_named('Ada').id, None)}"
    return client


def test_a_program_works_as_a_person_does(program, store):
    item = program.get("/api/projects/pairs/next").json()
    assert set(item) == {"item", "task", "prompt", "replies", "leased_until"}
    path = f"/api/projects/pairs/items/{item['item']}/vote"
    vote = {"client_id": "one", "choice": "b", "comment": "c", "seconds": 2.5}
    assert program.post(path, json=vote).json() == {"status": "counted", "paused": False}
    assert program.post(path, json=vote).json()["status"] == "repeated"
    (row,) = store.votes("pairs")
    assert row.replies["ab".index(row.answer.choice)].content == item["replies"][1]
    assert (row.seconds, row.answer.comment) == (2.5, "c")
    changed = program.post(path, json={**vote, "client_id": "two", "choice": "tie"})
    assert changed.json()["status"] == "counted"
    assert program.get("/api/projects/pairs/progress").json()["done"] == 1
    for client_id, undone in (("u", item["item"]), ("u", item["item"]), ("v", None)):
        undo = program.post("/api/projects/pairs/undo", json={"client_id": client_id})
        assert undo.json() == {"item": undone}
    own = f"/api/projects/pairs/items/{item['item']}"
    assert program.post(f"{own}/skip", json={"client_id": "s"}).status_code == 204
    for _ in range(2):
        flagged = program.post(f"{own}/flag", json={"client_id": "f", "reason": "odd"})
        assert flagged.status_code == 204
    assert [flag.reason for flag in store.flags("pairs")] == ["odd"]
    for deed in ("skip", "flag"):
        assert program.post(f"{own}/{deed}").status_code == 422
    assert program.post("/api/projects/pairs/undo", json={}).status_code == 422


def test_an_id_that_was_used_for_another_item_is_a_conflict(program, store):
    for deed, more in (("skip", {}), ("flag", {}), ("vote", {"choice": "a"})):
        answers = []
        for _ in range(2):
            item = program.get("/api/projects/pairs/next").json()["item"]
            path = f"/api/projects/pairs/items/{item}"
            answers.append(program.post(f"{path}/{deed}", json={"client_id": "x", **more}))
            if deed == "flag":
                program.post(f"{path}/skip", json={"client_id": f"next {item}"})
        assert [answer.status_code for answer in answers] in ([204, 409], [200, 409]), deed
        assert "another item" in answers[1].json()["problem"]


def test_an_annotator_is_told_nothing_that_gives_a_check_away(program, store):
    """The project's counts leave checks out: a vote after which they stand still was on one."""
    store.change_project("empty", None, gold_share=1.0)
    gold = NewItem("check", "1 + 1?", [Reply("2"), Reply("3")], gold=Answer("a"))
    usual = NewItem("usual", "?", [Reply("x"), Reply("y")])
    store.add_items("empty", [gold, usual], by=None)
    seen = []
    for number in range(2):
        item = program.get("/api/projects/empty/next").json()
        vote = {"client_id": f"{number}", "choice": "tie"}
        cast = program.post(f"/api/projects/empty/items/{item['item']}/vote", json=vote).json()
        progress = program.get("/api/projects/empty/progress").json()
        seen.append((set(item), cast, set(progress), progress["done"] + progress["left_for_me"]))
    assert seen[0] == seen[1]
    assert seen[0][2] == {"done", "left_for_me", "today", "pace_per_hour", "paused"}
    eve = store.add_person("Eve", "admin")
    headers = {"Authorization": f"Bearer {store.api_token(eve.id, None)}"}
    whole = program.get("/api/projects/empty/progress", headers=headers).json()
    assert (whole["total"], whole["wanted"], whole["counted"]) == (1, 1, 1)


@pytest.mark.parametrize(
    ("project", "answer", "check"),
    [
        ("odd", {"choice": "a", "strength": 2}, lambda a: a.strength == 2),
        ("ratings", {"ratings": {"helpful": 1, "polite": 6}}, lambda a: a.ratings["polite"] == 6),
        ("ranks", {"ranking": [[2], [0, 1]]}, lambda a: [len(g) for g in a.ranking] == [1, 2]),
        ("edits", {"text": "new"}, lambda a: a.text == "new"),
        ("thumbs", {"choice": "down"}, lambda a: a.choice == "down"),
    ],
)
def test_every_task_takes_its_answer(program, store, project, answer, check):
    item = program.get(f"/api/projects/{project}/next").json()
    answered = program.post(
        f"/api/projects/{project}/items/{item['item']}/vote", json={"client_id": "x", **answer}
    )
    assert answered.status_code == 200, answered.text
    (row,) = store.votes(project)
    assert check(row.answer)


@pytest.mark.parametrize(
    ("project", "answer", "word"),
    [
        ("pairs", {}, "choice is None; it is one of a, b, tie, both_bad, cannot_judge"),
        ("pairs", {"choice": "c"}, "choice is 'c'; it is one of a, b, tie"),
        ("pairs", {"choice": "a", "odd": 1}, "odd"),
        ("ratings", {"ratings": {"helpful": 3}}, "every scale"),
        ("ratings", {"ratings": {"kind": 3}}, "no scale 'kind'"),
        ("ranks", {"ranking": [[0], [1]]}, "from 0 to 2 once"),
        ("ranks", {"ranking": [[0], [1], [2, 7]]}, "from 0 to 2 once"),
        ("ranks", {"ranking": [[0, 2], [1], [2]]}, "from 0 to 2 once"),
        ("ranks", {}, "every reply"),
        ("edits", {"text": " "}, "improved reply"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused_in_words(program, store, project, answer, word):
    item = program.get(f"/api/projects/{project}/next").json()
    refused = program.post(
        f"/api/projects/{project}/items/{item['item']}/vote", json={"client_id": "x", **answer}
    )
    assert refused.status_code == 422
    assert word in refused.json()["problem"]
    assert not list(store.votes(project))


def test_an_admins_program_adds_items_and_reads_votes(program, store):
    boss = store.add_person("Eve", "admin")
    headers = {"Authorization": f"Bearer {store.api_token(boss.id, None)}"}
    item = {"key": "new", "prompt": "p", "replies": [{"content": "a", "source": "m"}, {"content": "b"}]}
    for added in (1, 0):
        answered = program.post("/api/projects/empty/items", json=[item], headers=headers)
        assert answered.json() == {"added": added, "known": 1 - added}
    given = program.get("/api/projects/empty/next").json()
    program.post(f"/api/projects/empty/items/{given['item']}/vote", json={"client_id": "x", "choice": "a"})
    lines = program.get("/api/projects/empty/votes", headers=headers).text.splitlines()
    (row,) = map(json.loads, lines)
    assert (row["person"], row["key"], row["replies"][0]["source"]) == ("Ada", "new", "m")
    assert program.get("/api/projects/empty/statistics", headers=headers).json()["counts"]["votes"] == 1


def test_a_cookie_opens_no_api_and_a_token_no_page(enter, store):
    ada = enter()
    assert ada.get("/api/projects").status_code == 401
    token = store.api_token(store.person_named("Ada").id, None)
    outside = enter(None)
    answer = outside.get("/account", headers={"Authorization": f"Bearer {token}"}, follow_redirects=False)
    assert answer.headers["location"] == "/sign-in"
    store.sign_out(token)
    assert outside.get("/api/projects", headers={"Authorization": f"Bearer {token}"}).status_code == 401


@pytest.mark.browser
def test_random_requests_are_answered_as_the_description_says(app, store):
    """Schemathesis: no 5xx, no status, header or body that `/api/openapi.json` does not tell of."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings
    from schemathesis.specs.openapi import checks

    boss = store.add_person("Eve", "admin")
    headers = {"Authorization": f"Bearer {store.api_token(boss.id, None)}"}
    app.state.web.wrong = Limit(1e6, 1e6)  # it tries wrong tokens too
    schema = schemathesis.openapi.from_asgi("/api/openapi.json", app)
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) == 10
    for operation in operations:

        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=operation.as_strategy())
        def holds(case: Any) -> None:
            if case.path_parameters and "project" in case.path_parameters:
                case.path_parameters["project"] = "pairs"  # else hardly a request gets past the door
            # what fits a project's task, no schema can say
            case.call_and_validate(headers=headers, excluded_checks=[checks.positive_data_acceptance])

        holds()
