"""Who works in a project: invitations, roles, pauses, removal, how much each has done."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from keel.errors import UsageError
from keel.feedback import web
from keel.votes.kinds import ROLES, NotFoundError, Person
from keel.votes.listing import Tally

router = APIRouter()
INVITATION_DAYS = 7
SAVED = ("role", "removed", "withdrawn")


@router.get("/projects/{project}/people")
def people(request: Request, project: str) -> Response:
    """The project's people and a form to invite more."""
    return _people(request, project, None)


def _people(
    request: Request, project: str, link: str | None, problem: str = "", status: int = 200
) -> Response:
    store = web.store(request)
    settings = web.project_of(request, project)
    tallies = store.tallies(project)
    nothing = Tally(0, 0, 0)
    rows: list[dict[str, Any]] = []
    for one in store.people(project):
        tally = tallies.get(one.id, nothing)
        right = f"{tally.gold_right} / {tally.gold}" if tally.gold else "–"
        rows.append({"person": one, "votes": tally.votes, "gold": right})
    opened = [one for one in store.invitations(project) if one.state == "open"]
    saved = request.query_params.get("saved", "")
    return web.page(
        request, "people.html", status, project=settings, tab="people", rows=rows, link=link,
        days=INVITATION_DAYS, invitations=[{"one": one, "until": web.when(one.expires)} for one in opened],
        saved=saved if saved in SAVED else "", problem=problem, roles=("annotator", "viewer", "admin"),
    )  # fmt: skip


def _one_of(request: Request, project: str, person: int) -> Person:
    """A person of this project. NotFoundError for anybody else."""
    web.project_of(request, project)
    found = next((one for one in web.store(request).people(project) if one.id == person), None)
    if found is None:
        raise NotFoundError("no such person in this project")
    return found


@router.post("/projects/{project}/people/invite")
def invite(request: Request, project: str) -> Response:
    """A one-time link, shown this once."""
    who, store, fields = web.person(request), web.store(request), web.fields(request)
    web.project_of(request, project)
    role = fields.get("role", "")
    if role not in ROLES:
        return web.problem(request, 422, "bad")
    try:
        code = store.invite(
            role, None if role == "admin" else project, who.id, fields.get("name", "").strip()[:80]
        )
    except UsageError as error:  # the name is taken, or cannot be read
        return _people(request, project, None, str(error), 422)
    return _people(request, project, web.link(request, code))


@router.post("/projects/{project}/people/invitations/{invitation}/withdraw")
def withdraw(request: Request, project: str, invitation: web.Number) -> Response:
    """Make a link worthless that nobody has used yet."""
    who, store = web.person(request), web.store(request)
    web.project_of(request, project)
    if invitation not in {one.id for one in store.invitations(project)}:
        raise NotFoundError("no such invitation in this project")
    try:
        store.withdraw_invitation(invitation, who.id)
    except NotFoundError:
        raise
    except UsageError as error:
        return _people(request, project, None, str(error), 422)
    return web.to(f"/projects/{project}/people?saved=withdrawn")


@router.post("/projects/{project}/people/{person}/pause")
def pause(request: Request, project: str, person: web.Number) -> Response:
    """Pause a person in this project, or let them go on."""
    who, found = web.person(request), _one_of(request, project, person)
    reason = "by an admin" if web.fields(request).get("paused") else None
    web.store(request).set_paused(found.id, reason, who.id, project=project)
    return web.to(f"/projects/{project}/people")


@router.post("/projects/{project}/people/{person}/role")
def role(request: Request, project: str, person: web.Number) -> Response:
    """Give a person another role, in every project that they may see."""
    who, found = web.person(request), _one_of(request, project, person)
    wanted: Any = web.fields(request).get("role", "")
    try:
        web.store(request).set_role(found.id, wanted, who.id)
    except UsageError as error:
        return _people(request, project, None, str(error), 422)
    return web.to(f"/projects/{project}/people?saved=role")


@router.post("/projects/{project}/people/{person}/remove")
def remove(request: Request, project: str, person: web.Number) -> Response:
    """Remove a person's name, comments and sessions for good. Their votes stay, under a number."""
    who, found = web.person(request), _one_of(request, project, person)
    if not web.fields(request).get("sure"):
        return _people(request, project, None, web.translator(request)("problem.sure"), 422)
    try:
        web.store(request).forget(found.id, who.id)
    except UsageError as error:
        return _people(request, project, None, str(error), 422)
    return web.to("/sign-in" if found.id == who.id else f"/projects/{project}/people?saved=removed")


@router.post("/projects/{project}/people/{person}/link")
def link(request: Request, project: str, person: web.Number) -> Response:
    """A link that signs a person in again, on another device or after their session ended."""
    who, found = web.person(request), _one_of(request, project, person)
    return _people(request, project, web.link(request, web.store(request).sign_in_link(found.id, who.id)))
