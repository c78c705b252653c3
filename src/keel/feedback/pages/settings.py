"""A new project, and the settings of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from keel.errors import UsageError
from keel.feedback import web
from keel.feedback.scales import line_of, scales_of_text
from keel.votes.kinds import ORDERS, TASKS, Project

router = APIRouter()
NUMBERS: dict[str, type[int] | type[float]] = {
    "votes_per_item": int, "random_share": float, "gold_share": float, "gold_floor": float, "gold_min": int,
    "lease_minutes": float,
}  # fmt: skip
CHECKS = ("tie", "both_bad", "cannot_judge")


@router.get("/new-project")
def new_form(request: Request) -> Response:
    """The form of a new project."""
    return _form(request, None, _given(Project("")))


@router.post("/new-project")
def new(request: Request) -> Response:
    """Make a project."""
    fields = web.fields(request)
    try:
        name, task = fields.get("name", "").strip(), fields.get("task", "pairwise")
        if task not in TASKS:
            raise UsageError(f"the task is {task!r}, not one of {', '.join(TASKS)}")
        project = Project(name, task=task, **_settings(fields))
        web.store(request).create_project(project, web.person(request).id)
    except UsageError as error:
        return _form(request, None, {**_given(Project("")), **_typed(fields)}, str(error))
    return web.to(f"/projects/{project.name}/overview")


@router.get("/projects/{project}/settings")
def settings(request: Request, project: str) -> Response:
    """The form of a project's settings."""
    found = web.project_of(request, project)
    return _form(request, found, _given(found), saved=request.query_params.get("saved") == "1")


@router.post("/projects/{project}/settings")
def change(request: Request, project: str) -> Response:
    """Change a project's settings. Task and name stay."""
    who, store, fields = web.person(request), web.store(request), web.fields(request)
    found = web.project_of(request, project)
    try:
        changed = _settings(fields)
        if found.task != "rating":
            del changed["scales"]
        store.change_project(project, who.id, **changed)
    except UsageError as error:
        return _form(request, found, {**_given(found), **_typed(fields)}, str(error))
    return web.to(f"/projects/{project}/settings?saved=1")


@router.post("/projects/{project}/pause")
def pause(request: Request, project: str) -> Response:
    """Hand out nothing of a project any more, or hand out again."""
    who, store, fields = web.person(request), web.store(request), web.fields(request)
    web.project_of(request, project)
    reason = fields.get("reason", "").strip() or "by an admin"
    store.pause_project(project, reason if fields.get("paused") else "", who.id)
    return web.to(f"/projects/{project}/settings?saved=1")


def _form(
    request: Request,
    project: Project | None,
    given: Mapping[str, Any],
    problem: str = "",
    *,
    saved: bool = False,
) -> Response:
    return web.page(
        request,
        "settings.html",
        422 if problem else 200,
        project=project,
        tab="settings",
        given=given,
        problem=problem,
        saved=saved,
        tasks=TASKS,
    )


def _given(project: Project) -> dict[str, Any]:
    values = {key: getattr(project, key) for key in NUMBERS}
    values |= {
        key: getattr(project, key) for key in ("name", "title", "instructions", "examples", "task", "order")
    }
    values |= {"allow": project.allow, "strength": project.strength, "comment": project.comment}
    return values | {"scales": "\n".join(line_of(scale) for scale in project.scales)}


def _typed(fields: Mapping[str, str]) -> dict[str, Any]:
    """What was typed, to be shown again beside what is wrong with it."""
    boxes = {"allow": [name for name in CHECKS if fields.get(f"allow-{name}")]}
    boxes |= {name: bool(fields.get(name)) for name in ("strength", "comment")}
    return {**{key: value for key, value in fields.items() if key not in ("csrf", *boxes)}, **boxes}


def _settings(fields: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, kind in NUMBERS.items():
        try:
            values[name] = kind(fields.get(name, ""))
        except ValueError:
            raise UsageError(f"`{name}` is {fields.get(name, '')!r}, not a number") from None
    for name in ("title", "instructions", "examples"):
        values[name] = fields.get(name, "").strip().replace("\r\n", "\n")
    values["allow"] = tuple(name for name in CHECKS if fields.get(f"allow-{name}"))
    values["strength"], values["comment"] = bool(fields.get("strength")), bool(fields.get("comment"))
    values["order"] = fields.get("order", "random")
    if values["order"] not in ORDERS:
        raise UsageError(f"the order is {values['order']!r}, not one of {', '.join(ORDERS)}")
    values["scales"] = scales_of_text(fields.get("scales", ""))
    return values
