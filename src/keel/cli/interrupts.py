"""Ctrl-C and SIGTERM: the first ends the command in order, the second at once. Neither leaves a word of
Python's on the terminal.

A command that another one started ends with it (`end_with_stdin`), however that ends: a second Ctrl-C or
SIGKILL leaves nobody to tell it.

An exception raised by a signal can be lost: what a `__del__` or the callback of a weak reference raises is
printed and forgotten. A lost one is raised again from a thread, a moment later.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from keel.distributed import records

CODE = 130
SAID = "interrupted; the same command goes on from the last checkpoint"
NUMBERS = (signal.SIGINT, signal.SIGTERM)
_LATER = 0.02  # seconds
PATIENCE = 10.0  # seconds for a command to end in order, when whoever started it is gone
_others: list[Any] = []  # the hook of before


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM. Not a KeyboardInterrupt, which typer would end without a word."""


def catch() -> None:
    """From here on the first signal raises `Interrupted`. A signal that the parent has had ignored stays
    ignored."""
    _set(_first)
    if sys.unraisablehook is not _unraisable:
        _others.append(sys.unraisablehook)
        sys.unraisablehook = _unraisable


def end_with_stdin() -> None:
    """From here on the process ends with whoever holds the other end of standard input: in order, then at
    once, then in any case."""
    threading.Thread(target=_wait_for_end, daemon=True).start()


def _wait_for_end() -> None:
    with contextlib.suppress(OSError):  # closed
        while os.read(0, 4096):
            pass
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        os.kill(os.getpid(), number)
        time.sleep(PATIENCE)


def leave_quietly() -> None:
    """The command has done its work: a signal from here on ends the process without a word."""
    _set(signal.SIG_DFL)
    if _others:
        sys.unraisablehook = _others.pop()


def _set(handler: Any) -> None:
    for number in NUMBERS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _first(number: int, frame: FrameType | None) -> None:
    _set(_second)
    raise Interrupted(number)


def _second(number: int, frame: FrameType | None) -> None:
    if not records.is_watched():  # else its launcher says so
        os.write(2, f"keel: {SAID}\n".encode())
    os._exit(CODE)


def _unraisable(lost: Any) -> None:
    if not isinstance(lost.exc_value, Interrupted):
        (_others[-1] if _others else sys.__unraisablehook__)(lost)
        return
    _set(_first)
    timer = threading.Timer(_LATER, os.kill, (os.getpid(), lost.exc_value.args[0]))
    timer.daemon = True
    timer.start()
