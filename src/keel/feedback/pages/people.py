"""Who works in a project: invitations, pauses, how much each has done."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from keel.feedback import web
from keel.votes.kinds import ROLES, NotFoundError
from keel.votes.listing import Tally

router = APIRouter()
INVITATION_DAYS = 7


@router.get("/projects/{project}/people")
def people(request: Request, project: str) -> Response:
    """The project's people and a form to invite more."""
    return _people(request, project, None)


def _people(request: Request, project: str, link: str | None) -> Response:
    store = web.store(request)
    settings = web.project_of(request, project)
    tallies = store.tallies(project)
    nothing = Tally(0, 0, 0)
    rows: list[dict[str, Any]] = []
    for one in store.people(project):
        tally = tallies.get(one.id, nothing)
        right = f"{tally.gold_right} / {tally.gold}" if tally.gold else "–"
        rows.append({"person": one, "votes": tally.votes, "gold": right})
    return web.page(
        request, "people.html", project=settings, tab="people", rows=rows, link=link, days=INVITATION_DAYS
    )


@router.post("/projects/{project}/people/invite")
def invite(request: Request, project: str) -> Response:
    """A one-time link, shown this once."""
    who, store, fields = web.person(request), web.store(request), web.fields(request)
    web.project_of(request, project)
    role = fields.get("role", "")
    if role not in ROLES:
        return web.problem(request, 422, "bad")
    code = store.invite(
        role, None if role == "admin" else project, who.id, fields.get("name", "").strip()[:80]
    )
    return _people(request, project, web.link(request, code))


@router.post("/projects/{project}/people/{person}/pause")
def pause(request: Request, project: str, person: web.Number) -> Response:
    """Pause a person in this project, or let them go on."""
    who, store = web.person(request), web.store(request)
    web.project_of(request, project)
    if person not in {one.id for one in store.people(project)}:
        raise NotFoundError("no such person in this project")
    reason = "by an admin" if web.fields(request).get("paused") else None
    store.set_paused(person, reason, who.id, project=project)
    return web.to(f"/projects/{project}/people")


@router.post("/projects/{project}/people/{person}/link")
def link(request: Request, project: str, person: web.Number) -> Response:
    """A link that signs a person in again, on another device or after their session ended."""
    who, store = web.person(request), web.store(request)
    web.project_of(request, project)
    if person not in {one.id for one in store.people(project)}:
        raise NotFoundError("no such person in this project")
    return _people(request, project, web.link(request, store.sign_in_link(person, who.id)))
