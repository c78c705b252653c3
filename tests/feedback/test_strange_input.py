"""What strangers, odd models and odd files send: nobody is kept from work by it, and nothing answers 5xx."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

import pytest
from starlette.testclient import TestClient

from keel.config.collect import LabelConfig
from keel.errors import UsageError
from keel.feedback import formats, render, wire
from keel.feedback.app import create_app
from keel.feedback.model_annotator import Endpoint
from keel.stages import people as stage_people
from keel.votes import commands
from keel.votes.kinds import Answer, NewItem, Reply

HALF = "half of a character: \ud83d"
HUGE = "9" * 25


@pytest.fixture
def bearer(store) -> dict[str, str]:
    """The header of Ada's program."""
    ada = store.add_person("Ada of programs", "annotator")
    return {"Authorization": f"Bearer {store.api_token(ada.id, None)}"}


def test_a_turn_brings_no_key_that_names_its_model(enter, store, bearer):
    def reply(model: str) -> Reply:
        call = {"id": f"{model}-call", "type": "function", "function": {"name": "find", "arguments": "{}"}}
        return Reply(
            [
                {"role": "assistant", "content": "I look.", "name": model, "tool_calls": [call]},
                {"role": "tool", "name": "find", "tool_call_id": f"{model}-call", "content": "3"},
                {
                    "role": "assistant",
                    "content": [{"type": "text", "text": "It is 3.", "by": model}],
                    "model": model,
                },
            ]
        )

    prompt = [{"role": "user", "content": "How many?", "name": "zebra-user", "dataset": "zebra-set"}]
    store.change_project("empty", None, votes_per_item=2)
    store.add_items("empty", [NewItem("k", prompt, [reply("zebra-a"), reply("zebra-b")])], by=None)
    item = enter(None).get("/api/projects/empty/next", headers=bearer)
    assert "zebra" not in item.text
    turns = item.json()["replies"][0]
    assert turns[0]["tool_calls"] == [{"type": "function", "function": {"name": "find", "arguments": "{}"}}]
    assert turns[1:] == [
        {"role": "tool", "name": "find", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
    ]
    ada = enter()
    for view in ("read", "difference", "raw"):
        page = ada.see(f"/projects/empty/work?view={view}")
        assert "It is 3." in page
        assert "zebra" not in page
    assert "zebra" not in enter("admin", name="Eve").see(f"/projects/empty/disputed/{item.json()['item']}")


def test_half_a_character_keeps_nobody_from_work(enter, store, bearer, tmp_path):
    store.change_project("empty", None, votes_per_item=2)
    replies = [Reply(HALF + "a"), Reply([{"role": "assistant", "content": HALF}])]
    store.add_items("empty", [NewItem("k", HALF, replies)], by=None)
    ada, boss = enter(), enter("admin", name="Eve")
    for view in ("read", "difference", "raw"):
        assert "half of a character: \ufffd" in ada.see(f"/projects/empty/work?view={view}")
    assert "\ufffd" in ada.get("/api/projects/empty/next", headers=bearer).json()["prompt"]
    ada.vote("empty", {"choice": "a"})
    ada.see("/projects/empty/history")
    for path in ("all-items", "disputed", "overview", "statistics"):
        boss.see(f"/projects/empty/{path}")
    row = json.loads(boss.get("/projects/empty/export/keel").text)
    assert row["prompt"] == HALF  # a file has it as it came
    eve = {"Authorization": f"Bearer {store.api_token(store.person_named('Eve').id, None)}"}
    assert json.loads(boss.get("/api/projects/empty/votes", headers=eve).text)["prompt"] == HALF
    labels = formats.of_project(store, "empty")
    for name in ("out.jsonl", "out.json"):
        formats.write(labels, tmp_path / name, "keel")
        assert formats.read(tmp_path / name).items[0].prompt == HALF
    with pytest.raises(UsageError, match=r"half of a character.*\.jsonl"):
        formats.write(labels, tmp_path / "out.csv", "keel")


@pytest.mark.parametrize(
    "path",
    [
        "all-items?after={}", "all-items/{}", "items/{}", "disputed/{}", "items/{}/vote", "items/{}/skip",
        "items/{}/flag", "people/{}/pause", "people/{}/link",
    ],
)  # fmt: skip
def test_a_number_that_no_database_has_is_no_fault(enter, path):
    boss = enter("admin", name="Eve")
    boss.see("/projects/pairs/settings")
    address = f"/projects/pairs/{path.format(HUGE)}"
    posted = path.endswith(("vote", "skip", "flag", "pause", "link"))
    answer = boss.post(address, data={"csrf": boss.field("csrf")}) if posted else boss.get(address)
    assert answer.status_code == (400 if "after" in path else 404)


def _row(**values: Any) -> bytes:
    row = {"key": "k", "prompt": "p", "replies": [{"content": "x"}, {"content": "y"}], **values}
    return json.dumps(row).encode()


def _vote(**values: Any) -> bytes:
    return _row(votes=[{"person": "Ann", "choice": "a", **values}])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (_row(prompt=5), "the prompt is 5"),
        (_row(replies=[{"content": 5}, {"content": "y"}]), "reply 1 is 5"),
        (_row(replies=[{"content": "x", "source": ["m"]}, {"content": "y"}]), "source of reply 1"),
        (_row(priority="high"), "priority is"),
        (_row(gold={"choice": "a", "comment": 5}), "comment of an answer is 5"),
        (_vote(at="yesterday"), "`at` is"),
        (_vote(seconds="long"), "`seconds` is"),
        (_vote(shown=[[0], 1]), "`shown` is"),
        (_vote(comment=7), "comment of an answer is 7"),
    ],
)
def test_a_row_of_odd_values_is_refused_in_words(enter, store, content, reason):
    boss = enter("admin", name="Eve")
    boss.see("/projects/empty/overview")
    boss.submit("/projects/empty/items", status=422, files={"file": ("rows.jsonl", content)})
    assert reason in boss.text
    assert not list(store.votes("empty"))


@pytest.mark.parametrize(
    ("project", "task", "values", "reason"),
    [
        ("ranks", "ranking", {"ranking": [0, 1]}, "no group"),
        ("ratings", "rating", {"ratings": [1, 2]}, "ratings are numbers by scale"),
        ("edits", "edit", {"text": 5}, "text of an answer is 5"),
    ],
)
def test_an_odd_answer_in_a_file_is_refused_in_words(store, tmp_path, project, task, values, reason):
    replies = [{"content": f"{i}"} for i in range(2 if task == "ranking" else 1)]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(_row(task=task, replies=replies, votes=[{"person": "Ann", **values}]))
    with pytest.raises(UsageError, match=reason):
        formats.into_project(store, project, formats.read(path))


def test_a_file_may_have_any_name(enter):
    boss = enter("admin", name="Eve")
    for number, name in enumerate(("a." + "b" * 300 + ".jsonl", "a.[x]*.jsonl", ".jsonl")):
        boss.see("/projects/empty/overview")
        content = _row(key=f"k{number}")
        boss.submit("/projects/empty/items", files={"file": (name, content)})
        assert "1 items added" in boss.text


def test_votes_of_somebody_forgotten_come_into_another_database(store, enter, tmp_path):
    enter().vote("pairs", {"choice": "a"})
    store.forget(store.person_named("Ada").id, None)
    formats.write(formats.of_project(store, "pairs"), tmp_path / "out.jsonl", "keel")
    formats.into_project(store, "empty", formats.read(tmp_path / "out.jsonl"))
    (vote,) = store.votes("empty")
    assert vote.person.startswith("forgotten-")
    assert store.verify().broken is None


# ---------------------------------------------------------------- strangers


def test_made_up_tokens_have_no_limit_of_their_own(store, bearer):
    client = TestClient(create_app(store, rate=0.01, burst=5))
    answers = [
        client.get("/sign-in", headers={"Authorization": f"Bearer made-up-{i}"}).status_code for i in range(7)
    ]
    assert answers == [200] * 5 + [429] * 2
    client = TestClient(create_app(store, rate=0.01, burst=5))
    answers = [client.get("/api/projects", headers=bearer).status_code for _ in range(8)]
    assert answers == [200] * 6 + [429] * 2  # the first counts for the address, the others for the token


def test_only_an_admins_large_file_is_read(app, enter, store, bearer, monkeypatch):
    monkeypatch.setattr(wire, "LARGEST", 1000)
    items = [{"key": "k", "prompt": "p" * 2000, "replies": [{"content": "a"}, {"content": "b"}]}]
    eve = store.add_person("Eve of programs", "admin")
    admin = {"Authorization": f"Bearer {store.api_token(eve.id, None)}"}
    client = enter(None)
    for headers, status in (({}, 413), (bearer, 413), ({"Authorization": "Bearer x"}, 413), (admin, 200)):
        answer = client.post("/api/projects/empty/items", json=items, headers=headers)
        assert answer.status_code == status
    boss = enter("admin", name="Eve")
    boss.see("/projects/empty/overview")
    boss.submit("/projects/empty/items", files={"file": ("x.jsonl", _row(key="j", prompt="q" * 2000))})
    assert "1 items added" in boss.text


def test_a_path_is_one_line_of_the_log_and_shows_no_code(enter, caplog):
    caplog.set_level(logging.INFO, "keel.label")
    enter(None).get("/nowhere/%0aGET%20/forged%20200/join/a-code")
    (line,) = [record.getMessage() for record in caplog.records if record.name == "keel.label"]
    assert "\n" not in line
    assert "a-code" not in line


def test_who_signs_out_elsewhere_ends_other_sessions_and_all_tokens(enter, store):
    ada, phone = enter(), enter(None)
    who = store.person_named("Ada").id
    path = f"/join/{store.sign_in_link(who, None)}"
    phone.see(path)
    phone.submit(path, {"name": "Ada"})
    bearer = {"Authorization": f"Bearer {store.api_token(who, None)}"}
    assert phone.get("/api/projects", headers=bearer).status_code == 200
    ada.see("/account")
    assert "have ended" in ada.submit("/account/sign-out-elsewhere").text
    assert phone.get("/api/projects", headers=bearer).status_code == 401
    assert phone.get("/account", follow_redirects=False).status_code == 303
    ada.see("/account")
    assert store.verify().broken is None
    assert commands.sign_out(str(store.database.path), "Ada") == 1
    assert ada.get("/account", follow_redirects=False).status_code == 303


@pytest.mark.parametrize("piece", ["\\(", "\\(a ", "[", "![", "\\[", "\\begin{align}\n"])
def test_a_model_that_repeats_itself_does_not_hold_up_the_server(piece):
    text = (piece * 100_000)[: render.LONGEST - 1]
    begun = time.process_time()
    page = render.markdown(text)
    assert time.process_time() - begun < 5  # it took minutes: each opener was looked for to the end
    assert page.startswith("<pre")
    assert str(render.markdown("\\(x\\) [a](https://fine.example/)" * 1000)).count("<math") == 1000


def test_an_address_that_is_none_of_the_web_is_no_models():
    for url in ("localhost:8000/v1", "file:///etc/passwd", "ftp://host/v1", "http://", ""):
        with pytest.raises(UsageError, match="no address of a model"):
            Endpoint(url, "m")


def test_half_a_character_is_replaced_and_a_whole_one_is_not():
    assert render.without_surrogates("a\ud800b\U0001f600") == "a\ufffdb\U0001f600"


def test_checks_that_an_admin_adds_leave_a_stage_its_project(store, tmp_path):
    label = LabelConfig(db=str(store.database.path))
    pairs = [{"pair": 0, "prompt": "p", "a": "x", "b": "y"}]
    assert stage_people.open_pairs(tmp_path, "run asked", label, pairs, "sft") == "run-asked"
    gold = NewItem("check", "1 + 1?", [Reply("2"), Reply("3")], gold=Answer("a"))
    store.add_items("run-asked", [gold], by=None)
    assert stage_people.open_pairs(tmp_path, "run asked", label, pairs, "sft") == "run-asked"
    other = [{**pairs[0], "a": "z"}]
    assert stage_people.open_pairs(tmp_path, "run asked", label, other, "sft") == "run-asked-2"
