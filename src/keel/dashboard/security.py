"""Who may look, and who may stop a run.

On the own machine (the default) every page is for whoever sits there, and only pages of this very address may
ask for anything: a page of another site that the same browser shows reaches neither the runs nor the button.
Bound to another address, a token in the link is asked for besides.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import secrets
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    # plotly.js puts its style sheet into the page, so styles may be inline; scripts may not
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}

_AUTHORITY = re.compile(
    r"(\[[0-9A-Fa-f:.]+\]|[^\s:/?#@\[\]\\]+)(?::\d{1,5})?"
)  # of a Host header: name, port


@dataclass(frozen=True, slots=True)
class Security:
    """The secrets of one server."""

    host: str  # that it is bound to
    port: int
    token: str = ""  # that a link must bring; "" where none is asked for
    csrf: str = field(default_factory=lambda: secrets.token_urlsafe(24))

    @staticmethod
    def of(host: str, port: int) -> Security:
        """A token is asked for on every address but those of the machine itself."""
        return Security(host, port, "" if is_loopback(host) else secrets.token_urlsafe(24))

    @property
    def cookie(self) -> str:
        return f"keel_dashboard_{self.port}"  # a browser does not tell ports apart

    def knows_host(self, header: str) -> bool:
        """Whether a request names this server: another site can make its own name lead here, but not another
        name into the request."""
        if self.token:
            return True
        match = _AUTHORITY.fullmatch(header)
        name = match[1].strip("[]").lower() if match else ""
        return is_loopback(name) or (name != "" and name == self.host.lower())

    def check_origin(self, request: Request) -> None:
        """Refuse what a page of this address did not ask for."""
        origin, host = request.headers.get("origin", ""), request.headers.get("host", "")
        sent = request.headers.get("x-keel-csrf", "")
        same = host != "" and origin in (f"http://{host}", f"https://{host}")
        asked_here = request.headers.get("sec-fetch-site", "same-origin") == "same-origin"
        if not (same and asked_here and hmac.compare_digest(sent.encode(), self.csrf.encode())):
            raise HTTPException(403, "only the dashboard's own page can stop a run: load it again")


def is_loopback(host: str) -> bool:
    """Whether an address leads to the machine itself alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """Turns away who may not look, and puts the security headers on every answer."""

    def __init__(self, app: ASGIApp, security: Security) -> None:
        self.app, self.security = app, security

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        refusal = self._refusal(HTTPConnection(scope))
        await (refusal or self.app)(scope, receive, guarded)

    def _refusal(self, request: HTTPConnection) -> ASGIApp | None:
        if not self.security.knows_host(request.headers.get("host", "")):
            return PlainTextResponse("keel: this address is not the dashboard's own", 421)
        if request.headers.get("sec-fetch-site") == "cross-site" and request.url.path.startswith(
            ("/api/", "/events/")
        ):
            return PlainTextResponse("keel: other sites get nothing here", 403)
        if not self.security.token or self._is_right(request.cookies.get(self.security.cookie, "")):
            return None
        if not self._is_right(request.query_params.get("token", "")):
            return PlainTextResponse(
                "keel: open the link that `keel dashboard` printed; it holds a token", 401
            )
        rest = [(k, v) for k, v in parse_qsl(request.url.query) if k != "token"]
        answer = RedirectResponse(request.url.path + (f"?{urlencode(rest)}" if rest else ""), 303)
        answer.set_cookie(self.security.cookie, self.security.token, httponly=True, samesite="lax")
        return answer

    def _is_right(self, token: str) -> bool:
        return hmac.compare_digest(token.encode("utf-8", "replace"), self.security.token.encode())
