"""`keel dashboard`, and the one that `keel run --watch` opens beside a run."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from keel.errors import KeelError, UsageError

_STARTS_WITHIN = 30.0  # seconds that a dashboard beside a run has to say its address


def check_installed() -> None:
    """UsageError where the packages of the dashboard are not there."""
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"the dashboard needs {' and '.join(missing)}: pip install 'keel-rlhf[dashboard]'")


def serve(
    folder: Path,
    host: str,
    port: int,
    say: Callable[[str], None],
    *,
    wait: bool = False,
    while_stdin: bool = False,
    most_pages: int = 64,
) -> None:
    """Serve the dashboard until it is interrupted, or, `while_stdin`, until standard input ends.

    wait: the folder is that of one run, and may not be there yet. most_pages: that may be open at a time.
    UsageError for a folder that is not there
    and an address that cannot be had.
    """
    check_installed()
    if not folder.is_dir() and not wait:
        raise UsageError(f"no folder at {folder}: give a folder of runs, or one run, such as runs/NAME")
    import uvicorn

    from keel.dashboard.app import application
    from keel.dashboard.discovery import find
    from keel.dashboard.security import Security

    place = _bound(host, port)
    port = place.getsockname()[1]
    security = Security.of(host, port)
    server: Any = None
    alone = wait or [run.path for run in find(folder)] == [folder]
    app = application(
        folder, security, ended=lambda: server is not None and server.should_exit, alone=alone,
        most_pages=most_pages,
    )  # fmt: skip
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=2, server_header=False,
        date_header=False,
    )  # fmt: skip
    server = uvicorn.Server(config)
    if while_stdin:
        threading.Thread(target=_end_with_stdin, args=(server,), daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _nothing)  # the server has handlers of its own, and raises the signal once more
    say(address(security))
    server.run(sockets=[place])


def _nothing(number: int, frame: object) -> None:
    """The server has ended already."""


def address(security: Any) -> str:
    """The link to open."""
    host = socket.gethostname() if security.host in ("0.0.0.0", "::") else security.host
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{security.port}/" + (f"?token={security.token}" if security.token else "")


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    place = socket.socket(family, socket.SOCK_STREAM)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind((host, port))
        place.listen(128)  # who opens the link at once waits for the server
    except (OSError, OverflowError) as error:
        place.close()
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(
            f"cannot serve on {host}:{port} ({why}): give another --port, 0 for any that is free"
        ) from None
    return place


def _end_with_stdin(server: Any) -> None:
    """Whoever started this holds the other end of standard input, which closes when they end, in any way."""
    while os.read(0, 4096):
        pass
    server.should_exit = True


@contextlib.contextmanager
def beside(run: Path, say: Callable[[str], None], *, keep: bool = False) -> Iterator[None]:
    """A dashboard of one run in a process of its own, for as long as the block lasts; `keep`: until somebody
    ends it. KeelError where it does not come up."""
    check_installed()
    command = [sys.executable, "-m", "keel", "dashboard", str(run), "--port", "0", "--wait"]
    process = subprocess.Popen(
        command if keep else [*command, "--while-stdin"],
        stdin=subprocess.DEVNULL if keep else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # Ctrl-C is for the run
    )
    link = ""
    try:
        link = _first_line(process)
        if not link:
            raise KeelError("the dashboard did not start; `keel dashboard` on the run's folder shows why")
        say(f"dashboard: {link}" + (f" (stays open; end it with: kill {process.pid})" if keep else ""))
        yield
    finally:
        if not (keep and link):
            process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0 if keep and link else 5)


def _first_line(process: subprocess.Popen[str]) -> str:
    said: list[str] = []
    stream = process.stdout
    assert stream is not None
    reader = threading.Thread(target=lambda: said.append(stream.readline().strip()), daemon=True)
    reader.start()
    reader.join(_STARTS_WITHIN)
    return said[0] if said else ""
