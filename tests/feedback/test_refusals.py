"""Whatever goes wrong, a person reads a page in their language, and a program gets JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html import unescape
from typing import Any

import pytest
from starlette.testclient import TestClient

from keel.feedback import locales, wire
from keel.feedback.app import create_app
from keel.feedback.auth import SESSION
from keel.votes.database import StoreError
from keel.votes.store import Store

WORK = "/projects/pairs/work"


def _signed_out(ada: Any, store: Any) -> Any:
    ada.see(WORK)
    path, csrf = ada.action(), ada.field("csrf")
    store.sign_out_everywhere(store.person_named("Ada").id)
    return ada.post(path, data={"csrf": csrf, "choice": "a"})


def _used_id(ada: Any, store: Any) -> Any:
    ada.vote("pairs", {"choice": "a", "client_id": "mine"})
    ada.see(WORK)
    return ada.post(ada.action(), data={"csrf": ada.field("csrf"), "choice": "a", "client_id": "mine"})


def _used_link(ada: Any, store: Any) -> Any:
    code = store.invite("annotator", "pairs", by=None)
    store.accept(code, "Bo")
    ada.cookies.delete(SESSION)
    return ada.get(f"/join/{code}")


def _too_large(ada: Any, store: Any) -> Any:
    ada.see(WORK)
    return ada.post(ada.action(), content=b"x", headers={"Content-Length": str(wire.LARGEST + 1)})


def _too_large_unsaid(ada: Any, store: Any) -> Any:
    """A body that says nothing of its size."""
    ada.see(WORK)
    parts = (b"csrf=" + b"x" * 2**20 for _ in range(6))
    return ada.post(
        ada.action(), content=parts, headers={"Content-Type": "application/x-www-form-urlencoded"}
    )


def _no_choice(ada: Any, store: Any) -> Any:
    ada.see(WORK)
    return ada.post(ada.action(), data={"csrf": ada.field("csrf")})


def _long_comment(ada: Any, store: Any) -> Any:
    ada.see(WORK)
    long = {"csrf": ada.field("csrf"), "choice": "a", "comment": "x" * 10_001}
    return ada.post(ada.action(), data=long)


def _no_store(ada: Any, store: Any) -> Any:
    def full(*_: object, **__: object) -> None:
        raise StoreError("/var/lib/labels.db: the disk is full")

    ada.see(WORK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "cast", full)
        return ada.post(ada.action(), data={"csrf": ada.field("csrf"), "choice": "a"})


def _fault(ada: Any, store: Any) -> Any:
    ada._transport.raise_server_exceptions = False
    ada.see(WORK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "cast", lambda *_, **__: 1 / 0)
        return ada.post(ada.action(), data={"csrf": ada.field("csrf"), "choice": "a"})


CASES: dict[str, tuple[int, str, Callable[[Any, Any], Any]]] = {
    "signed out": (401, "error.signed_out_text", _signed_out),
    "another role": (403, "error.forbidden_text", lambda ada, _: ada.get("/projects/pairs/settings")),
    "another form": (403, "error.csrf_text", lambda ada, _: ada.post("/sign-out", data={"csrf": "x"})),
    "nothing there": (404, "error.missing_text", lambda ada, _: ada.get("/projects/never/work")),
    "no such link": (404, "join.bad_code", lambda ada, _: ada.get("/join/never-was")),
    "not to be asked so": (405, "error.bad_text", lambda ada, _: ada.get("/projects/pairs/undo")),
    "an id of another item": (409, "error.conflict_text", _used_id),
    "a used link": (410, "join.used", _used_link),
    "too large": (413, "error.large_text", _too_large),
    "too large, unsaid": (413, "error.large_text", _too_large_unsaid),
    "nothing chosen": (422, "problem.choice", _no_choice),
    "a long comment": (422, "problem.comment_long", _long_comment),
    "no database": (503, "error.store_text", _no_store),
    "a fault": (500, "error.failed_text", _fault),
}


@pytest.mark.parametrize("language", sorted(locales.LANGUAGES))
def test_each_refusal_is_a_page_in_the_readers_language(enter, store, language):
    words, ada = locales.words(language), enter()
    ada.headers["Accept-Language"] = language
    last = ("signed out", "a used link", "a fault")  # after which this visitor is of no use
    for name in [*(name for name in CASES if name not in last), *last]:
        status, key, ask = CASES[name]
        if name == "a used link":
            ada = enter(name="Ada again")
            ada.headers["Accept-Language"] = language
        elif name == "a fault":
            ada = enter(name="Ada at last")
            ada.headers["Accept-Language"] = language
        _check(ask(ada, store), status, words[key], language, name)


def _check(answer: Any, status: int, text: str, language: str, name: str) -> None:
    page = unescape(answer.text)
    assert answer.status_code == status, (name, answer.status_code, page[:300])
    assert answer.headers["content-type"].startswith("text/html"), name
    assert f'<html lang="{language}"' in page, name
    assert text in page, (name, page)
    if language != "en":  # no sentence of another language, but for the names of things
        body = re.sub(r"<[^>]+>", " ", page.split("<main", 1)[1].split("</main>", 1)[0])
        english = set(locales.words("en").values()) - set(locales.words(language).values())
        assert not [one for one in english if len(one) > 25 and one in body], name
    assert "default-src 'none'" in answer.headers["content-security-policy"], name
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "Traceback" not in page
    assert "/var" not in page


@pytest.mark.parametrize("language", sorted(locales.LANGUAGES))
def test_who_is_too_fast_reads_so_in_their_language(store, language):
    app = create_app(store, rate=0.01, burst=1)
    token = store.accept(store.invite("annotator", None, by=None), "Ada")
    cookies = {SESSION: app.state.web.auth._signer.sign(token).decode(), "keel_label_theme": "dark"}
    client = TestClient(app, cookies=cookies, headers={"Accept-Language": language})
    client.get("/account")
    refused = client.get("/account")
    _check(refused, 429, locales.words(language)["error.rate_text"], language, "rate")
    assert int(refused.headers["retry-after"]) >= 1
    assert 'data-theme="dark"' in refused.text
    told = client.get("/account", headers={"Accept": "application/json"})
    assert told.json() == {"problem": locales.words(language)["error.rate_text"]}


def test_a_name_that_is_taken_is_said_in_the_readers_language(enter, store):
    enter(name="Ada")
    path = f"/join/{store.invite('annotator', None, by=None)}"
    for language in sorted(locales.LANGUAGES):
        other = enter(None)
        other.headers["Accept-Language"] = language
        other.see(path)
        assert locales.words(language)["join.taken"] in other.submit(path, {"name": "ADA"}, 409).text
        bad = other.submit(path, {"name": "removed-3"}, 422).text
        assert locales.words(language)["join.bad_name"] in bad


def test_a_program_gets_each_refusal_as_json(store, app):
    ada, client = store.add_person("Ada"), TestClient(app)
    headers = {"Authorization": f"Bearer {store.api_token(ada.id, None)}"}
    item = client.get("/api/projects/pairs/next", headers=headers).json()["item"]
    path = f"/api/projects/pairs/items/{item}"
    big = {"Content-Length": str(wire.LARGEST + 1), "Content-Type": "application/json"}
    answers = {
        401: client.get("/api/projects"),
        403: client.get("/api/projects/pairs/votes", headers=headers),
        404: client.get("/api/projects/never/next", headers=headers),
        413: client.post(f"{path}/vote", content=b"{}", headers={**headers, **big}),
        422: client.post(f"{path}/vote", json={"client_id": "c"}, headers=headers),
    }
    parts = (json.dumps({"client_id": "x" * 2**20}).encode() for _ in range(6))
    unsaid = client.post(
        f"{path}/vote", content=parts, headers={**headers, "Content-Type": "application/json"}
    )
    answers[413.5] = unsaid  # type: ignore[index]
    for status, answer in answers.items():
        assert answer.status_code == int(status), answer.text
        assert set(answer.json()) == {"problem"}, status
