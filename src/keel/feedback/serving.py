"""`keel label serve`: the app on a port, with the admin's first link."""

from __future__ import annotations

import logging
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from keel.errors import UsageError
from keel.feedback import formats
from keel.feedback.app import create_app
from keel.votes.kinds import Project, Task
from keel.votes.store import Store

HOST, PORT = "127.0.0.1", 8011


def quick_project(
    store: Store,
    path: Path,
    task: Task | None,
    votes_per_item: int,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[str, int, int]:
    """A project named after a file, with its items: name, new items, items that were there. A project that is
    there keeps its settings. A file that does not fit leaves nothing. say: is told what was left out."""
    name = re.sub(r"[^a-z0-9_-]+", "-", path.name.split(".")[0].lower()).strip("-_") or "pairs"
    labels = formats.read(path, task=task)
    for note in labels.notes:
        say(note)
    made = Project(name, task=labels.task, votes_per_item=votes_per_item)
    added = formats.into_project(store, name, labels, make=made)
    return name, added.added, added.known


def first_link(store: Store, base: str, say: Callable[[str], None] = lambda line: None) -> str | None:
    """A one-time link for an admin; None where there is an admin. One that was printed before and not used
    works no longer, which is said."""
    found = store.first_admin_link()
    if found is None:
        return None
    code, replaced = found
    if replaced:
        say("the admin's link that was printed before works no longer")
    return f"{base}/join/{code}"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. UsageError where the address cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"{host}:{port} cannot be listened on ({reason}): give another --port or --host"
        ) from None
    return listener


def address_of(listener: socket.socket, host: str) -> str:
    """Where the pages are, as a browser on this machine finds them."""
    shown = "localhost" if host in ("0.0.0.0", "::", "") else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"


def serve(
    store: Store,
    listener: socket.socket,
    *,
    say: Callable[[str], None],
    rate: float,
    requests: bool = False,
    url: str | None = None,
) -> None:
    """Answer requests until Ctrl-C or SIGTERM. requests: log each to stderr, without codes or tokens."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("keel.label").setLevel(logging.INFO if requests else logging.WARNING)
    config = uvicorn.Config(
        create_app(store, rate=rate, burst=3 * rate, url=url),
        log_config=None,
        access_log=False,  # it would hold the codes of invitations
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    # uvicorn raises the signal that ended it once more; ending is what was asked for, so it says nothing
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        uvicorn.Server(config).run([listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    say("keel label: stopped; every vote is kept")
