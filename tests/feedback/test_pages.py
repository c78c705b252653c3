"""The pages as a browser without scripts has them."""

from __future__ import annotations

import json
import logging
import re
import time
from html import unescape
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from keel.feedback import web
from keel.feedback.app import create_app
from keel.feedback.auth import SESSION
from keel.feedback.wire import LARGEST, Limit
from keel.votes.kinds import Answer

SECRET = "secret-model"


def _labelled(page: str, label: str) -> str:
    """What follows a label on a page, without tags."""
    return unescape(re.sub(r"<[^>]+>", " ", page.split(label, 1)[1])).strip()


# ---------------------------------------------------------------- work


def test_a_vote_without_scripts_is_kept_with_the_side_that_was_seen(enter, store):
    ada = enter()
    page = ada.see("/projects/pairs/work")
    left = re.search(r'data-reply="0".*?<p dir="auto">(.*?)</p>', page, re.S)
    assert left is not None
    fields = {name: ada.field(name) for name in ("client_id", "begun", "seconds")}
    answer = ada.submit(ada.action(), {**fields, "choice": "a", "comment": " so \r\n"})
    assert "saved=counted" in str(answer.url)
    assert "Saved." in answer.text
    (row,) = store.votes("pairs")
    chosen = row.replies["ab".index(str(row.answer.choice))].content
    assert unescape(left[1]) == chosen
    assert row.answer.comment == "so"
    assert row.seconds is not None
    assert 0 <= row.seconds < 60


def test_the_same_form_sent_twice_is_one_vote(enter, store):
    ada = enter()
    ada.see("/projects/pairs/work")
    path, fields = ada.action(), {"client_id": ada.field("client_id"), "choice": "b"}
    ada.submit(path, fields)
    again = ada.submit(path, fields)
    assert "saved before" in again.text
    assert len(list(store.votes("pairs"))) == 1


@pytest.mark.parametrize(
    ("project", "fields", "check"),
    [
        ("odd", {"choice": "b:3"}, lambda a: a.choice in "ab" and a.strength == 3),
        ("ratings", {"rating-0": "4", "rating-1": "7"}, lambda a: a.ratings == {"helpful": 4, "polite": 7}),
        (
            "ranks",
            {"place-0": "1", "place-1": "2", "place-2": "2"},
            lambda a: [len(g) for g in a.ranking] == [1, 2],
        ),
        ("edits", {"text": "A better\r\nreply"}, lambda a: a.text == "A better\nreply"),
        ("thumbs", {"choice": "up"}, lambda a: a.choice == "up"),
    ],
)
def test_every_task_takes_its_answer(enter, store, project, fields, check):
    enter().vote(project, fields)
    (row,) = store.votes(project)
    assert check(row.answer)


def test_an_answer_that_is_incomplete_is_refused_and_nothing_typed_is_lost(enter, store):
    ada = enter()
    answer = ada.vote("ratings", {"rating-1": "7", "comment": "long thoughts"}, 422)
    assert "Give a value on every scale." in answer.text
    assert re.search(r'name="rating-1" value="7" required\s+checked', answer.text)
    assert "long thoughts</textarea>" in answer.text
    assert not list(store.votes("ratings"))


def test_a_script_is_told_where_to_go_next(enter):
    ada = enter()
    ada.see("/projects/pairs/work")
    headers = {"Accept": "application/json"}
    fields = {"client_id": "x", "choice": "a", "view": "difference"}
    told = ada.submit(ada.action(), fields, headers=headers).json()
    assert told == {"next": "/projects/pairs/work?saved=counted&view=difference"}
    ada.see("/projects/pairs/work")
    assert ada.submit(ada.action(), {"choice": "x"}, 422, headers=headers).json() == {
        "problem": "Choose one of the answers."
    }


def test_skip_flag_and_undo(enter, store):
    ada = enter()
    ada.see("/projects/pairs/work")
    first = ada.action()
    ada.submit(first.replace("/vote", "/skip"))
    ada.see("/projects/pairs/work")
    second = ada.action()
    assert second != first
    flagged = ada.submit(second.replace("/vote", "/flag"), {"reason": "cut off"})
    assert "An admin will look at it." in flagged.text
    assert [flag.reason for flag in store.flags("pairs")] == ["cut off"]
    ada.vote("pairs", {"choice": "tie"})
    (row,) = store.votes("pairs")
    undone = ada.submit("/projects/pairs/undo")
    assert "taken back" in undone.text
    assert f"/items/{row.item}/vote" in undone.text
    assert not list(store.votes("pairs"))
    assert "nothing to undo" in ada.submit("/projects/pairs/undo").text


def test_a_past_vote_is_shown_as_it_was_seen_and_can_be_changed(enter, store):
    ada = enter()
    for _ in range(4):
        ada.vote("pairs", {"choice": "a", "comment": "first"})
    page = ada.see("/projects/pairs/history")
    assert page.count("A is better") == 4
    path = re.findall(r'href="(/projects/pairs/items/\d+)"', page)[0]
    page = ada.see(path)
    assert re.search(r'value="a"[^>]*aria-pressed="true"', page)
    assert "first</textarea>" in page
    ada.submit(ada.action(), {"client_id": "new", "choice": "tie", "editing": "1"})
    item = int(path.rsplit("/", 1)[1])
    changed = [row for row in store.votes("pairs") if row.item == item]
    assert [(row.answer.choice, row.version) for row in changed] == [("tie", 2)]


def test_who_is_paused_is_told_and_cannot_vote(enter, store):
    ada = enter()
    ada.see("/projects/pairs/work")
    path, fields = ada.action(), {"client_id": "late", "choice": "a"}
    store.set_paused(store.person_named("Ada").id, "by an admin", project="pairs")
    refused = ada.submit(path, fields)
    assert "You are paused" in refused.text
    assert "Paused by an admin." in refused.text
    assert not list(store.votes("pairs"))


def test_a_view_shows_every_character_or_what_differs(enter):
    ada = enter()
    assert "<mark>" not in ada.see("/projects/pairs/work")
    assert "<mark>" in ada.see("/projects/pairs/work?view=difference")
    assert 'class="raw"' in ada.see("/projects/pairs/work?view=raw")


# ---------------------------------------------------------------- blind, inert


def test_no_byte_that_an_annotator_is_sent_names_a_source(enter, store):
    """Every page and every answer of the API that an annotator can get, headers too; keys are hidden as well:
    they often name files or models."""
    ada = enter()
    token = store.api_token(store.person_named("Ada").id, None)
    bearer = {"Authorization": f"Bearer {token}"}
    seen: list[str] = []
    for project, fields in (("pairs", {"choice": "a"}), ("odd", {"choice": "b:1"})):
        for view in ("read", "difference", "raw"):
            seen.append(ada.see(f"/projects/{project}/work?view={view}"))
        for _ in range(6):
            seen.append(ada.vote(project, fields).text)
            seen.append(ada.get(f"/api/projects/{project}/next", headers=bearer).text)
        seen.append(ada.see(f"/projects/{project}/history"))
        path = re.findall(rf'href="(/projects/{project}/items/\d+)"', ada.text)[0]
        seen += [ada.see(path), ada.see("/account"), ada.see("/")]
        response = ada.get(path)
        seen.append(str(response.headers))
        seen.append(ada.get(f"/api/projects/{project}/progress", headers=bearer).text)
    assert len(seen) > 30
    assert not [text for text in seen if SECRET in text]
    with_sources = enter("admin", name="Eve")
    assert SECRET in with_sources.see("/projects/pairs/all-items")  # what the check above would have found
    assert SECRET not in with_sources.see("/projects/pairs/disputed/1")
    assert SECRET not in with_sources.see("/projects/pairs/work")


def test_markup_of_replies_reaches_no_page_as_markup(enter, store):
    ada = enter("admin")
    hostile = next(row.item for row in store.items("odd") if row.prompt == "hostile")
    for address in (f"/projects/odd/all-items/{hostile}", f"/projects/odd/disputed/{hostile}"):
        for view in ("read", "difference", "raw"):
            page = ada.see(f"{address}?view={view}")
            main = page.split('<main id="main"', 1)[1].split("</main>", 1)[0]
            for tag in ("<script", "<img", "<svg", "<iframe", "<style", "<form action"):
                assert tag not in main
            assert "&lt;script&gt;" in main
            assert not re.search(r'(?:href|src)="(?!/|https://fine\.example/|\?view)', main)


def test_text_that_people_type_is_inert(enter, store):
    eve, name = enter("admin", name="<b>Eve</b>"), "<script>alert(1)</script>"
    store.change_project("pairs", None, title=name, instructions=name + "\n\n<img src=x onerror=alert(1)>")
    ada = enter(name="Ada & <i>co</i>")
    ada.vote("pairs", {"choice": "a", "comment": name})
    ada.see("/projects/pairs/work")
    ada.submit(ada.action().replace("/vote", "/flag"), {"reason": name})
    for path in ("work", "history", "overview", "all-items", "disputed", "statistics", "people", "settings"):
        page = eve.see(f"/projects/pairs/{path}")
        assert name not in page
        assert "<b>Eve" not in page
        assert "<i>co" not in page
        assert "<img" not in page


# ---------------------------------------------------------------- coming in


def test_an_invitation_works_once(enter, store):
    code = store.invite("annotator", "pairs", by=None, name="Grace")
    first, second = enter(None), enter(None)
    first.see(f"/join/{code}")
    second.see(f"/join/{code}")
    assert first.field("name") == "Grace" or 'value="Grace"' in first.text
    assert "Grace" in first.submit(f"/join/{code}", {"name": "Grace"}).text
    refused = second.submit(f"/join/{code}", {"name": "Mallory"}, 410)
    assert "was used already" in refused.text
    second.see(f"/join/{code}", 410)
    second.see("/join/never-was", 404)
    assert "How do I change" in first.see(f"/join/{code}")  # who kept the link is at home
    assert second.get("/account", follow_redirects=False).headers["location"] == "/sign-in"
    assert "Mallory" not in [person.name for person in store.people()]


def test_a_name_that_is_taken_uses_nothing_up(enter, store):
    enter(name="Ada")
    code = store.invite("annotator", None, by=None)
    other = enter(None)
    other.see(f"/join/{code}")
    assert "already" in other.submit(f"/join/{code}", {"name": "ada"}, 409).text
    assert "at most 80" in other.submit(f"/join/{code}", {"name": "removed-7"}, 422).text
    other.submit(f"/join/{code}", {"name": " "}, 422)
    assert "Ada Two" in other.submit(f"/join/{code}", {"name": "Ada Two"}).text


def test_the_cookie_is_signed_and_for_this_server_alone(enter, store):
    ada, path = enter(), "/account"
    visitor = enter(None)
    link = f"/join/{store.invite('annotator', None, by=None)}"
    visitor.see(link)
    header = visitor.submit(link, {"name": "Bo"}, 303, follow_redirects=False).headers["set-cookie"]
    assert "HttpOnly" in header
    assert "SameSite=lax" in header
    assert "Secure" not in header
    good = ada.cookies[SESSION]
    token, _, signature = good.rpartition(".")
    forged = f"{token}.{'A' if signature[0] != 'A' else 'B'}{signature[1:]}"
    for bad in (forged, f"x{good}", token, "x" * 3000, "é", ""):
        ada.cookies.clear()
        response = ada.get(path, headers={"Cookie": f"{SESSION}={bad}".encode()}, follow_redirects=False)
        assert response.headers["location"] == "/sign-in"
    response = ada.get(path, headers={"Cookie": f"{SESSION}={good}"}, follow_redirects=False)
    assert response.status_code == 200


def test_a_session_ends_by_itself_by_signing_out_and_by_being_forgotten(enter, store):
    ada, bo = enter(), enter(name="Bo")
    cookie = {"Cookie": f"{SESSION}={ada.cookies[SESSION]}"}
    ada.see("/account")
    ada.submit("/sign-out")
    outside = enter(None)
    assert outside.get("/account", headers=cookie, follow_redirects=False).headers["location"] == "/sign-in"
    bo.see("/account")
    store.forget(store.person_named("Bo").id, by=None)
    assert bo.get("/account", follow_redirects=False).headers["location"] == "/sign-in"
    token = store.accept(store.invite("annotator", None, by=None), "Cy", days=1)
    assert store.session(token) is not None
    assert store.session(token, now=time.time() + 86_500) is None


def test_a_form_without_the_token_of_its_session_is_refused(enter, store):
    ada, eve = enter(), enter(name="Eve")
    eve.see("/account")
    ada.see("/projects/pairs/work")
    path, own = ada.action(), ada.field("csrf")
    for token in (eve.field("csrf"), "", own[:-1]):
        assert ada.post(path, data={"csrf": token, "choice": "a"}).status_code == 403
    assert ada.post(path, data={"choice": "a"}).status_code == 403
    for origin in ("http://outside.example", "null", "https://testserver.outside.example"):
        refused = ada.post(path, data={"csrf": own, "choice": "a"}, headers={"Origin": origin})
        assert refused.status_code == 403
    assert (
        ada.post(
            path, data={"csrf": own, "choice": "a"}, headers={"Sec-Fetch-Site": "cross-site"}
        ).status_code
        == 403
    )
    assert not list(store.votes("pairs"))
    sent = ada.post(path, data={"csrf": own, "choice": "a"}, headers={"Origin": "http://testserver"})
    assert sent.status_code == 200


def test_behind_a_proxy_its_address_is_the_servers_own(store):
    app = create_app(store, url="https://label.example.org/")
    # the proxy speaks http to the server, under another name
    proxied = TestClient(app, base_url="http://10.0.0.1:8011", follow_redirects=False)
    code = store.invite("admin", None, by=None)
    page = proxied.get(f"/join/{code}")
    token = re.findall(r'name="csrf" value="(\w+)"', page.text)[0]
    assert "Secure" in page.headers["set-cookie"]
    headers = {"Origin": "https://label.example.org", "Cookie": page.headers["set-cookie"].split(";")[0]}
    joined = proxied.post(f"/join/{code}", data={"csrf": token, "name": "Eve"}, headers=headers)
    assert joined.status_code == 303
    assert "Secure" in joined.headers["set-cookie"]


@pytest.mark.parametrize(
    "back", ["//outside.example", "https://outside.example", "/\\outside.example", "x", "\t//o"]
)
def test_the_preferences_lead_nowhere_else(enter, back):
    ada = enter()
    ada.see("/account")
    answer = ada.submit("/preferences", {"back": back, "theme": "dark"}, 303, follow_redirects=False)
    assert answer.headers["location"] == "/"


@settings(max_examples=200, deadline=None)
@given(st.text("/\\:.?#@ah\t\n\x00é", max_size=12))
def test_only_a_path_of_this_server_is_gone_back_to(path):
    back = web.local(path)
    assert re.match(r"/(?![/\\])[^\t\n\x00]*$", back)


def test_language_and_theme_are_kept(enter):
    ada = enter()
    page = ada.see("/projects/pairs/work")
    assert '<html lang="en">' in page
    ada.submit("/preferences", {"language": "zh", "theme": "dark", "back": "/projects/pairs/work"})
    page = ada.see("/projects/pairs/work")
    assert '<html lang="zh" data-theme="dark">' in page
    assert "A 更好" in page
    ada.submit("/preferences", {"language": "xx", "theme": "auto"})
    assert '<html lang="zh">' in ada.see("/account")
    assert (
        "A daha iyi" in enter(name="Bo").get("/projects/pairs/work", headers={"Accept-Language": "tr"}).text
    )


# ---------------------------------------------------------------- what surrounds every answer


def test_every_answer_has_the_headers_that_keep_it_safe(enter):
    ada = enter()
    nonces = set()
    for path in ("/projects/pairs/work", "/nope", "/api/projects", "/static/label.css", "/sign-in"):
        response = ada.get(path)
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert "frame-ancestors 'none'" in policy
        nonces.add(re.findall(r"'nonce-([^']+)'", policy)[0])
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "same-origin"
        assert ("cache-control" in response.headers) == (not path.startswith("/static"))
        for tag in re.findall(
            r"<script[^>]*>", response.text if "html" in response.headers["content-type"] else ""
        ):
            assert re.findall(r'nonce="([^"]+)"', tag)[0] in policy
        assert not re.search(r"\son[a-z]+=\"|\sstyle=\"|javascript:", response.text) or path.endswith(".css")
    assert len(nonces) == 5


def test_too_many_requests_of_one_person_wait_and_nobody_else_does(store):
    app = create_app(store, rate=0.01, burst=5)
    tokens = [store.accept(store.invite("annotator", None, by=None), f"P{i}") for i in range(2)]
    auth = app.state.web.auth
    clients = [TestClient(app, cookies={SESSION: auth._signer.sign(token).decode()}) for token in tokens]
    answers = [clients[0].get("/account").status_code for _ in range(7)]
    assert answers == [200] * 5 + [429] * 2
    refused = clients[0].get("/account")
    assert int(refused.headers["retry-after"]) >= 1
    assert "content-security-policy" in refused.headers
    assert clients[1].get("/account").status_code == 200
    strangers = [
        TestClient(app, cookies={SESSION: f"made.up{i}"}).get("/sign-in").status_code for i in range(7)
    ]
    assert strangers.count(429) == 2  # made-up cookies do not make one a different person


def test_codes_and_tokens_cannot_be_guessed_at_leisure(enter):
    stranger = enter(None)
    answers = [stranger.get(f"/join/guess-{i}").status_code for i in range(40)]
    assert answers[:5] == [404] * 5
    assert answers[-1] == 429
    for i in range(40):
        last = stranger.get("/api/projects", headers={"Authorization": f"Bearer guess-{i}"}).status_code
    assert last == 429


def test_a_bucket_fills_again():
    limit = Limit(rate=2, burst=2)
    assert [limit.wait("a", 0.0), limit.wait("a", 0.0)] == [0, 0]
    assert limit.wait("a", 0.0) == pytest.approx(0.5)
    assert limit.wait("b", 0.0) == 0
    assert limit.wait("a", 0.5) == 0
    small = Limit(rate=1, burst=1, most_keys=2)
    for key in "abcd":
        small.wait(key, 0.0)
    assert len(small._buckets) == 2


def test_a_body_that_is_too_large_is_refused(enter):
    ada = enter()
    ada.see("/projects/pairs/work")
    response = ada.post(ada.action(), content=b"x" * 10, headers={"Content-Length": str(LARGEST + 1)})
    assert response.status_code == 413


def test_no_code_and_no_token_is_logged(enter, store, caplog):
    caplog.set_level(logging.DEBUG)
    code = store.invite("admin", None, by=None)
    eve = enter(None)
    eve.see(f"/join/{code}")
    eve.submit(f"/join/{code}?code={code}", {"name": "Eve"})
    eve.see("/account")
    page = eve.submit("/account/token").text
    token = re.findall(r'id="token">(\w[^<]+)<', page)[0]
    assert eve.get("/api/projects", headers={"Authorization": f"Bearer {token}"}).status_code == 200
    session = eve.cookies[SESSION]
    logged = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("keel"))
    assert "POST /join/…" in logged
    assert "GET /api/projects" in logged
    for secret in (code, token, session, session.split(".")[0]):
        assert secret not in logged


def test_a_fault_and_a_silent_database_say_so_and_tell_nothing(enter, store, monkeypatch, caplog):
    from keel.votes.database import StoreError
    from keel.votes.store import Store

    ada = enter()
    ada._transport.raise_server_exceptions = False

    def full(*_: object, **__: object) -> None:
        raise StoreError("/var/lib/labels.db: the disk is full")

    ada.see("/projects/pairs/work")
    monkeypatch.setattr(Store, "cast", full)
    refused = ada.submit(ada.action(), {"choice": "a"}, 503)
    assert "Nothing was saved" in refused.text
    assert "/var" not in refused.text
    assert "/var/lib/labels.db" in caplog.text
    assert refused.headers["retry-after"]
    monkeypatch.setattr(Store, "cast", lambda *_, **__: 1 / 0)
    ada.see("/projects/pairs/work")
    broken = ada.submit(ada.action(), {"choice": "a"}, 500)
    assert "ZeroDivision" not in broken.text
    assert "Something went wrong" in broken.text


# ---------------------------------------------------------------- admins, viewers


def test_an_admin_makes_a_project_adds_items_and_takes_votes_away(enter, store):
    eve = enter("admin", name="Eve")
    eve.see("/new-project")
    given = {
        "name": "fresh", "task": "rating", "votes_per_item": "2", "random_share": "0.2", "gold_share": "0.1",
        "gold_floor": "0.7", "gold_min": "5", "lease_minutes": "20", "comment": "1", "order": "random",
        "scales": "polite 1 7 rude | courteous\nclear", "title": "Fresh", "instructions": "# Do",
    }  # fmt: skip
    bad = eve.submit("/new-project", {**given, "name": "Not Good"}, 422)
    assert "small letters" in bad.text
    assert "rude | courteous" in bad.text  # what was typed is still there
    assert "polite 1 x" in eve.submit("/new-project", {**given, "scales": "polite 1 x"}, 422).text
    eve.submit("/new-project", given)
    project = store.project("fresh")
    assert [(s.name, s.low, s.high, s.high_label) for s in project.scales] == [
        ("polite", 1, 7, "courteous"), ("clear", 1, 5, ""),
    ]  # fmt: skip
    rows = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(3)]
    file = ("mine.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    for known in (0, 3):
        added = eve.submit("/projects/fresh/items", files={"file": file})
        assert f"{3 - known} items added, {known} were there." in added.text
    wrong = eve.submit("/projects/fresh/items", status=422, files={"file": ("mine.jsonl", b'{"prmpt": 1}\n')})
    assert "mine.jsonl:1" in _labelled(wrong.text, 'role="alert"')
    assert "/tmp" not in wrong.text
    eve.submit("/projects/fresh/items", status=422, files={"file": ("mine.exe", b"x")})
    enter().vote("fresh", {"rating-0": "6", "rating-1": "2"})
    lines = eve.get("/projects/fresh/export/ratings").text.splitlines()
    (row,) = map(json.loads, lines)
    assert row["ratings"] == {"polite": 6.0, "clear": 2.0} or row["ratings"] == {"polite": 6, "clear": 2}
    assert eve.get("/projects/fresh/export/preference").status_code == 404


def test_settings_are_changed_and_what_votes_depend_on_is_not(enter, store):
    eve = enter("admin", name="Eve")
    eve.see("/projects/pairs/settings")
    given = {
        "votes_per_item": "3", "random_share": "0.2", "gold_share": "0", "gold_floor": "0.7", "gold_min": "5",
        "lease_minutes": "9", "order": "uncertain", "allow-tie": "1", "title": "New", "strength": "",
    }  # fmt: skip
    eve.submit("/projects/pairs/settings", given)
    project = store.project("pairs")
    assert (project.votes_per_item, project.allow, project.comment, project.title) == (
        3,
        ("tie",),
        False,
        "New",
    )
    page = enter().see("/projects/pairs/work")
    assert "Both bad" not in page
    assert 'name="comment"' not in page
    assert (
        "votes_per_item" in eve.submit("/projects/pairs/settings", {**given, "votes_per_item": "0"}, 422).text
    )


def test_people_are_invited_paused_and_let_in_again(enter, store):
    eve, ada = enter("admin", name="Eve"), enter()
    eve.see("/projects/pairs/people")
    page = eve.submit("/projects/pairs/people/invite", {"role": "annotator", "name": "Grace"}).text
    link = re.findall(r'id="link">http://testserver(/join/[^<]+)<', page)[0]
    grace = enter(None)
    grace.see(link)
    assert "Grace" in grace.submit(link, {"name": "Grace"}).text
    number = store.person_named("Ada").id
    eve.submit(f"/projects/pairs/people/{number}/pause", {"paused": "1"})
    assert "You are paused" in ada.see("/projects/pairs/work")
    eve.submit(f"/projects/pairs/people/{number}/pause", {"paused": ""})
    assert "You are paused" not in ada.see("/projects/pairs/work")
    page = eve.submit(f"/projects/pairs/people/{number}/link").text
    again = re.findall(r'id="link">http://testserver(/join/[^<]+)<', page)[0]
    elsewhere = enter(None)
    elsewhere.see(again)
    elsewhere.submit(again, {"name": "anybody"})
    assert ">Ada" in elsewhere.see("/account")
    eve.see("/projects/pairs/people")
    eve.submit("/projects/pairs/people/9999/pause", {"paused": "1"}, 404)
    eve.submit("/projects/pairs/people/invite", {"role": "king"}, 422)


def test_a_reviewers_word_stands_beside_the_votes(enter, store):
    one, two, eve = enter(name="One"), enter(name="Two"), enter("admin", name="Eve")
    item = None
    for _ in range(30):
        for who, choice in ((one, "a"), (two, "a")):
            who.vote("pairs", {"choice": choice})
        votes: dict[int, set[str]] = {}
        for row in store.votes("pairs"):
            votes.setdefault(row.item, set()).add(str(row.answer.choice))
        item = next((number for number, said in votes.items() if len(said) == 2), None)
        if item is not None:
            break
    assert item is not None
    assert f"Item {item}<" in eve.see("/projects/pairs/disputed")
    eve.see(f"/projects/pairs/disputed/{item}")
    before = [(row.item, row.person, row.answer) for row in store.votes("pairs")]
    eve.submit(f"/projects/pairs/disputed/{item}", {"choice": ""}, 422)
    eve.submit(f"/projects/pairs/disputed/{item}", {"choice": "b", "note": "the other is wrong"})
    (word,) = store.adjudications("pairs")
    assert (word.item, word.person, word.answer, word.note) == (
        item,
        "Eve",
        Answer("b"),
        "the other is wrong",
    )
    assert [(row.item, row.person, row.answer) for row in store.votes("pairs")] == before
    assert f"Item {item}<" not in eve.see("/projects/pairs/disputed")


def test_statistics_are_shown_with_and_without_votes(enter, store):
    reader = enter("viewer", name="Vi")
    assert "Numbers appear here" in reader.see("/projects/pairs/statistics")
    workers = [enter(name=f"W{i}") for i in range(3)]
    for _ in range(9):
        for worker in workers:
            worker.vote("pairs", {"choice": "a"})
    page = reader.see("/projects/pairs/statistics")
    for name in ("W0", "W1", "W2", f"{SECRET}-a", "Agreement", "Over time", "<svg"):
        assert name in page
    assert "built-in" not in page
    workers[0].vote("pairs", {"choice": "b"})
    assert ">28<" in reader.see("/projects/pairs/statistics")  # nothing older is shown
    for project in ("ratings", "ranks", "edits", "thumbs"):
        reader.see(f"/projects/{project}/statistics")


def test_items_come_by_the_page(enter, store):
    from keel.feedback.pages import overview

    eve, seen, path = enter("admin", name="Eve"), [], "/projects/pairs/all-items"
    pages = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overview, "PAGE", 12)
        while path:
            page = eve.see(path)
            seen += re.findall(r">Item (\d+)<", page)
            more = re.search(r'rel="next" href="\?after=(\d+)"', page)
            path = f"/projects/pairs/all-items?after={more[1]}" if more else ""
            pages += 1
    assert (pages, len(seen), len(set(seen))) == (3, 30, 30)


def test_nothing_that_a_page_needs_lies_elsewhere():
    """Styles, scripts and templates name no other host."""
    folder = Path(web.HERE)
    for path in [*(folder / "static").iterdir(), *(folder / "templates").iterdir()]:
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//[a-z]+\.[a-z]", text.replace("://label.example", "")), path.name
