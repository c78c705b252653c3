"""Who is asking: the signed session cookie of a page, the bearer token of a program, CSRF tokens of forms.

Sessions, invitations and API tokens live in the store, hashed. The cookie holds a session's token, signed, so
that a made-up one never reaches the database. A visitor who has not signed in has a cookie of its own, to
which the CSRF tokens of the join page and of the preferences are bound.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections import OrderedDict

from itsdangerous import BadSignature, Signer
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import Scope

SESSION = "keel_label"
VISITOR = "keel_label_visitor"
SESSION_DAYS = 30
MOST_TOKENS = 10_000  # that are remembered, the newest


class Auth:
    """Signs and checks. `secret` is kept in the database, so that a restart signs nobody out."""

    def __init__(self, secret: bytes) -> None:
        self._signer = Signer(secret, salt="keel.label.session", digest_method=hashlib.sha256)
        self._known: OrderedDict[str, None] = OrderedDict()  # tokens of programs that were somebody's
        self._csrf_key = hmac.digest(secret, b"keel.label.csrf", "sha256")

    def session(self, connection: HTTPConnection) -> str | None:
        """The session token of the cookie; None where there is none, or it was not signed here."""
        cookie = connection.cookies.get(SESSION)
        if not cookie or len(cookie) > 500:
            return None
        try:
            return self._signer.unsign(cookie).decode()
        except (BadSignature, UnicodeDecodeError):
            return None

    def holder(self, scope: Scope) -> str | None:
        """Whose request this is, for counting: a session that was signed here, or a token that was somebody's
        before. A made-up one counts for its address: else each would have a limit of its own."""
        connection = HTTPConnection(scope)
        token = bearer(connection)
        return self.session(connection) or (token if token in self._known else None)

    def met(self, token: str) -> None:
        """Remember that a token is somebody's."""
        self._known[token] = None
        while len(self._known) > MOST_TOKENS:
            self._known.popitem(last=False)

    def csrf(self, holder: str) -> str:
        """The CSRF token of a session or a visitor."""
        return hmac.digest(self._csrf_key, holder.encode(), "sha256").hex()

    def holds(self, holder: str, token: object) -> bool:
        """Whether `token` is the CSRF token of this session or visitor."""
        return isinstance(token, str) and hmac.compare_digest(self.csrf(holder).encode(), token.encode())

    def remember(self, response: Response, token: str, *, secure: bool) -> None:
        """Set the session cookie."""
        response.set_cookie(
            SESSION,
            self._signer.sign(token).decode(),
            max_age=SESSION_DAYS * 86400,
            httponly=True,
            samesite="lax",
            secure=secure,
        )


def bearer(connection: HTTPConnection) -> str | None:
    """The token of an `Authorization: Bearer` header."""
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" and len(token) < 500 else None


def new_visitor() -> str:
    """A name for somebody who has not signed in."""
    return secrets.token_urlsafe(18)


def from_here(connection: HTTPConnection, own: str | None) -> bool:
    """Whether a form was sent by a page of this server, as far as the browser says. own: the address that
    people use, where a proxy hides it."""
    origin = connection.headers.get("origin")
    if origin is None:
        return connection.headers.get("sec-fetch-site", "same-origin") in ("same-origin", "none")
    return origin.partition("://")[2] == connection.headers.get("host", "") or origin == own
