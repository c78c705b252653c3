"""The work page: the next item, a vote, skip, flag, undo; past votes and their change."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from keel.errors import UsageError
from keel.feedback import render, web
from keel.feedback.forms import FormError, answer_of, fields_of
from keel.feedback.wording import said
from keel.votes.kinds import Assignment, NotFoundError, PausedError, Project, UsedError

router = APIRouter()
VIEWS = ("read", "difference", "raw")
SAVED = ("counted", "surplus", "repeated", "skipped", "flagged", "undone", "nothing")
LONGEST_WORK = 86_400.0  # seconds; a page that was open for longer says nothing about the work
PAST = 200  # votes on the page of past votes


@router.get("/projects/{project}/work")
def work(request: Request, project: str) -> Response:
    """The next item for this person, or why there is none."""
    who, store = web.person(request), web.store(request)
    settings = web.project_of(request, project)
    item = store.next_item(project, who.id)
    if item is None:
        return web.page(
            request, "nothing.html", project=settings, tab="work",
            progress=store.progress(project, who.id), saved=_saved(request), client_id=_new_id(),
        )  # fmt: skip
    return _show(request, settings, item, {})


@router.get("/projects/{project}/items/{item}")
def edit(request: Request, project: str, item: web.Number) -> Response:
    """One of the person's own past votes, to be changed; or the item that is theirs now."""
    who, store = web.person(request), web.store(request)
    settings = web.project_of(request, project)
    found = store.assignment(project, who.id, item)
    return _show(request, settings, found, fields_of(settings, found.previous, found.shown))


def _show(
    request: Request,
    project: Project,
    item: Assignment,
    given: Mapping[str, str],
    problem: str = "",
    status: int = 200,
) -> Response:
    """The page of one item. What it is given of the item has no key and no source."""
    view = request.query_params.get("view", "read")
    editing = item.previous is not None
    path = f"/projects/{project.name}/items/{item.item}" if editing else f"/projects/{project.name}/work"
    return web.page(
        request,
        "work.html",
        status,
        project=project,
        tab="history" if editing else "work",
        item={"item": item.item, "prompt": item.prompt, "replies": item.replies},
        contents=[reply.content for reply in item.replies],
        given=given,
        progress=web.store(request).progress(project.name, web.person(request).id),
        view=view if view in VIEWS else "read",
        address=path,
        editing=editing,
        problem=problem,
        saved=_saved(request),
        client_id=_new_id(),
        begun=f"{time.time():.2f}",
    )


def _new_id() -> str:
    return secrets.token_urlsafe(12)


def _client_id(fields: Mapping[str, str]) -> str:
    """The id that the page was given, the same when a form is sent twice; a new one where it has none."""
    given = fields.get("client_id", "")[:100]
    return given if given and "\x00" not in given else _new_id()


def _saved(request: Request) -> str:
    saved = request.query_params.get("saved", "")
    return saved if saved in SAVED else ""


@router.post("/projects/{project}/items/{item}/vote")
def vote(request: Request, project: str, item: web.Number) -> Response:
    """A vote by the page. Which reply stood where is the store's word, never the form's."""
    who, store, fields = web.person(request), web.store(request), web.fields(request)
    settings = web.project_of(request, project)
    found = store.assignment(project, who.id, item)
    try:
        answer = answer_of(settings, found.shown, fields)
        cast = store.cast(project, who.id, item, answer, _client_id(fields), _seconds(fields))
    except PausedError:
        return _done(request, f"/projects/{project}/work")
    except (NotFoundError, UsedError):
        raise
    except (FormError, UsageError) as error:
        text = web.translator(request)(error.key if isinstance(error, FormError) else "error.bad_text")
        if web.wants_json(request):
            return JSONResponse({"problem": text}, 422)
        return _show(request, settings, found, fields, text, 422)
    after = "history" if fields.get("editing") else "work"
    view = fields.get("view")
    kept = f"&view={view}" if view in VIEWS[1:] and after == "work" else ""
    return _done(request, f"/projects/{project}/{after}?saved={cast.status}{kept}")


def _seconds(fields: Mapping[str, str]) -> float | None:
    """Seconds at work: what the page's script measured, else since the page was made."""
    values: list[float] = []
    for name in ("seconds", "begun"):
        try:
            value = float(fields.get(name, ""))
        except ValueError:
            value = math.nan
        values.append(value if math.isfinite(value) else math.nan)
    measured, since = values[0], time.time() - values[1]
    taken = measured if not math.isnan(measured) else since
    return min(taken, LONGEST_WORK) if taken >= 0 else None


def _done(request: Request, path: str) -> Response:
    return JSONResponse({"next": path}) if web.wants_json(request) else web.to(path)


@router.post("/projects/{project}/items/{item}/skip")
def skip(request: Request, project: str, item: web.Number) -> Response:
    """Put an item aside: it comes again when nothing else is left."""
    who, client = web.person(request), _client_id(web.fields(request))
    web.store(request).skip(project, who.id, item, client_id=client)
    return web.to(f"/projects/{project}/work?saved=skipped")


@router.post("/projects/{project}/items/{item}/flag")
def flag(request: Request, project: str, item: web.Number) -> Response:
    """Say that something is wrong with an item."""
    who, fields = web.person(request), web.fields(request)
    reason = fields.get("reason", "").strip()[:2000]
    web.store(request).flag(project, who.id, item, reason, client_id=_client_id(fields))
    return web.to(f"/projects/{project}/work?saved=flagged")


@router.post("/projects/{project}/undo")
def undo(request: Request, project: str) -> Response:
    """Take the last vote back; its item is shown again."""
    who, client = web.person(request), _client_id(web.fields(request))
    try:
        item = web.store(request).undo(project, who.id, client_id=client)
    except PausedError:  # the page says so
        return web.to(f"/projects/{project}/work")
    return web.to(f"/projects/{project}/work?saved={'nothing' if item is None else 'undone'}")


@router.get("/projects/{project}/history")
def history(request: Request, project: str) -> Response:
    """The person's own votes, the last one first."""
    who, store, words = web.person(request), web.store(request), web.translator(request)
    settings = web.project_of(request, project)
    rows: list[dict[str, Any]] = [
        {
            "item": past.item,
            "excerpt": render.excerpt(past.prompt),
            "answer": said(settings, past.answer, past.shown, words),
            "when": web.when(past.at),
        }
        for past in store.history(project, who.id, PAST)
    ]
    return web.page(
        request, "history.html", project=settings, tab="history", rows=rows, saved=_saved(request)
    )
