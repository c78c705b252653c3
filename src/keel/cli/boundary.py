"""Where every error ends: one line of what went wrong and what to do, and the exit code.

What keel raises for its user has its words already. What the system raises (a full disk, a limit, a file
that may not be read) and what runs out of memory is put into words here. Anything else is a fault of keel,
and says so. `--traceback` on any command, or KEEL_TRACEBACK=1, shows where an error was raised.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable

from keel.cli import interrupts
from keel.cli.progress import say
from keel.errors import KeelError

OPTION = "--traceback"
AGAIN = "the same command goes on from what is done"
FULL = ("No space left on device", "Disk quota exceeded", "File too large")
# How torch says that a file could not be written to its end, and that memory is not there.
CUT_SHORT = ("PytorchStreamWriter failed", "unexpected pos")
NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")


def guarded(work: Callable[[], object]) -> int:
    """Do the work of a command; its exit code, with one line on stderr for what it raised."""
    try:
        interrupts.catch()
        code = _worked(work)
        interrupts.leave_quietly()
    except interrupts.Interrupted:  # once at most: see `interrupts`
        interrupts.leave_quietly()
        say(f"keel: {interrupts.SAID}")
        return interrupts.CODE
    return code


def _worked(work: Callable[[], object]) -> int:
    shown = _shown_whole()
    try:
        try:
            work()
        finally:
            sys.stdout.flush()  # here, where a full disk or a closed pipe behind it is one line
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BrokenPipeError:
        _forget_stdout()
        return 0
    except Exception as error:
        if shown:
            traceback.print_exc()
        line, code = explain(error)
        say(f"keel: {line}")
        _forget_stdout()
        return code
    return 0


def _forget_stdout() -> None:
    """What cannot be written is not tried again when Python ends."""
    try:
        sys.stdout.flush()
    except OSError:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def explain(error: BaseException) -> tuple[str, int]:
    """An error in a line, and the exit code that belongs to it."""
    if isinstance(error, KeelError):
        return str(error), error.exit_code
    if (line := _of_memory(error) or _of_system(error)) is not None:
        return line, 1
    reason = " ".join(str(error).split()) or "without a word"
    where = _place(error)
    return (
        f"unexpected {type(error).__name__}: {reason[:500]} ({where}). This is a fault of keel, please "
        f"report it; {OPTION} shows the whole. What is done is kept",
        1,
    )


def _shown_whole() -> bool:
    """Whether tracebacks are asked for; the option may stand anywhere, and no command sees it."""
    asked = OPTION in sys.argv[1:]
    if asked:
        sys.argv = [sys.argv[0], *(word for word in sys.argv[1:] if word != OPTION)]
    return asked or os.environ.get("KEEL_TRACEBACK", "0") not in ("", "0")


def _of_memory(error: BaseException) -> str | None:
    if isinstance(error, RecursionError) or not isinstance(error, MemoryError | RuntimeError):
        return None
    reason = " ".join(str(error).split())
    if not isinstance(error, MemoryError) and not any(word in reason.casefold() for word in NO_MEMORY):
        return None
    return (
        "memory ran out" + (f" ({reason[:200]})" if reason else "") + "; a smaller `micro_batch` or model "
        f"needs less (`keel plan` says how much), and {AGAIN}"
    )


def _of_system(error: BaseException) -> str | None:
    """What the system would not do. Libraries in Rust and C++ hand its words on in errors of their own."""
    if isinstance(error, OSError) and error.errno is not None:
        return _of_number(error)
    reason = " ".join(str(error).split())
    if any(word in reason for word in (*FULL, *CUT_SHORT)):
        word = next((word for word in FULL if word in reason), "the disk is full, or a limit on files is met")
        return f"a file could not be written: {word}; make room, and {AGAIN}"
    return reason or None if isinstance(error, OSError) else None


def _of_number(error: OSError) -> str:
    reason = error.strerror or str(error)
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    place = f"{' → '.join(names)}: " if names else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{place}{reason}; make room on the disk, and {AGAIN}"
    if error.errno == errno.EFBIG:
        return f"{place}{reason}: raise the limit on the size of files (ulimit -f), and {AGAIN}"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{place}{reason}: raise the limit on open files (ulimit -n), and {AGAIN}"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{place}{reason}: give yourself the right to it, or choose another folder (`--runs`)"
    if error.errno in (errno.ENOMEM, errno.EAGAIN):
        return f"{place}{reason}: memory or processes ran out; {AGAIN}"
    return f"{place}{reason}"


def _place(error: BaseException) -> str:
    """The innermost line of keel's own code."""
    own = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(own)]
    return f"{os.path.relpath(frames[-1].filename, own)}:{frames[-1].lineno}" if frames else "no line of keel"
