"""Coming in: invitations, the list of projects, one's account, language and theme."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, HTTPException, Request
from starlette.responses import Response

from keel.errors import UsageError
from keel.feedback import web
from keel.feedback.auth import SESSION, VISITOR
from keel.feedback.locales import LANGUAGES
from keel.feedback.web import THEMES, YEAR
from keel.feedback.wire import address
from keel.votes.kinds import GoneError, Person, TakenError
from keel.votes.store import Store

router = APIRouter()
LONGEST_NAME = 80


@router.get("/")
def home(request: Request) -> Response:
    """The projects that this person may see; straight to work where there is one and nothing else to do."""
    who, store = web.person(request), web.store(request)
    found = store.projects(who.id)
    if who.role == "annotator" and len(found) == 1:
        return web.to(f"/projects/{found[0].name}/work")
    cards = [{"project": project, **_counts(store, who, project.name)} for project in found]
    return web.page(request, "home.html", cards=cards)


def _counts(store: Store, who: Person, project: str) -> dict[str, Any]:
    """How far a project has come; for an annotator, how far they have: whether the votes of all grew with one
    of theirs would say which items are checks."""
    if who.role != "annotator":
        counts = store.counts(project)
        return {"mine": False, "done": counts["counted"], "all": counts["wanted"]}
    own = store.progress(project, who.id)
    return {"mine": True, "done": own.done, "all": own.done + own.left_for_me}


@router.get("/sign-in")
def sign_in(request: Request) -> Response:
    """How to get in: by a link from an admin."""
    return _entry(request, "sign-in", "sign_in.heading")


@router.get("/join/{code}")
def join_form(request: Request, code: str) -> Response:
    """The form of an invitation. Looking does not use it up: programs look at links too."""
    suggested = web.store(request).invitation(code)
    if suggested is None:
        return _no_code(request, code)
    return _entry(request, "join", "join.heading", name=suggested)


@router.post("/join/{code}")
def join(request: Request, code: str) -> Response:
    """Use an invitation: a session begins."""
    state, name = web.web(request), web.fields(request).get("name", "").strip()
    if state.store.invitation(code) is None:
        return _no_code(request, code)
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        return _again(request, "join.bad_name", name, 422)
    try:
        token = state.store.accept(code, name)
    except TakenError:
        return _again(request, "join.taken", name, 409)
    except GoneError:  # somebody was faster by a moment
        return _no_code(request, code)
    except UsageError:
        return _again(request, "join.bad_name", name, 422)
    response = web.to("/")
    state.auth.remember(response, token, secure=web.secure(request))
    response.delete_cookie(VISITOR)
    return response


def _again(request: Request, problem: str, name: str, status: int) -> Response:
    """The form of an invitation with what is wrong with the name."""
    said = web.translator(request)(problem)
    return _entry(request, "join", "join.heading", problem=said, name=name, status=status)


def _no_code(request: Request, code: str) -> Response:
    """What became of an invitation that cannot be used. Whoever came in by it and kept the link goes home.
    Codes that never were are not found, and cannot be guessed at leisure."""
    state = web.store(request).invitation_state(code)
    if state is not None and request.state.person is not None:
        return web.to("/")
    if state is None and web.web(request).wrong.wait(address(request.scope)):
        raise HTTPException(429)
    text = web.translator(request)("join.bad_code" if state is None else f"join.{state}")
    status = 404 if state is None else 410
    return _entry(request, "sign-in", "sign_in.heading", problem=text, status=status)


def _entry(
    request: Request, kind: str, heading: str, *, problem: str = "", name: str = "", status: int = 200
) -> Response:
    words = web.translator(request)
    return web.page(
        request, "entry.html", status, kind=kind, heading=words(heading), problem=problem, name=name
    )


@router.post("/preferences")
def preferences(request: Request) -> Response:
    """Language and theme, kept in the browser."""
    fields = web.fields(request)
    response = web.to(web.local(fields.get("back", "/")))
    if (language := fields.get("language")) in LANGUAGES:
        response.set_cookie("keel_label_language", str(language), max_age=YEAR, httponly=True, samesite="lax")
    if (theme := fields.get("theme")) in (*THEMES, "auto"):
        response.set_cookie("keel_label_theme", str(theme), max_age=YEAR, httponly=True, samesite="lax")
    return response


@router.post("/sign-out")
def sign_out(request: Request) -> Response:
    """End this session, here and in the store."""
    web.store(request).sign_out(request.state.session)
    response = web.to("/sign-in")
    response.delete_cookie(SESSION)
    return response


@router.get("/account")
def account(request: Request) -> Response:
    """Name, role, API token."""
    return web.page(request, "account.html", tab="account", token=None, ended=False)


@router.post("/account/token")
def account_token(request: Request) -> Response:
    """A new API token, shown this once."""
    who = web.person(request)
    token = web.store(request).api_token(who.id, who.id)
    return web.page(request, "account.html", tab="account", token=token, ended=False)


@router.post("/account/sign-out-elsewhere")
def sign_out_elsewhere(request: Request) -> Response:
    """End one's other sessions, and all of one's API tokens."""
    who = web.person(request)
    web.store(request).sign_out_everywhere(who.id, who.id, but=request.state.session)
    return web.page(request, "account.html", tab="account", token=None, ended=True)
