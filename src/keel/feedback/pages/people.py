"""Who works in a project: invitations, pauses, how much each has done."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from keel.feedback import web
from keel.votes.kinds import ROLES, NotFoundError

router = APIRouter()
INVITATION_DAYS = 7


@router.get("/projects/{project}/people")
def people(request: Request, project: str) -> Response:
    """The project's people and a form to invite more."""
    return _people(request, project, None)


def _people(request: Request, project: str, link: str | None) -> Response:
    store = web.store(request)
    settings = web.project_of(request, project)
    votes: dict[str, int] = {}
    gold: dict[str, list[bool]] = {}
    for name, count, right, asked in store.tally(project):
        votes[name], gold[name] = count, [True] * right + [False] * (asked - right)
    rows = [
        {
            "person": one,
            "votes": votes.get(one.name, 0),
            "gold": f"{sum(gold[one.name])} / {len(gold[one.name])}" if gold.get(one.name) else "–",
        }
        for one in store.people(project)
    ]
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
    code = store.invite(role, None if role == "admin" else project, who.id, fields.get("name", "").strip()[:80])
    return _people(request, project, f"{str(request.base_url).rstrip('/')}/join/{code}")


@router.post("/projects/{project}/people/{person}/pause")
def pause(request: Request, project: str, person: int) -> Response:
    """Pause a person in this project, or let them go on."""
    who, store = web.person(request), web.store(request)
    web.project_of(request, project)
    if person not in {one.id for one in store.people(project)}:
        raise NotFoundError("no such person in this project")
    reason = "by an admin" if web.fields(request).get("paused") else None
    store.set_paused(person, reason, who.id, project=project)
    return web.to(f"/projects/{project}/people")
