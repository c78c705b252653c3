"""What every handler needs: the store, who is asking, the templates; and how an error looks."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast
from urllib.parse import urlsplit

import jinja2
from fastapi import HTTPException, Request
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from markupsafe import Markup
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.requests import HTTPConnection
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import Scope

import keel
from keel.errors import KeelError
from keel.feedback import difference, locales, render
from keel.feedback.access import ACCESS
from keel.feedback.auth import VISITOR, Auth, bearer, from_here, new_visitor
from keel.feedback.forms import letter
from keel.feedback.wire import LOG, Limit, address, safe_headers
from keel.votes.answers import scales_of
from keel.votes.kinds import Person, Project
from keel.votes.store import Store

T = TypeVar("T")
HERE = Path(__file__).parent
THEMES = ("light", "dark")
YEAR = 365 * 86400
Number = Annotated[int, InPath(ge=0, lt=2**31)]  # of an item or a person: a larger one is nobody's


class NotSignedIn(Exception):
    """Nobody is signed in, and the page is not for everybody."""


@dataclass
class Web:
    """The server's own state: one store for all threads."""

    store: Store
    auth: Auth
    url: str | None = None  # https://label.example.org, where a proxy stands before the server
    # codes and tokens that were wrong, by address: guessing one takes longer than the sun will shine
    wrong: Limit = field(default_factory=lambda: Limit(rate=0.2, burst=20))
    templates: jinja2.Environment = field(default_factory=lambda: _environment())
    _counted: dict[tuple[str, str], tuple[object, Any]] = field(default_factory=dict)
    _refusals: dict[tuple[str, str | None, str], str] = field(default_factory=dict)

    def counted(self, what: str, project: str, count: Callable[[], T]) -> T:
        """What is counted over all votes of a project, kept until a vote, a flag, an item or a word of a
        reviewer changes."""
        state = (self.store.revision(project), len(self.store.flags(project)))
        kept = self._counted.get((what, project))
        if kept is None or kept[0] != state:
            kept = self._counted[what, project] = (state, count())
        return cast(T, kept[1])

    def refusal_page(self, language: str, theme: str | None, key: str) -> str:
        """A page without forms, for who is refused before it is known who asks. Made once: refusing is
        cheap."""
        found = self._refusals.get((language, theme, key))
        if found is None:
            template = self.templates.get_template("refused.html")
            words = locales.Translator(language)
            found = self._refusals[language, theme, key] = template.render(_=words, theme=theme, key=key)
        return found


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sorted((HERE / "static").iterdir())))
    environment.globals |= {
        "version": digest.hexdigest()[:10],
        "keel_version": keel.__version__,
        "languages": locales.LANGUAGES,
        "markdown": render.markdown,
        "turns": render.turns,
        "raw": render.raw,
        "plain": render.plain,
        "marked": lambda one, other: difference.marked(render.plain(one), render.plain(other)),
        "letter": letter,
        "scales": scales_of,
    }
    return environment


def web(request: Request) -> Web:
    """The server's state."""
    return cast(Web, request.app.state.web)


def store(request: Request) -> Store:
    """The database of votes."""
    return web(request).store


def person(request: Request) -> Person:
    """Who is signed in. NotSignedIn where nobody is."""
    found: Person | None = request.state.person
    if found is None:
        raise NotSignedIn
    return found


def project_of(request: Request, name: str) -> Project:
    """A project's settings. NotFoundError where there is none, and where it is not for this person."""
    return store(request).project_for(name, person(request).id)


def translator(request: HTTPConnection) -> locales.Translator:
    """Words in the language that the person chose, else the browser's."""
    accept = request.headers.get("accept-language", "")
    return locales.Translator(locales.best(accept, request.cookies.get("keel_label_language")))


def theme_of(request: HTTPConnection) -> str | None:
    """The theme that the person chose; None for the system's."""
    theme = request.cookies.get("keel_label_theme")
    return theme if theme in THEMES else None


# ---------------------------------------------------------------- who may enter


async def enter(request: Request) -> None:
    """Before every handler: who asks, whether the table of access lets them, whether a form is our own."""
    path = request.scope["route"].path
    allowed = ACCESS.get(f"{request.method} {path}", frozenset())
    api = path.startswith("/api/")
    request.state.person = None
    request.state.session = None
    if api:
        await run_in_threadpool(_enter_by_token, request)
    else:
        await run_in_threadpool(_enter_by_cookie, request)
    who: Person | None = request.state.person
    if who is None and "nobody" not in allowed:
        raise NotSignedIn
    if who is not None and who.role not in allowed:
        raise HTTPException(403)
    if request.method == "POST" and not api:
        await _own_form(request)


def _enter_by_cookie(request: Request) -> None:
    state = web(request)
    token = state.auth.session(request)
    if token is not None:
        request.state.person = state.store.session(token)
        request.state.session = token if request.state.person else None


def _enter_by_token(request: Request) -> None:
    token = bearer(request)
    if token is None:
        return
    state = web(request)
    request.state.person = state.store.person_of_token(token)
    if request.state.person is not None:
        state.auth.met(token)
    elif state.wrong.wait(address(request.scope)):
        raise HTTPException(429)


async def _own_form(request: Request) -> None:
    form = await request.form(max_files=1, max_fields=200)
    if not from_here(request, web(request).url) or not web(request).auth.holds(
        _holder(request), form.get("csrf")
    ):
        raise HTTPException(403, "csrf")
    request.state.form = form


def _holder(request: Request) -> str:
    """What a form's CSRF token is bound to: the session, else the visitor."""
    if request.state.session:
        return "session:" + request.state.session
    visitor = getattr(request.state, "visitor", None) or request.cookies.get(VISITOR)
    if not visitor:
        visitor = request.state.visitor = new_visitor()
        request.state.new_visitor = True
    return "visitor:" + visitor


def form(request: Request) -> FormData:
    """The form that was sent, its CSRF token checked."""
    return cast(FormData, request.state.form)


def fields(request: Request) -> dict[str, str]:
    """The form's texts."""
    return {key: value for key, value in form(request).items() if isinstance(value, str)}


# ---------------------------------------------------------------- answers


def page(request: Request, template: str, status: int = 200, **values: Any) -> Response:
    """A page in the person's language and theme."""
    state = web(request)
    who: Person | None = getattr(request.state, "person", None)
    request.state.session = getattr(request.state, "session", None)
    token = state.auth.csrf(_holder(request))
    project: Project | None = values.get("project")
    context = {
        "_": translator(request),
        "person": who,
        "tab": "",
        "tabs": tabs(who) if project and who else (),
        "theme": theme_of(request),
        "nonce": request.state.nonce,
        "back": _back(request),
        "csrf": partial(Markup('<input type="hidden" name="csrf" value="{}">').format, token),
        "project": None,
        **values,
    }
    text = state.templates.get_template(template).render(context)
    response = HTMLResponse(render.without_surrogates(text), status)
    if getattr(request.state, "new_visitor", False):
        response.set_cookie(
            VISITOR,
            request.state.visitor,
            max_age=86400,
            httponly=True,
            samesite="lax",
            secure=secure(request),
        )
    return response


def _back(request: Request) -> str:
    """The page to come back to after a change of language: this one, where it can be asked for again."""
    if request.method != "GET" or request.url.path.startswith("/join/"):
        return request.url.path if request.url.path.startswith("/join/") else "/"
    return request.url.path + (f"?{request.url.query}" if request.url.query else "")


def tabs(who: Person) -> list[tuple[str, str]]:
    """(name, path) of the pages of a project that this person may see."""
    every = ("work", "history", "overview", "all-items", "disputed", "statistics", "people", "settings")
    return [(name, name) for name in every if who.role in ACCESS[f"GET /projects/{{project}}/{name}"]]


def secure(request: Request) -> bool:
    """Whether cookies may travel by https only."""
    return request.url.scheme == "https" or (web(request).url or "").startswith("https:")


def link(request: Request, code: str) -> str:
    """The address at which an invitation's code is used."""
    return f"{web(request).url or str(request.base_url).rstrip('/')}/join/{code}"


def to(path: str) -> Response:
    """Go and get another page."""
    return RedirectResponse(path, 303)


def local(path: str) -> str:
    """A path of this server; "/" for anything else."""
    parts = urlsplit(path)
    own = (
        path.startswith("/") and not path.startswith(("//", "/\\")) and not parts.scheme and not parts.netloc
    )
    return path if own and path.isprintable() else "/"


def when(at: float) -> str:
    """A time as people read it, in the server's time zone."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


# ---------------------------------------------------------------- errors


def wants_json(request: HTTPConnection) -> bool:
    """Whether a program asks, or a page's script."""
    return request.url.path.startswith("/api/") or request.headers.get("accept", "") == "application/json"


def refusal(state: Web, scope: Scope, status: int, key: str) -> Response:
    """An answer to who is refused before it is known who asks."""
    request = HTTPConnection(scope)
    words = translator(request)
    if wants_json(request):
        return JSONResponse({"problem": words(f"error.{key}_text")}, status)
    return HTMLResponse(state.refusal_page(words.language, theme_of(request), key), status)


def problem(request: Request, status: int, key: str, text: str | None = None) -> Response:
    """An error as a page, or as JSON for a program."""
    words = translator(request)
    text = text or words(f"error.{key}_text")
    if wants_json(request):
        return JSONResponse({"problem": text}, status)
    return page(
        request, "entry.html", status, kind="error", heading=words(f"error.{key}"), text=text, problem=""
    )


def not_signed_in(request: Request, error: Exception) -> Response:
    """401 for programs; the page that says how to sign in for people."""
    if request.url.path.startswith("/api/"):
        return JSONResponse({"problem": "a bearer token is needed"}, 401, {"WWW-Authenticate": "Bearer"})
    if request.method == "GET":
        return to("/sign-in")
    return problem(request, 401, "signed_out")


def http_error(request: Request, error: Exception) -> Response:
    """404, 403, 405 and their kin."""
    status = getattr(error, "status_code", 500)
    key = {403: "forbidden", 404: "missing", 413: "large", 429: "rate"}.get(status, "bad")
    if status == 403 and getattr(error, "detail", "") == "csrf":
        key = "csrf"
    response = problem(request, status, key)
    for name, value in (getattr(error, "headers", None) or {}).items():
        response.headers[name] = value
    return response


def not_found(request: Request, error: Exception) -> Response:
    """No such project, item or person, or it is not for this person's eyes: the same answer."""
    return problem(request, 404, "missing")


def conflict(request: Request, error: Exception) -> Response:
    """What was sent bears a name or an id that belongs to something else."""
    return problem(request, 409, "conflict", str(error) if request.url.path.startswith("/api/") else None)


def gone(request: Request, error: Exception) -> Response:
    """An invitation that can no longer be used."""
    return problem(request, 410, "gone")


def usage_error(request: Request, error: Exception) -> Response:
    """What was asked for cannot be done; the message says why."""
    assert isinstance(error, KeelError)
    return problem(request, 422, "bad", str(error))


def not_valid(request: Request, error: Exception) -> Response:
    """A path or a body of another form than is described."""
    assert isinstance(error, RequestValidationError)
    api = request.url.path.startswith("/api/")
    if any(part["loc"][0] == "path" for part in error.errors()):
        return problem(request, 404, "missing")
    if not api:
        return problem(request, 400, "bad")
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return problem(request, 422, "bad", f"{place}: {first['msg']}")


def no_store(request: Request, error: Exception) -> Response:
    """The database does not answer, or its disk is full. Nothing was kept; the page's script tries again. The
    log says more: the error may name paths and hosts."""
    LOG.error("%s", error)
    response = problem(request, 503, "store")
    response.headers["Retry-After"] = "2"
    return response


def failed(request: Request, error: Exception) -> Response:
    """A fault of keel's own: the log has it, the page says that nothing else is known."""
    response = problem(request, 500, "failed")
    response.headers.update(safe_headers(request.state.nonce))  # it goes past the layer that sets them
    return response
