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
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOG = logging.getLogger("keel.label")
LARGEST = 4 * 2**20  # bytes of a request
LARGEST_FILE = 256 * 2**20  # of one that adds items
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


def safe_headers(nonce: str) -> dict[str, str]:
    """The headers that every answer has."""
    return {**HEADERS, "Content-Security-Policy": content_policy(nonce)}


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

    def __init__(
        self,
        app: ASGIApp,
        limit: Limit,
        holder: Callable[[Scope], str | None],
        may_send_files: Callable[[Scope], bool],
        refusal: Callable[[Scope, int, str], Response],
    ) -> None:
        """limit: requests of one person. holder: whose session or token a request bears, if anybody's; others
        are counted by their address. may_send_files: whether an admin asks; who else sends a file is refused
        before it is read. refusal: the answer for a status, by the name of its sentence."""
        self.app, self.limit, self.holder, self.may_send_files = app, limit, holder, may_send_files
        self.refusal = refusal

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
                headers.update(safe_headers(nonce))
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
        if not scope["path"].startswith("/static/"):
            wait = self.limit.wait(self.holder(scope) or address(scope))
            if wait:
                answer = self.refusal(scope, 429, "rate")
                answer.headers["Retry-After"] = str(math.ceil(wait))
                await answer(scope, receive, send)
                return
        length, most = dict(scope["headers"]).get(b"content-length"), LARGEST
        small = length is not None and length.isdigit() and int(length) <= LARGEST
        adds = scope["method"] == "POST" and scope["path"].endswith("/items")
        if adds and not small and await run_in_threadpool(self.may_send_files, scope):
            most = LARGEST_FILE
        if length is not None and (not length.isdigit() or int(length) > most):
            await self.refusal(scope, 413, "large")(scope, receive, send)
            return
        await self.app(scope, _counted(receive, most), send)


def address(scope: Scope) -> str:
    """Where a request comes from."""
    client = scope.get("client")
    return client[0] if client else "?"


def _counted(receive: Receive, most: int) -> Receive:
    """`receive` that refuses a body that is larger than it said, or says nothing of its size."""
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > most:
            raise HTTPException(413)
        return message

    return counted


def logged_path(scope: Scope) -> str:
    """The path for the log, without what would let its reader in: codes of invitations, also at a mistyped
    address, and queries. A path is one line of the log, whatever stands in it."""
    before, join, _ = scope["path"].partition("/join/")
    return "".join(c if c.isprintable() else "\ufffd" for c in f"{before}{join}{'…' * bool(join)}")
