"""What surrounds every answer: limits on size and rate, security headers, a log without secrets.

Plain ASGI, so that nothing is buffered. A nonce is drawn for each request; only scripts that bear it run.
"""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOG = logging.getLogger("keel.label")
LARGEST = 64 * 2**20  # bytes of a request: a file of pairs that an admin adds
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}


def content_policy(nonce: str) -> str:
    """The Content-Security-Policy: own styles and pictures, scripts by nonce, forms to here, no frames."""
    return (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    )


@dataclass
class Limit:
    """Token buckets by key: `rate` requests a second on the long run, `burst` at once. Kept in memory; the
    keys that were seen longest ago are forgotten."""

    rate: float
    burst: float
    most_keys: int = 20_000
    _buckets: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def wait(self, key: str, now: float | None = None) -> float:
        """Take one token. Seconds until there is one; 0 where it was taken."""
        now = time.monotonic() if now is None else now
        with self._lock:
            left, at = self._buckets.pop(key, (self.burst, now))
            left = min(self.burst, left + (now - at) * self.rate)
            missing = max(0.0, 1 - left)
            self._buckets[key] = (left if missing else left - 1, now)
            while len(self._buckets) > self.most_keys:
                self._buckets.popitem(last=False)
        return missing / self.rate


class Wire:
    """The outermost layer of the app."""

    def __init__(self, app: ASGIApp, limit: Limit, cookie: str) -> None:
        """limit: requests by session cookie, else by address."""
        self.app, self.limit, self.cookie = app, limit, cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        nonce, begun, status = secrets.token_urlsafe(16), time.perf_counter(), 0
        scope.setdefault("state", {})["nonce"] = nonce

        async def headed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers["Content-Security-Policy"] = content_policy(nonce)
                if not scope["path"].startswith("/static/"):
                    headers["Cache-Control"] = "no-store"
                if scope["scheme"] == "https":
                    headers["Strict-Transport-Security"] = "max-age=31536000"
            await send(message)

        try:
            await self._limited(scope, receive, headed)
        finally:
            LOG.info(
                "%s %s %d %.0f ms",
                scope["method"],
                logged_path(scope),
                status,
                (time.perf_counter() - begun) * 1e3,
            )

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > LARGEST:
            await PlainTextResponse("This request is too large.", 413)(scope, receive, send)
            return
        if not scope["path"].startswith("/static/"):
            wait = self.limit.wait(self._key(scope, headers))
            if wait:
                answer = PlainTextResponse("Too many requests; wait a moment.", 429)
                answer.headers["Retry-After"] = str(math.ceil(wait))
                await answer(scope, receive, send)
                return
        await self.app(scope, _counted(receive), send)

    def _key(self, scope: Scope, headers: dict[bytes, bytes]) -> str:
        for part in headers.get(b"cookie", b"").decode("latin-1").split(";"):
            name, _, value = part.strip().partition("=")
            if name == self.cookie and value:
                return value
        if bearer := headers.get(b"authorization"):
            return bearer.decode("latin-1")
        return address(scope)


def address(scope: Scope) -> str:
    """Where a request comes from."""
    client = scope.get("client")
    return client[0] if client else "?"


def _counted(receive: Receive) -> Receive:
    """`receive` that ends a body that is larger than it said, or says nothing of its size."""
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        return {"type": "http.disconnect"} if seen > LARGEST else message

    return counted


def logged_path(scope: Scope) -> str:
    """The path for the log: of a route with a code in it its pattern; never a query."""
    route: Any = scope.get("route")
    path = getattr(route, "path", "") if scope["path"].startswith("/join/") else scope["path"]
    return path or "/join/…"
