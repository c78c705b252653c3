"""Where every error ends: one line of what went wrong and what to do, and the exit code.

What keel raises for its user has its words already. What the system raises (a full disk, a limit, a file
that may not be read) and what runs out of memory is put into words here. Anything else is a fault of keel,
and says so. A rank of a run leaves a record of its error to whoever started it, which says one for all.
`--traceback` on any command, or KEEL_TRACEBACK=1, shows where an error was raised.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from keel.cli import interrupts
from keel.cli.progress import say
from keel.distributed import records
from keel.errors import KeelError, LostRankError
from keel.rundir import machine_faults

OPTION = "--traceback"
_shows: list[bool] = []  # of the command at work


def guarded(work: Callable[[], object]) -> int:
    """Do the work of a command; its exit code, with one line on stderr for what it raised."""
    try:
        interrupts.catch()
        code = _worked(work)
        interrupts.leave_quietly()
    except interrupts.Interrupted:  # once at most: see `interrupts`
        interrupts.leave_quietly()
        _say("interrupted", interrupts.SAID, interrupts.CODE)
        return interrupts.CODE
    return code


def _worked(work: Callable[[], object]) -> int:
    shown = _shown_whole()
    _shows[:] = [shown]
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
        _say("lost" if isinstance(error, LostRankError) or is_lost(error) else "own", line, code)
        _forget_stdout()
        return code
    return 0


def _say(kind: records.Kind, line: str, code: int) -> None:
    """On stderr, of a rank with its place; or in its record, where its launcher says it."""
    records.leave(kind, line, code)
    where = records.place()
    if not records.is_watched():
        say(f"keel: {where}: {line}" if where else f"keel: {line}")
    if where:  # at once: the others learn of it by its connections, which Python would take its time to close
        sys.stderr.flush()
        os._exit(code)


def is_lost(error: BaseException) -> bool:
    """Whether what was raised inside torch says that another rank is gone. Without ranks nothing is
    imported."""
    if not records.place():
        return False
    from keel.distributed import group

    return group.says_lost(error)


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
        # a model that "cannot be loaded" is no fault of the model's where the machine has refused to open it
        refused = None if error.__cause__ is None else machine_faults.explain(error)
        return str(refused or error), (refused or error).exit_code
    if (told := machine_faults.explain(error)) is not None:
        return str(told), told.exit_code
    if is_lost(error):
        from keel.distributed import group

        return group.lost_words(error), 1
    if isinstance(error, OSError) and error.strerror:
        names = [
            os.fsdecode(one) for one in (error.filename, error.filename2) if isinstance(one, str | bytes)
        ]
        return ": ".join([*([" → ".join(names)] if names else []), error.strerror]), 1
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


def shows_tracebacks() -> bool:
    """Whether this command shows where an error was raised."""
    return any(_shows)


def _place(error: BaseException) -> str:
    """The innermost line of keel's own code."""
    own = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(own)]
    return f"{os.path.relpath(frames[-1].filename, own)}:{frames[-1].lineno}" if frames else "no line of keel"
