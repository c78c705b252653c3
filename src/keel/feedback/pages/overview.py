"""What an admin and a viewer see of a project: counts, items with their votes, files to take away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request
from starlette.datastructures import UploadFile
from starlette.responses import Response, StreamingResponse

from keel.errors import KeelError
from keel.feedback import exchange, render, web
from keel.feedback.wording import said
from keel.votes.kinds import ItemRow, Project, VoteRow

router = APIRouter()
PAGE = 50  # items a page


@router.get("/projects/{project}/overview")
def overview(request: Request, project: str) -> Response:
    """Progress, what to add, what to take away."""
    return _overview(request, web.project_of(request, project))


def _overview(
    request: Request, project: Project, *, added: str = "", problem: str = "", status: int = 200
) -> Response:
    store = web.store(request)
    return web.page(
        request,
        "overview.html",
        status,
        project=project,
        tab="overview",
        counts=store.counts(project.name),
        people=len(store.people(project.name)),
        disputed=web.web(request).counted(
            "disputed", project.name, lambda: len(store.disputed(project.name))
        ),
        forms=exchange.forms_of(project.task),
        added=added,
        problem=problem,
    )


@router.post("/projects/{project}/items")
def add(request: Request, project: str) -> Response:
    """Add the items of a file."""
    who, store, words = web.person(request), web.store(request), web.translator(request)
    settings = web.project_of(request, project)
    file = web.form(request).get("file")
    if not isinstance(file, UploadFile) or not file.filename:
        return _overview(request, settings, problem=words("problem.file"), status=422)
    try:
        with exchange.kept(file.file, file.filename) as path:
            result = exchange.add(store, project, path, by=who.id)
    except KeelError as error:
        return _overview(request, settings, problem=str(error), status=422)
    return _overview(request, settings, added=words("overview.added", n=result.added, known=result.known))


@router.get("/projects/{project}/all-items")
def items(request: Request, project: str, after: Annotated[int, Query(lt=2**31)] = 0) -> Response:
    """Items by the page, with their sources and the number of their votes."""
    store = web.store(request)
    settings = web.project_of(request, project)
    found = store.items_after(project, max(after, 0), PAGE + 1)
    flags = {flag.item for flag in store.flags(project)}
    rows = [
        {
            "id": item.item,
            "key": item.key,
            "gold": item.gold is not None,
            "flags": item.item in flags,
            "excerpt": render.excerpt(item.prompt),
            "sources": [reply.source or "–" for reply in item.replies],
            "votes": "–"
            if item.gold
            else f"{settings.votes_per_item - item.missing} / {settings.votes_per_item}",
        }
        for item in found[:PAGE]
    ]
    more = rows[-1]["id"] if len(found) > PAGE else None
    return web.page(
        request, "items.html", project=settings, tab="all-items", rows=rows, more=more, first=after <= 0
    )


@router.get("/projects/{project}/all-items/{item}")
def item(request: Request, project: str, item: web.Number) -> Response:
    """One item with its sources and everybody's votes."""
    store, words = web.store(request), web.translator(request)
    settings = web.project_of(request, project)
    found = store.item(project, item)
    return web.page(
        request,
        "item.html",
        project=settings,
        tab="all-items",
        adjudicating=False,
        problem="",
        given={},
        view=request.query_params.get("view", "read"),
        address=f"/projects/{project}/all-items/{item}",
        **parts(settings, found, store.votes_of(project, item), words),
    )


def parts(
    project: Project, item: ItemRow, votes: Sequence[VoteRow], words: Any, *, sources: bool = True
) -> dict[str, Any]:
    """What the page of an item shows of it and of its votes, in the item's own order of replies."""
    return {
        "item": {
            "id": item.item,
            "key": item.key,
            "prompt": item.prompt,
            "gold": said(project, item.gold, None, words) if item.gold and sources else "",
            "sources": [reply.source if sources else None for reply in item.replies],
        },
        "contents": [reply.content for reply in item.replies],
        "votes": [
            {
                "person": vote.person,
                "is_model": vote.is_model,
                "answer": said(project, vote.answer, None, words),
                "comment": vote.answer.comment,
                "when": web.when(vote.at),
                "seconds": "" if vote.seconds is None else f"{vote.seconds:.0f}",
                "counted": vote.counted or vote.is_model or vote.gold is not None,
            }
            for vote in votes
        ],
    }


@router.get("/projects/{project}/export/{form}")
def export(request: Request, project: str, form: str) -> Response:
    """The votes as a file, as it is made."""
    store = web.store(request)
    settings = web.project_of(request, project)
    if form not in exchange.forms_of(settings.task):
        raise HTTPException(404)
    name = f"{project}-{form}.jsonl"
    return StreamingResponse(
        exchange.lines(store, project, form),
        media_type="application/octet-stream",
        headers={"Content-Disposition": f'attachment; filename="{name}"'},
    )
