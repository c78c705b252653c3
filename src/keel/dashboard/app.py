"""The pages, and what they ask for."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import jinja2
import plotly
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

import keel
from keel.dashboard import live
from keel.dashboard.keel_run import Stage
from keel.dashboard.live import CompareFeed, Event, ListFeed, Positions, RunFeed
from keel.dashboard.reduce import Points, as_json, within
from keel.dashboard.runs import METRICS, QUANTITIES, TIMES, OpenRun, Runs
from keel.dashboard.samples import groups, page
from keel.dashboard.security import Guard, Security

LOOK = 0.5  # seconds between two looks at the files of a page that is open
FRESH = 0.4  # seconds in which what one page has looked at will do for the others
MOST_PAGES = 64  # that are open at a time
COME_BACK = 10  # seconds after which a page for which there was no room asks again
KEEP_ALIVE = 20.0  # seconds after which an idle connection says that it is there
WARM_UP_ENDS = 30.0  # seconds in which the file that is being read ahead is waited for at the end
MOST_COMPARED = 300  # runs in one picture

_HERE = Path(__file__).parent
_REPORT = _HERE.parent / "report"
_STATIC: Mapping[str, Path] = {
    "page.css": _REPORT / "page.css",
    "figures.js": _REPORT / "figures.js",
    "plotly.min.js": Path(plotly.__file__).parent / "package_data" / "plotly.min.js",
    **{path.name: path for path in (_HERE / "static").iterdir() if path.suffix in (".css", ".js")},
}
_TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"}


class Feed(Protocol):
    """Says what is new."""

    positions: Any

    def poll(self) -> list[Event]: ...


class Stream(StreamingResponse):
    """Events, until the page is closed."""

    def __init__(self, events: AsyncIterator[bytes], closed: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._closed = closed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._closed()


class Dashboard:
    """The answers to what a browser asks, of one folder of runs. most_pages: that are open at a time."""

    def __init__(
        self, runs: Runs, security: Security, ended: Callable[[], bool], alone: bool, most_pages: int
    ) -> None:
        self.runs, self.security, self.ended, self.alone = runs, security, ended, alone
        self.most_pages, self._open_pages = most_pages, 0
        self._pages = jinja2.Environment(
            loader=jinja2.FileSystemLoader(_HERE / "templates"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )

    # ------------------------------------------------------------ pages

    def _page(self, template: str, status: int = 200, **values: Any) -> Response:
        text = self._pages.get_template(template).render(
            **values, version=keel.__version__, csrf=self.security.csrf, folder=str(self.runs.folder),
            alone=self.alone,
        )  # fmt: skip
        return HTMLResponse(text.encode("utf-8", "replace"), status)

    async def home(self, request: Request) -> Response:
        """The list of runs; where the folder is itself a run, that run."""
        if self.alone:
            return await self.run(request)
        return self._page("runs.html", quantities=QUANTITIES)

    async def run(self, request: Request) -> Response:
        """One run."""
        run = await self._run(request) if "run" in request.query_params or not self.alone else None
        if self.alone and run is None:
            found = await run_in_threadpool(self.runs.all)
            run = found[0] if found else None
        if run is None:
            return self._page("waiting.html")
        return self._page("run.html", name=run.name, format=run.place.format)

    async def compare(self, request: Request) -> Response:
        """Several runs in one picture a quantity."""
        return self._page("compare.html", quantities=QUANTITIES)

    async def broken(self, request: Request, error: Exception) -> Response:
        """What there is not, said on a page or, to a script, as JSON."""
        status = error.status_code if isinstance(error, HTTPException) else 500
        detail = error.detail if isinstance(error, HTTPException) else "something went wrong here"
        if request.url.path.startswith(("/api/", "/events/")):
            return answer({"error": detail}, status)
        return self._page("broken.html", status, detail=detail)

    async def static(self, request: Request) -> Response:
        """A script or a style of the pages; nothing else is ever sent from the disk as it is."""
        path = _STATIC.get(request.path_params["name"])
        if path is None:
            raise HTTPException(404, "there is no such file")
        return FileResponse(path, media_type=_TYPES[path.suffix], headers={"Cache-Control": "no-cache"})

    # ------------------------------------------------------------ what scripts ask for

    async def _run(self, request: Request) -> OpenRun:
        name = request.query_params.get("run", "")
        run = await run_in_threadpool(self.runs.get, name)
        if run is None:
            raise HTTPException(404, f"there is no run called {name[:200]!r} in this folder")
        return run

    async def series(self, request: Request) -> Response:
        """Curves of one stage between two steps, in as many points as a screen shows."""
        run, asked = await self._run(request), request.query_params
        file = TIMES if asked.get("file") == TIMES else METRICS
        names = asked.getlist("name")[:100]
        low, high = (_number(asked.get(end)) for end in ("low", "high"))

        def read() -> dict[str, Any]:
            with run.lock:
                table = run.table(_stage(run, asked.get("stage", "")), file)
                curves = {name: within(Points(*table.points(name)), low, high) for name in names}
                return {name: as_json(points, live.MOST) for name, points in curves.items()}

        return answer({"series": await run_in_threadpool(read)})

    async def compared(self, request: Request) -> Response:
        """Curves of several runs between two steps."""
        runs, quantities, bands = await self._asked(request)
        low, high = (_number(request.query_params.get(end)) for end in ("low", "high"))
        most = max(min(live.MOST_TOGETHER // max(len(runs), 1), live.MOST), 60)

        def read() -> dict[str, Any]:
            lines = [line for run in runs if (line := live.line_of(run, quantities)) is not None]
            grouped = live.by_group(lines) if bands else {}
            in_bands = [line.run.name for group in grouped.values() for line in group]
            curves: dict[str, Any] = {}
            middle = len(lines) <= live.SMOOTHED
            for line in lines:
                if line.run.name in in_bands:
                    continue
                with line.run.lock:
                    table = line.run.table(line.stage)
                    curves[line.run.name] = {
                        quantity: as_json(
                            within(Points(*table.points(metric)), low, high), most, middle=middle
                        )
                        for quantity, metric in line.metrics.items()
                    }
            bands_of = {
                name: {q: live.band_of(group, q, low, high) for q in quantities}
                for name, group in grouped.items()
            }
            return {"lines": curves, "bands": bands_of}

        return answer(await run_in_threadpool(read))

    async def _asked(self, request: Request) -> tuple[list[OpenRun], list[str], bool]:
        asked = request.query_params
        found = await run_in_threadpool(self.runs.all)
        names = asked.getlist("run")
        chosen = [run for run in found if not names or run.name in names][:MOST_COMPARED]
        quantities = [q[:200] for q in asked.getlist("q")[:30]] or list(QUANTITIES)
        return chosen, quantities, asked.get("seeds") == "bands"

    async def run_names(self, request: Request) -> Response:
        """The names of all runs."""
        return answer({"runs": [run.name for run in await run_in_threadpool(self.runs.all)]})

    async def names(self, request: Request) -> Response:
        """Every metric that the runs have."""
        runs, _, _ = await self._asked(request)

        def read() -> list[str]:
            found: set[str] = set()
            for run in runs:
                with run.lock:
                    for stage in run.facts().stages:
                        found.update(run.table(stage).columns)
            return sorted(found)

        return answer({"names": await run_in_threadpool(read)})

    async def samples(self, request: Request) -> Response:
        """A page of replies of one step or model, each beside another's."""
        run, asked = await self._run(request), request.query_params
        first = max(int(_number(asked.get("first")) or 0), 0)
        other = asked.get("beside_run")
        second = run if not other else await run_in_threadpool(self.runs.get, other)
        if second is None:
            raise HTTPException(404, "there is no such run")

        def read() -> dict[str, Any]:
            with run.lock:
                left = run.samples(_stage(run, asked.get("stage", "")))
            beside = asked.get("beside")
            right = None
            if beside:
                with second.lock:
                    right = second.samples(
                        _stage(second, asked.get("beside_stage") or asked.get("stage", ""))
                    )
            return page(left, right, asked.get("of", ""), beside, first)

        return answer(await run_in_threadpool(read))

    async def stages(self, request: Request) -> Response:
        """The stages of a run that kept replies, with their steps or models, for laying another run's
        beside them."""
        run = await self._run(request)

        def read() -> list[dict[str, Any]]:
            with run.lock:
                return [
                    {"name": stage.name, "samples": [[group.name, group.count] for group in kept]}
                    for stage in run.facts().stages
                    if (kept := groups(run.samples(stage)))
                ]

        return answer({"stages": await run_in_threadpool(read)})

    async def pictures(self, request: Request) -> Response:
        """The pictures of a run's evaluations."""
        return answer(await run_in_threadpool(live.drawn, await self._run(request)))

    async def stop(self, request: Request) -> Response:
        """End a run as Ctrl-C does. The one thing that changes anything."""
        self.security.check_origin(request)
        try:
            body = json.loads(await request.body())
            name = body["run"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise HTTPException(400, 'say which run: {"run": NAME}') from None
        run = await run_in_threadpool(self.runs.get, str(name))
        if run is None:
            raise HTTPException(404, "there is no such run in this folder")
        pid = await run_in_threadpool(run.stop)
        if pid is None:
            raise HTTPException(409, "nothing runs there now: it has ended, or runs on another machine")
        return answer({"stopped": run.name})

    # ------------------------------------------------------------ events

    async def list_events(self, request: Request) -> Response:
        """The list of runs, and every change of it."""
        return self._stream(ListFeed(self.runs))

    async def run_events(self, request: Request) -> Response:
        """A run's state and the curves of one stage, and everything that is new of them."""
        stage = request.query_params.get("stage")
        return self._stream(RunFeed(await self._run(request), stage, _positions(request)))

    async def compare_events(self, request: Request) -> Response:
        """Curves of several runs, and every new point."""
        runs, quantities, bands = await self._asked(request)
        return self._stream(CompareFeed(runs, quantities, bands, _positions(request)))

    def _stream(self, feed: Feed) -> Response:
        if self._open_pages >= self.most_pages:
            said = f"{self.most_pages} pages are open already: close one, or give keel dashboard --most-pages"
            return answer({"error": said}, 503, {"Retry-After": str(COME_BACK)})
        self._open_pages += 1  # on the loop's one thread
        return Stream(self._events(feed), self._closed)

    def _closed(self) -> None:
        self._open_pages -= 1

    async def _events(self, feed: Feed) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        yield b"retry: 1000\n\n"
        spoke = loop.time()
        while not self.ended():
            events = await run_in_threadpool(feed.poll)
            for event in events:
                text = f"event: {event.name}\nid: {feed.positions}\ndata: {dumped(event.data)}\n\n"
                yield text.encode("utf-8", "replace")
            if events:
                spoke = loop.time()
            elif loop.time() - spoke > KEEP_ALIVE:
                spoke = loop.time()
                yield b": here\n\n"
            await asyncio.sleep(LOOK)


def dumped(value: object) -> str:
    """JSON without needless spaces."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def answer(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer in JSON."""
    return Response(
        dumped(value).encode("utf-8", "replace"),
        status,
        {"Cache-Control": "no-store", **(headers or {})},
        media_type="application/json",
    )


def _stage(run: OpenRun, name: str) -> Stage:
    stage = next((one for one in run.facts().stages if one.name == name), None)
    if stage is None:
        raise HTTPException(404, "there is no such stage in this run")
    return stage


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text else None
    except ValueError:
        return None
    return value if value is not None and abs(value) < 1e15 else None


def _positions(request: Request) -> Positions:
    """Where the reader was: a browser that was cut off says so itself, a page that was hidden by address."""
    return Positions(request.headers.get("last-event-id") or request.query_params.get("position", ""))


def application(
    folder: Path,
    security: Security,
    *,
    ended: Callable[[], bool] = lambda: False,
    alone: bool = False,
    warm_up: bool = True,
    most_pages: int = MOST_PAGES,
) -> Starlette:
    """The dashboard of a folder of runs as an ASGI application. alone: the folder is one run, or will be.
    most_pages: that may be open at a time; further ones are told to come back."""
    runs = Runs(folder, FRESH)
    site = Dashboard(runs, security, ended, alone, most_pages)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        closing = threading.Event()
        warming = threading.Thread(
            target=runs.warm_up, args=(lambda: closing.is_set() or ended(),), daemon=True
        )
        if warm_up:
            warming.start()
        yield
        closing.set()
        if warm_up:  # a thread that Python's end meets inside Arrow takes the whole process down with a dump
            await run_in_threadpool(warming.join, WARM_UP_ENDS)

    gets = {
        "/": site.home,
        "/run": site.run,
        "/compare": site.compare,
        "/static/{name}": site.static,
        "/api/series": site.series,
        "/api/compare": site.compared,
        "/api/names": site.names,
        "/api/runs": site.run_names,
        "/api/samples": site.samples,
        "/api/stages": site.stages,
        "/api/pictures": site.pictures,
        "/events/list": site.list_events,
        "/events/run": site.run_events,
        "/events/compare": site.compare_events,
    }
    app = Starlette(
        routes=[
            *(Route(path, endpoint, methods=["GET"]) for path, endpoint in gets.items()),
            Route("/api/stop", site.stop, methods=["POST"]),
        ],
        exception_handlers={HTTPException: site.broken, Exception: site.broken},
        lifespan=lifespan,
    )
    app.add_middleware(Guard, security=security)
    return app
