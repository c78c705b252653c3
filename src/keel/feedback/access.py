"""Who may do what: one line for each endpoint. What is not written here is refused, to everybody.

The table in `docs/labelling.md` says the same; a test compares them, and walks every route with every role.
"""

from __future__ import annotations

from typing import Final

ANYONE: Final = frozenset({"nobody", "annotator", "viewer", "admin"})  # signed in or not
SIGNED_IN: Final = frozenset({"annotator", "viewer", "admin"})
WORKS: Final = frozenset({"annotator", "admin"})
READS: Final = frozenset({"viewer", "admin"})
ADMIN: Final = frozenset({"admin"})

PAGES: Final[dict[str, frozenset[str]]] = {
    "GET /": SIGNED_IN,
    "GET /sign-in": ANYONE,
    "GET /join/{code}": ANYONE,
    "POST /join/{code}": ANYONE,
    "POST /preferences": ANYONE,
    "POST /sign-out": SIGNED_IN,
    "GET /account": SIGNED_IN,
    "POST /account/token": SIGNED_IN,
    "POST /account/sign-out-elsewhere": SIGNED_IN,
    "GET /projects/{project}/work": WORKS,
    "GET /projects/{project}/history": WORKS,
    "GET /projects/{project}/items/{item}": WORKS,
    "POST /projects/{project}/items/{item}/vote": WORKS,
    "POST /projects/{project}/items/{item}/skip": WORKS,
    "POST /projects/{project}/items/{item}/flag": WORKS,
    "POST /projects/{project}/undo": WORKS,
    "GET /projects/{project}/overview": READS,
    "GET /projects/{project}/statistics": READS,
    "GET /projects/{project}/all-items": READS,
    "GET /projects/{project}/all-items/{item}": READS,
    "GET /projects/{project}/export/{form}": READS,
    "GET /projects/{project}/disputed": ADMIN,
    "GET /projects/{project}/disputed/{item}": ADMIN,
    "POST /projects/{project}/disputed/{item}": ADMIN,
    "GET /projects/{project}/people": ADMIN,
    "POST /projects/{project}/people/invite": ADMIN,
    "POST /projects/{project}/people/{person}/link": ADMIN,
    "POST /projects/{project}/people/{person}/pause": ADMIN,
    "POST /projects/{project}/people/{person}/role": ADMIN,
    "POST /projects/{project}/people/{person}/remove": ADMIN,
    "POST /projects/{project}/people/invitations/{invitation}/withdraw": ADMIN,
    "POST /projects/{project}/pause": ADMIN,
    "GET /projects/{project}/settings": ADMIN,
    "POST /projects/{project}/settings": ADMIN,
    "POST /projects/{project}/items": ADMIN,
    "GET /new-project": ADMIN,
    "POST /new-project": ADMIN,
}
API: Final[dict[str, frozenset[str]]] = {
    "GET /api/openapi.json": ANYONE,
    "GET /api/projects": SIGNED_IN,
    "GET /api/projects/{project}/next": WORKS,
    "POST /api/projects/{project}/items/{item}/vote": WORKS,
    "POST /api/projects/{project}/items/{item}/skip": WORKS,
    "POST /api/projects/{project}/items/{item}/flag": WORKS,
    "POST /api/projects/{project}/undo": WORKS,
    "GET /api/projects/{project}/progress": WORKS,
    "POST /api/projects/{project}/items": ADMIN,
    "GET /api/projects/{project}/votes": READS,
    "GET /api/projects/{project}/statistics": READS,
}
ACCESS: Final = PAGES | API
