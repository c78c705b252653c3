"""The app: its routes, what stands around them, how errors look."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, cast

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

import keel
from keel.errors import KeelError, UsageError
from keel.feedback import api, web
from keel.feedback.auth import Auth, bearer
from keel.feedback.pages import entry, numbers, overview, people, review, settings, work
from keel.feedback.wire import Limit, Wire
from keel.votes.database import StoreError
from keel.votes.kinds import GoneError, NotFoundError, TakenError, UsedError
from keel.votes.store import Store

RATE, BURST = 50.0, 150.0  # requests a second of one person, and at once
_QUIET: Any = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}


def create_app(store: Store, *, rate: float = RATE, burst: float = BURST, url: str | None = None) -> FastAPI:
    """The labelling app on an open store. It asks no other host for anything, and sends nothing to any.

    rate, burst: requests a second of one person, and at once. url: the address that people use, where a proxy
    stands before the server."""
    app = FastAPI(
        title="keel label",
        version=keel.__version__,
        docs_url=None,  # FastAPI's own pages ask other hosts for their scripts
        redoc_url=None,
        openapi_url=None,
        dependencies=[Depends(web.enter)],
        telemetry=_QUIET,
    )
    auth = Auth(store.secret())
    app.state.web = state = web.Web(store, auth, url.rstrip("/") if url else None)
    for part in (entry, work, overview, review, people, settings, numbers):
        app.include_router(part.router, include_in_schema=False)
    app.include_router(api.router)
    app.get("/api/openapi.json", include_in_schema=False)(_openapi)
    app.mount("/static", StaticFiles(directory=web.HERE / "static"))
    _handle_errors(app)
    app.add_middleware(
        cast(Any, Wire),
        limit=Limit(rate, burst),
        holder=auth.holder,
        may_send_files=_asks_an_admin(store, auth),
        refusal=partial(web.refusal, state),
    )
    return app


def _asks_an_admin(store: Store, auth: Auth) -> Callable[[Scope], bool]:
    """Whether a request is an admin's, by its cookie or its token, before anything of it is read."""

    def asks(scope: Scope) -> bool:
        connection = HTTPConnection(scope)
        session, token = auth.session(connection), bearer(connection)
        try:
            who = (store.session(session) if session else None) or (
                store.person_of_token(token) if token else None
            )
        except KeelError:  # the database does not answer: the handler says so
            return False
        return who is not None and who.role == "admin"

    return asks


def _openapi(request: Request) -> Response:
    """What `/api/` offers, as an OpenAPI document."""
    document = dict(request.app.openapi())
    document.setdefault("components", {}).setdefault("securitySchemes", {})["token"] = {
        "type": "http", "scheme": "bearer", "description": "A token from the account page.",
    }  # fmt: skip
    document["security"] = [{"token": []}]
    return JSONResponse(document)


def _handle_errors(app: FastAPI) -> None:
    handlers: dict[type[Exception], Callable[[Request, Exception], Response | Awaitable[Response]]] = {
        web.NotSignedIn: web.not_signed_in,
        NotFoundError: web.not_found,
        UsedError: web.conflict,
        TakenError: web.conflict,
        GoneError: web.gone,
        UsageError: web.usage_error,
        KeelError: web.usage_error,
        StoreError: web.no_store,
        StarletteHTTPException: web.http_error,
        HTTPException: web.http_error,
        RequestValidationError: web.not_valid,
        Exception: web.failed,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
