"""The same work for programs: JSON under `/api/`, with a bearer token. `/api/openapi.json` describes it.

Answers name shown positions, as on the pages: "a" is the reply that `next` gave first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response, StreamingResponse

from keel.errors import UsageError
from keel.feedback import render, web
from keel.feedback.forms import SIDES, FormError, answer_of
from keel.feedback.locales import Translator
from keel.votes.answers import scales_of
from keel.votes.kinds import Assignment, NewItem, Project, Reply

MOST_ITEMS = 10_000  # in one request
_ENGLISH = Translator("en")

ProjectName = Annotated[str, Path(max_length=100, description="The project's name.")]
ItemNumber = Annotated[int, Path(ge=1, lt=2**31, description="The item's number.")]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Problem(BaseModel):
    """What is wrong, in one sentence."""

    problem: str


class ProjectOut(BaseModel):
    """A project that the token's owner may see."""

    name: str
    task: str
    title: str
    instructions: str
    examples: str
    allow: list[str]
    strength: bool
    scales: list[dict[str, Any]]


class ItemOut(BaseModel):
    """An item to judge. `replies` stand in the order in which they are shown, without their sources."""

    item: int
    task: str
    prompt: str | list[dict[str, Any]]
    replies: list[str | list[dict[str, Any]]]
    leased_until: float = Field(description="Seconds since 1970; later the item may be given to others.")


class VoteIn(_Body):
    """An answer by shown positions. Which fields it has depends on the project's task."""

    client_id: str = Field(
        min_length=1, max_length=100, description="The same id again is the same vote: retry with it."
    )
    choice: str | None = Field(None, description="Pairwise: a, b, tie, …; thumbs: up, down, cannot_judge.")
    strength: int | None = Field(None, description="With a or b, where the project asks for it: 1, 2 or 3.")
    ratings: dict[str, int] | None = Field(None, description="Scale → number.")
    ranking: list[list[int]] | None = Field(
        None, description="Shown positions from 0, best first, ties in one group."
    )
    text: str | None = Field(None, max_length=1_000_000, description="The edited reply.")
    comment: str = Field("", max_length=10_000)
    seconds: float | None = Field(None, ge=0, le=86_400, description="Time at work.")


class VoteOut(BaseModel):
    """`surplus`: kept, though the item has its votes; `repeated`: this client_id was known."""

    status: Literal["counted", "surplus", "repeated"]
    paused: bool = Field(description="Whether the person is paused now.")


class RequestIn(_Body):
    """A request that is done once, however often it arrives."""

    client_id: str = Field(
        min_length=1, max_length=100, description="The same id again is the same request: retry with it."
    )


class FlagIn(RequestIn):
    """Why an item is flagged."""

    reason: str = Field("", max_length=2000)


class UndoOut(BaseModel):
    """The item whose vote was taken back; null where there was none."""

    item: int | None


class ProgressOut(BaseModel):
    """How far the token's owner has come. The project's counts are for admins: checks are not among them, so
    they would say which items are."""

    model_config = ConfigDict(extra="forbid")
    done: int
    left_for_me: int
    today: int
    pace_per_hour: float
    paused: str | None


class ProjectProgressOut(ProgressOut):
    """How far the token's owner and the project have come."""

    total: int
    wanted: int
    counted: int


class ReplyIn(_Body):
    """A reply to judge, and where it comes from; annotators never see the latter."""

    content: str | list[dict[str, Any]]
    source: str | None = Field(None, max_length=500)


class NewItemIn(_Body):
    """An item to add. The same key again is the same item."""

    key: str = Field(min_length=1, max_length=500)
    prompt: str | list[dict[str, Any]]
    replies: list[ReplyIn] = Field(min_length=1, max_length=20)
    columns: dict[str, Any] = Field(default_factory=dict)
    priority: float | None = Field(None, allow_inf_nan=False)


class AddedOut(BaseModel):
    """How many items were new, and how many were there."""

    added: int
    known: int


_NO: dict[int | str, dict[str, Any]] = {
    401: {"model": Problem, "description": "No bearer token, or one that is not known."},
    403: {"model": Problem, "description": "The token's owner has another role."},
    404: {"model": Problem, "description": "No such project or item, or it is not the token owner's."},
    409: {"model": Problem, "description": "The client_id was used for another item."},
    413: {"model": Problem, "description": "The request is too large."},
    422: {"model": Problem, "description": "The answer does not fit the item."},
    429: {"model": Problem, "description": "Too many requests; Retry-After says for how long."},
    503: {"model": Problem, "description": "The database does not answer; nothing was kept."},
}
router = APIRouter(prefix="", tags=["labelling"], responses=_NO)


def _mine(request: Request, project: str) -> Project:
    return web.project_of(request, project)


@router.get("/api/projects")
def projects(request: Request) -> list[ProjectOut]:
    """The projects that the token's owner may see."""
    return [
        ProjectOut(
            name=p.name,
            task=p.task,
            title=p.title,
            instructions=p.instructions,
            examples=p.examples,
            allow=list(p.allow),
            strength=p.strength,
            scales=[dataclasses.asdict(scale) for scale in scales_of(p)] if p.task == "rating" else [],
        )
        for p in web.store(request).projects(web.person(request).id)
    ]


@router.get("/api/projects/{project}/next", responses={204: {"description": "Nothing is left to do."}})
def next_item(request: Request, project: ProjectName) -> ItemOut:
    """The next item, leased to the token's owner. 204 where none is left."""
    _mine(request, project)
    found = web.store(request).next_item(project, web.person(request).id)
    if found is None:
        return Response(status_code=204)  # type: ignore[return-value]
    return _item_out(found)


def _item_out(found: Assignment) -> ItemOut:
    return ItemOut(
        item=found.item,
        task=found.task,
        prompt=render.blind(found.prompt),
        replies=[render.blind(reply.content) for reply in found.replies],
        leased_until=found.leased_until,
    )


@router.post("/api/projects/{project}/items/{item}/vote")
def vote(request: Request, project: ProjectName, item: ItemNumber, body: VoteIn) -> VoteOut:
    """Judge an item, or change what was said of it."""
    who, store, settings = web.person(request), web.store(request), _mine(request, project)
    found = store.assignment(project, who.id, item)
    try:
        answer = answer_of(settings, found.shown, _fields(settings, len(found.shown), body))
    except FormError as error:
        raise UsageError(_words(settings, error, body)) from None
    cast = store.cast(project, who.id, item, answer, body.client_id, body.seconds)
    return VoteOut(status=cast.status, paused=cast.paused)


def _words(project: Project, error: FormError, body: VoteIn) -> str:
    """What is wrong with an answer, for who writes a program."""
    if error.key == "problem.choice":
        sides = SIDES if project.task == "pairwise" else ("up", "down")
        return f"choice is {body.choice!r}; it is one of {', '.join((*sides, *project.allow))}"
    return _ENGLISH(error.key)


def _fields(project: Project, replies: int, body: VoteIn) -> dict[str, str]:
    """The form's fields that say the same."""
    fields: dict[str, str] = {"comment": body.comment}
    if body.choice is not None:
        fields["choice"] = body.choice if body.strength is None else f"{body.choice}:{body.strength}"
    if body.ratings is not None:
        numbers = {scale.name: number for number, scale in enumerate(scales_of(project))}
        for name, value in body.ratings.items():
            if name not in numbers:
                raise UsageError(f"there is no scale {name!r} in this project; it has {', '.join(numbers)}")
            fields[f"rating-{numbers[name]}"] = str(value)
    given = [position for group in body.ranking or () for position in group]
    if body.ranking is not None and sorted(given) != list(range(replies)):
        raise UsageError(f"ranking has each shown position from 0 to {replies - 1} once")
    for place, group in enumerate(body.ranking or (), 1):
        fields |= {f"place-{position}": str(place) for position in group}
    if body.text is not None:
        fields["text"] = body.text
    return fields


@router.post("/api/projects/{project}/items/{item}/skip", status_code=204)
def skip(request: Request, project: ProjectName, item: ItemNumber, body: RequestIn) -> None:
    """Put an item aside: it comes again when nothing else is left."""
    _mine(request, project)
    web.store(request).skip(project, web.person(request).id, item, client_id=body.client_id)


@router.post("/api/projects/{project}/items/{item}/flag", status_code=204)
def flag(request: Request, project: ProjectName, item: ItemNumber, body: FlagIn) -> None:
    """Say that something is wrong with an item."""
    _mine(request, project)
    web.store(request).flag(
        project, web.person(request).id, item, body.reason.strip(), client_id=body.client_id
    )


@router.post("/api/projects/{project}/undo")
def undo(request: Request, project: ProjectName, body: RequestIn) -> UndoOut:
    """Take the last vote back."""
    _mine(request, project)
    found = web.store(request).undo(project, web.person(request).id, client_id=body.client_id)
    return UndoOut(item=found)


@router.get("/api/projects/{project}/progress")
def progress(request: Request, project: ProjectName) -> ProjectProgressOut | ProgressOut:
    """How far the token's owner has come; for an admin also the project."""
    _mine(request, project)
    who = web.person(request)
    values = dataclasses.asdict(web.store(request).progress(project, who.id))
    if who.role == "admin":
        return ProjectProgressOut(**values)
    return ProgressOut(**{name: values[name] for name in ProgressOut.model_fields})


@router.post("/api/projects/{project}/items")
def add(
    request: Request,
    project: ProjectName,
    body: Annotated[list[NewItemIn], Field(min_length=1, max_length=MOST_ITEMS)],
) -> AddedOut:
    """Add items; ones whose key is there already stay as they are."""
    _mine(request, project)
    items = (
        NewItem(
            one.key,
            one.prompt,
            [Reply(reply.content, reply.source) for reply in one.replies],
            one.columns,
            None,
            one.priority,
        )
        for one in body
    )
    result = web.store(request).add_items(project, items, web.person(request).id)
    return AddedOut(added=result.added, known=result.known)


@router.get(
    "/api/projects/{project}/votes",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/x-ndjson": {}}, "description": "A vote a line."}},
)
def votes(request: Request, project: ProjectName) -> StreamingResponse:
    """Every standing vote as a line of JSON, in the items' own order of replies."""
    from keel.feedback import formats

    _mine(request, project)
    store = web.store(request)

    def lines() -> Iterator[str]:
        for row in store.votes(project):
            yield formats.line_of(dataclasses.asdict(row))

    return StreamingResponse(lines(), media_type="application/x-ndjson")


@router.get("/api/projects/{project}/statistics")
def statistics(request: Request, project: ProjectName) -> dict[str, Any]:
    """The numbers of the statistics page."""
    from keel.feedback import statistics as of

    _mine(request, project)
    store = web.store(request)
    return web.web(request).counted("statistics", project, lambda: of.of_project(store, project))
