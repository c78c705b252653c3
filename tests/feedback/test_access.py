"""Who may do what: every route that the app has, with every role, against the table; and the table against
the documentation."""

from __future__ import annotations

import re
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute

from keel.feedback import api
from keel.feedback.access import ACCESS, API
from keel.feedback.pages import entry, numbers, overview, people, review, settings, work

ROOT = Path(__file__).parents[2]
ROLES = ("nobody", "annotator", "viewer", "admin")
ROUTES = sorted(
    f"{method} {route.path}"
    for part in (entry, work, overview, review, people, settings, numbers, api)
    for route in part.router.routes
    if isinstance(route, APIRoute)
    for method in route.methods
)


def test_every_route_has_a_line_in_the_table_and_no_line_is_without_a_route():
    assert sorted([*ROUTES, "GET /api/openapi.json"]) == sorted(ACCESS)


def test_the_app_serves_no_other_route(app):
    """Every path of the table, the files, and nothing that FastAPI adds by itself."""
    from starlette.testclient import TestClient

    client = TestClient(app)
    for path in ("/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect"):
        assert client.get(path).status_code == 404
    mounts = {route.path for route in app.routes if hasattr(route, "path")}
    assert {path for path in mounts if path and not path.startswith("/static")} <= {
        line.split()[1] for line in ACCESS
    }


def test_the_documentation_has_the_same_table():
    text = (ROOT / "docs" / "labelling.md").read_text(encoding="utf-8")
    lines = re.findall(
        r"^\| `((?:GET|POST) [^`]+)` \| [^|]+ \| ([ ✓]*) \| ([ ✓]*) \| ([ ✓]*) \| ([ ✓]*) \|$", text, re.M
    )
    table = {
        route: {role for role, mark in zip(ROLES, marks, strict=True) if mark.strip()}
        for route, *marks in lines
    }
    assert table == {route: set(allowed) for route, allowed in ACCESS.items()}


@pytest.fixture
def visitors(enter, store) -> dict[str, Any]:
    """One of each role, their API tokens, and an item that is the annotator's and the admin's own."""
    found = {"nobody": enter(None)}
    tokens = {"nobody": None}
    for role in ROLES[1:]:
        found[role] = enter(role, name=f"{role} one")
        tokens[role] = store.api_token(store.person_named(f"{role} one").id, None)
    return {"visitors": found, "tokens": tokens}


def _path(route: str, store: Any, role: str) -> str:
    path = (
        route.split()[1].replace("{project}", "pairs").replace("{form}", "keel").replace("{code}", "nonsense")
    )
    path = path.replace("{person}", str(store.person_named("viewer one").id))
    path = path.replace("{invitation}", "9999")
    item = 1
    if role in ("annotator", "admin"):
        found = store.next_item("pairs", store.person_named(f"{role} one").id)
        item = found.item if found else 1
    return path.replace("{item}", str(item))


NUMBERS = count()


def _body(deed: str) -> Any:
    """What a program sends, with another id each time."""
    bodies: dict[str, Any] = {"vote": {"choice": "a"}, "flag": {"reason": "odd"}}
    if deed == "items":
        return [{"key": "n", "prompt": "p", "replies": [{"content": "a"}, {"content": "b"}]}]
    return {"client_id": f"c{next(NUMBERS)}", **bodies.get(deed, {})}


def _ask(visitor: Any, route: str, path: str, token: str | None, *, follow: bool = False) -> Any:
    """What a visitor is answered, with all that a request of their own would have."""
    method = route.split()[0]
    options: dict[str, Any] = {"follow_redirects": follow}
    if route in API:
        options["headers"] = {"Authorization": f"Bearer {token}"} if token else {}
        if method == "POST":
            options["json"] = _body(path.rsplit("/", 1)[1])
    elif method == "POST":
        signed_in = visitor.cookies.get("keel_label") is not None
        visitor.see("/account" if signed_in else "/sign-in")
        options["data"] = {"csrf": visitor.field("csrf"), "choice": "a"}
    return visitor.request(method, path, **options)


def test_each_role_is_let_in_or_kept_out_as_the_table_says(visitors, store):
    """Every route with every role; signing out comes last."""
    for route in sorted(ACCESS, key=lambda route: ("/sign-out" in route, route)):
        for role in ROLES:
            visitor, token = visitors["visitors"][role], visitors["tokens"][role]
            path = _path(route, store, role)
            response = _ask(visitor, route, path, token)
            status, place = response.status_code, response.headers.get("location")
            told = (route, role, status, response.text[:300])
            if role in ACCESS[route]:
                wanted = (404,) if "{code}" in route or "{invitation}" in route else (200, 204, 303, 422)
                assert status in wanted, told
                assert place != "/sign-in" or path == "/sign-out", told
            elif role != "nobody":
                assert status == 403, told
            elif route in API:
                assert status == 401, told
            else:
                assert (status, place) in ((303, "/sign-in"), (401, None)), told


def test_a_project_of_others_is_not_there(enter, store):
    """To people of one project, every other one is as if it never was."""
    for role in ("annotator", "viewer"):
        visitor = enter(role, name=f"{role} of pairs", project="pairs")
        token = store.api_token(store.person_named(f"{role} of pairs").id, None)
        for route in sorted(r for r in ACCESS if "{project}" in r and role in ACCESS[r]):
            path = route.split()[1].replace("{item}", "1").replace("{form}", "keel")
            for project in ("thumbs", "never-was"):
                response = _ask(visitor, route, path.replace("{project}", project), token)
                assert response.status_code == 404, (route, role, project, response.text[:300])
            if route.startswith("GET") and "{item}" not in route:
                own = _ask(visitor, route, path.replace("{project}", "pairs"), token)
                assert own.status_code in (200, 204), (route, role)


def test_an_item_that_is_anothers_is_not_there(enter, store):
    one, other = enter(name="one"), enter(name="other")
    one.see("/projects/pairs/work")
    path = one.action()
    item = path.split("/")[4]
    other.see("/account")
    for deed in ("vote", "skip", "flag"):
        other.submit(f"/projects/pairs/items/{item}/{deed}", {"choice": "a"}, 404)
    other.see(f"/projects/pairs/items/{item}", 404)
    other.see("/projects/pairs/items/999999", 404)
    other.see("/projects/pairs/items/zero", 404)
    headers = {"Authorization": f"Bearer {store.api_token(store.person_named('other').id, None)}"}
    vote = other.post(
        f"/api/projects/pairs/items/{item}/vote", json={"client_id": "c", "choice": "a"}, headers=headers
    )
    assert vote.status_code == 404
    one.submit(path, {"client_id": "mine", "choice": "a"})
    assert [row.person for row in store.votes("pairs")] == ["one"]
