"""The pages in Chromium: by keyboard alone, on a phone's width, for screen readers, with other hosts blocked,
without scripts."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from keel.votes.kinds import Answer

sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.browser
PROJECT_PAGES = ("work", "history", "overview", "all-items", "disputed", "statistics", "people", "settings")
PAGES = [
    "/", "/account", "/new-project", "/projects/empty/work", "/projects/empty/history", "/nope",
    *(f"/projects/pairs/{page}" for page in PROJECT_PAGES), "/projects/pairs/all-items/1",
    "/projects/pairs/disputed/1", "/projects/pairs/work?view=difference", "/projects/pairs/work?view=raw",
    *(f"/projects/{task}/work" for task in ("odd", "ratings", "ranks", "edits", "thumbs")),
    *(f"/projects/odd/all-items/{number}" for number in range(31, 37)),
    "/projects/odd/all-items/33?view=difference", "/projects/odd/all-items/33?view=raw",
]  # fmt: skip


@pytest.fixture
def browser(chromium: Any) -> Any:
    return chromium


@pytest.fixture
def address(app: Any) -> Iterator[str]:
    """Where a server with the app answers."""
    import uvicorn

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def open_page(browser: Any, address: str, store: Any) -> Iterator[Callable[..., Any]]:
    """A page of somebody who came in by a link. What the page asks other hosts for, and what it complains of,
    is gathered in `page.outside` and `page.complaints`."""
    contexts: list[Any] = []

    def go(role: str = "annotator", name: str = "Ada", project: str | None = None, **settings: Any) -> Any:
        context = browser.new_context(base_url=address, **{"locale": "en-US", **settings})
        contexts.append(context)
        page = context.new_page()
        page.outside, page.complaints = [], []

        def watch(route: Any) -> None:
            if route.request.url.startswith(address):
                route.continue_()
            else:
                page.outside.append(route.request.url)
                route.abort()

        context.route("**/*", watch)
        page.on("console", lambda m: page.complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.goto(f"/join/{store.invite(role, project, by=None)}")
        page.fill("#name", name)
        page.keyboard.press("Enter")
        page.wait_for_url(re.compile(r"^(?!.*/join/)"))
        return page

    yield go
    for context in contexts:
        context.close()


def _vote_by(page: Any, key: str) -> None:
    before = page.get_attribute("#answer", "action")
    page.keyboard.press(key)
    page.wait_for_function(
        "before => { const form = document.querySelector('#answer');"
        " const said = document.querySelector('[role=status]');"
        " return said && (!form || form.getAttribute('action') !== before) }",
        arg=before,
    )


def test_by_keyboard_alone_ten_items_are_labelled_and_one_undone(open_page, store):
    page = open_page(project="pairs")
    page.wait_for_selector("#answer")
    for key in "1234512121":
        _vote_by(page, key)
    rows = list(store.votes("pairs"))
    assert len(rows) == 10
    said = sorted(str(row.answer.choice) for row in rows)
    assert (said.count("tie"), said.count("both_bad"), said.count("cannot_judge")) == (1, 1, 1)
    last = max(rows, key=lambda row: row.at)
    page.keyboard.press("u")
    page.wait_for_url("**/work?saved=undone")
    assert page.get_attribute("#answer", "action").endswith(f"/items/{last.item}/vote")
    assert len(list(store.votes("pairs"))) == 9
    page.keyboard.press("c")
    page.keyboard.type("1 is not pressed while I type")
    page.keyboard.press("Escape")
    _vote_by(page, "2")
    newest = max(store.votes("pairs"), key=lambda row: row.at)
    assert (newest.item, newest.answer.comment) == (last.item, "1 is not pressed while I type")
    assert all(row.seconds is not None and 0 < row.seconds < 60 for row in store.votes("pairs"))
    before = page.get_attribute("#answer", "action")
    page.keyboard.press("s")
    page.wait_for_url("**/work?saved=skipped")
    assert page.get_attribute("#answer", "action") != before
    page.keyboard.press("f")
    page.keyboard.type("cut off")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_url("**/work?saved=flagged")
    assert [flag.reason for flag in store.flags("pairs")] == ["cut off"]
    assert (page.outside, page.complaints) == ([], [])


def test_by_keyboard_alone_every_task_is_done(open_page, store):
    page = open_page()
    for project, keys in (
        ("odd", ["6"]), ("ratings", ["4", "7", "Enter"]), ("ranks", ["2", "1", "2", "Enter"]),
        ("thumbs", ["1"]), ("edits", []),
    ):  # fmt: skip
        page.goto(f"/projects/{project}/work")
        for key in keys:
            page.keyboard.press(key)
        if project == "edits":
            page.focus("#text")
            page.keyboard.press("Control+End")
            page.keyboard.type(" and more")
            page.keyboard.press("Control+Enter")
        page.wait_for_url("**/work?saved=counted")
        (row,) = store.votes(project)
        if project == "odd":
            assert row.answer.strength == 2
        if project == "ratings":
            assert row.answer.ratings == {"helpful": 4, "polite": 7}
        if project == "ranks":
            assert row.answer.ranking[0] == [row.shown[1]]
        if project == "edits":
            assert row.answer.text == f"{row.replies[0].content} and more"
    assert (page.outside, page.complaints) == ([], [])


def test_the_keys_are_shown_and_can_be_switched_off(open_page, store):
    page = open_page(project="pairs")
    page.wait_for_selector("#answer")
    page.keyboard.press("?")
    shown = page.inner_text("dialog[open]")
    for word in ("A is better", "Cannot judge", "Skip", "Differences", "Instructions"):
        assert word in shown
    page.uncheck("#keys-on")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog[open]", state="detached")
    page.keyboard.press("1")
    page.keyboard.press("s")
    time.sleep(0.3)
    assert "saved" not in page.url
    assert not list(store.votes("pairs"))
    page.reload()
    page.keyboard.press("2")
    time.sleep(0.3)
    assert not list(store.votes("pairs"))


def test_views_change_without_losing_what_was_typed(open_page):
    page = open_page(project="pairs")
    page.wait_for_selector("#answer")
    page.keyboard.press("c")
    page.keyboard.type("kept")
    page.keyboard.press("Escape")
    page.keyboard.press("d")
    page.wait_for_selector(".reply mark")
    assert page.input_value("#comment") == "kept"
    _vote_by(page, "1")
    assert page.locator(".reply mark").count() > 0  # the view stays
    page.keyboard.press("r")
    page.wait_for_selector(".reply mark", state="detached")
    page.goto("/projects/pairs/history")
    assert page.complaints == []


def test_a_vote_is_sent_again_until_the_server_answers(open_page, store):
    page = open_page(project="pairs")
    page.wait_for_selector("#answer")
    failures = [503, "lost"]

    def fail(route: Any) -> None:
        if not failures:
            route.continue_()
        elif failures.pop() == "lost":  # it arrived, but its answer got lost
            route.fetch()
            route.abort()
        else:
            route.fulfill(status=503, body="busy")

    page.route("**/vote", fail)
    page.keyboard.press("1")
    page.wait_for_selector("#unsent:not([hidden])")
    page.wait_for_url("**/work?saved=repeated", timeout=10_000)
    assert len(list(store.votes("pairs"))) == 1


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_scrolls_sideways(open_page, store, width):
    page = open_page("admin", name="Eve " + "W" * 70, viewport={"width": width, "height": 800})
    store.change_project("pairs", None, title="Long " * 30, instructions="x" * 400 + "\n\n- a\n- b")
    for language in ("en", "tr"):
        page.context.add_cookies([{"name": "keel_label_language", "value": language, "url": page.url}])
        for path in PAGES:
            page.goto(path)
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, (path, language, wide)
    assert page.outside == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(open_page, store, theme):
    from axe_playwright_python.sync_playwright import Axe

    axe = Axe()
    page = open_page("admin", name="Eve", color_scheme=theme, viewport={"width": 1280, "height": 900})
    other = store.add_person("Bo")
    for person, choice in ((store.person_named("Eve"), "a"), (other, "b")):
        for number in range(24):
            found = store.next_item("pairs", person.id)
            side = "ab"[found.shown["ab".index(choice)]]
            store.cast("pairs", person.id, found.item, Answer(side), f"{number}", 3.0)
    store.set_paused(other.id, "by an admin", project="pairs")
    found = []
    for path in ["/sign-in", *PAGES]:
        page.goto(path)
        if "/work" in path and page.query_selector("details.drawer"):
            page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        for violation in axe.run(page).response["violations"]:
            if violation["impact"] in ("serious", "critical"):
                found.append((path, violation["id"], [node["html"][:120] for node in violation["nodes"]][:3]))
    assert found == []
    page.goto("/projects/pairs/work")
    page.keyboard.press("?")
    opened = axe.run(page).response["violations"]
    assert [v["id"] for v in opened if v["impact"] in ("serious", "critical")] == []


def test_a_hostile_reply_does_nothing(open_page, store):
    page = open_page("admin", name="Eve")
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    hostile = next(row.item for row in store.items("odd") if row.prompt == "hostile")
    for view in ("read", "difference", "raw"):
        page.goto(f"/projects/odd/all-items/{hostile}?view={view}")
        page.wait_for_load_state("networkidle")
        assert page.locator(".reply script, .reply img, .reply svg, .reply form, .reply style").count() == 0
        assert page.is_visible("h1")
    assert (dialogs, page.outside, page.complaints) == ([], [], [])


def test_even_if_markup_got_through_no_script_would_run(open_page, store, app):
    """The content policy is a wall of its own: replies are put on the page as markup on purpose."""
    from markupsafe import Markup

    environment = app.state.web.templates
    environment.globals["raw"] = lambda content: Markup(content if isinstance(content, str) else "")
    page = open_page("admin", name="Eve")
    hostile = next(row.item for row in store.items("odd") if row.prompt == "hostile")
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.goto(f"/projects/odd/all-items/{hostile}?view=raw")
    page.wait_for_load_state("networkidle")
    assert page.locator(".reply script").count() >= 1  # the markup is there
    assert dialogs == []
    assert page.outside == []
    assert any("Content Security Policy" in text for text in page.complaints)


def test_without_scripts_the_whole_work_is_done(open_page, store):
    page = open_page(project="pairs", java_script_enabled=False)
    page.click("button[value=a]")
    assert "Saved." in page.inner_text("[role=status]")
    page.click("[role=status] button")
    assert "taken back" in page.inner_text("[role=status]")
    page.click("summary:has-text('Comment')")
    page.fill("#comment", "plain")
    page.click("button[value=tie]")
    page.click("text=Differences")
    assert page.locator(".reply mark").count() > 0
    page.click("button:has-text('Skip')")
    page.click("nav >> text=Past votes")
    page.click("tbody a:has-text('Change')")
    page.click("button[value=b]")
    (row,) = store.votes("pairs")
    assert (row.answer.choice in "ab", row.answer.comment, row.version > 2) == (True, "plain", True)
    page.select_option("#theme", "dark")
    page.click(".foot button")
    assert page.get_attribute("html", "data-theme") == "dark"


def test_enter_in_a_form_votes_for_nothing(open_page, store):
    """The first button of a form is pressed by Enter: it must be none of the choices."""
    page = open_page(java_script_enabled=False)
    page.goto("/projects/ratings/work")
    page.focus("input[name=rating-0]")
    page.keyboard.press("Space")
    page.keyboard.press("Enter")
    time.sleep(0.3)
    assert "saved" not in page.url
    assert not list(store.votes("ratings"))


def test_right_to_left_text_has_its_own_direction(open_page, store):
    page = open_page("admin", name="Eve")
    arabic = next(row.item for row in store.items("odd") if "المغرب" in str(row.prompt))
    page.goto(f"/projects/odd/all-items/{arabic}")
    assert page.evaluate("getComputedStyle(document.querySelector('.reply p')).direction") == "rtl"
    assert page.evaluate("getComputedStyle(document.querySelector('h1')).direction") == "ltr"


def test_the_theme_follows_the_system_until_it_is_chosen(open_page):
    page = open_page(color_scheme="dark")
    colour = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(colour)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(colour)
    assert dark != light
    with page.expect_navigation():
        page.select_option("#theme", "dark")
    assert page.evaluate(colour) == dark
