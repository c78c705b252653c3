"""A dashboard that serves in a thread of the test."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from keel.dashboard.app import application
from keel.dashboard.security import Security

ended: list[str] = []  # addresses of servers that were told to end


@contextlib.contextmanager
def serving(folder: Path, port: int = 0, **settings: Any) -> Iterator[str]:
    """The address of a dashboard of a folder, for as long as the block lasts."""
    place = socket.socket()
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    place.bind(("127.0.0.1", port))
    port = place.getsockname()[1]
    security = Security.of("127.0.0.1", port)
    server: Any = None
    app = application(folder, security, ended=lambda: server.should_exit, **settings)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started and time.monotonic() < until:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        ended.append(f"http://127.0.0.1:{port}")
        server.should_exit = True
        thread.join(10)
