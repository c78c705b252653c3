"""Disputed items, and a reviewer's word on them. It is recorded beside the votes and replaces none."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from keel.errors import UsageError
from keel.feedback import render, web
from keel.feedback.forms import FormError, answer_of
from keel.feedback.pages.overview import parts
from keel.feedback.wording import said

router = APIRouter()
SHOWN = 100  # items in the queue that are shown


@router.get("/projects/{project}/disputed")
def disputed(request: Request, project: str) -> Response:
    """Items on which people disagree, or that somebody flagged; the most disputed first."""
    store, words = web.store(request), web.translator(request)
    settings = web.project_of(request, project)
    found = store.disputed(project)
    rows = [
        {
            "id": one.item,
            "excerpt": render.excerpt((one.votes[0] if one.votes else store.item(project, one.item)).prompt),
            "why": " · ".join(
                [words("disputed.apart")] * bool(one.dispute)
                + [words("disputed.flag", name=flag.person, reason=flag.reason or "–") for flag in one.flags]
            ),
            "answers": [said(settings, vote.answer, None, words) for vote in one.votes],
        }
        for one in found[:SHOWN]
    ]
    saved = request.query_params.get("saved") == "1"
    return web.page(
        request,
        "disputed.html",
        project=settings,
        tab="disputed",
        rows=rows,
        more=len(found) - len(rows),
        saved=saved,
    )


@router.get("/projects/{project}/disputed/{item}")
def decide_form(request: Request, project: str, item: web.Number) -> Response:
    """One item with its votes, and the form for the reviewer's word. The reviewer is blind to sources too."""
    return _form(request, project, item, {})


@router.post("/projects/{project}/disputed/{item}")
def decide(request: Request, project: str, item: web.Number) -> Response:
    """Record the reviewer's word."""
    who, store, fields = web.person(request), web.store(request), web.fields(request)
    settings = web.project_of(request, project)
    found = store.item(project, item)
    try:
        answer = answer_of(settings, range(len(found.replies)), fields)
        store.adjudicate(project, who.id, item, answer, fields.get("note", "").strip()[:10_000])
    except (FormError, UsageError) as error:
        text = web.translator(request)(error.key) if isinstance(error, FormError) else str(error)
        return _form(request, project, item, fields, text, 422)
    return web.to(f"/projects/{project}/disputed?saved=1")


def _form(
    request: Request, project: str, item: int, given: dict[str, str], problem: str = "", status: int = 200
) -> Response:
    store, words = web.store(request), web.translator(request)
    settings = web.project_of(request, project)
    found = store.item(project, item)
    return web.page(
        request,
        "item.html",
        status,
        project=settings,
        tab="disputed",
        adjudicating=True,
        problem=problem,
        given=given,
        view=request.query_params.get("view", "read"),
        address=f"/projects/{project}/disputed/{item}",
        **parts(settings, found, store.votes_of(project, item), words, sources=False),
    )
