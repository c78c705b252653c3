"""Where errors and signals end: one line, an exit code, nothing of Python's."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from keel.accel.patches import AccelWarning
from keel.cli import boundary, interrupts, main
from keel.errors import UsageError


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (UsageError("no such thing"), "no such thing", 2),
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "no space is left on the disk of /a/b", 1),
        (OSError(errno.EFBIG, "File too large", "w"), "w: the limit on the size of a file", 1),
        (OSError(errno.EMFILE, "Too many open files"), "too many open files (ulimit -n): raise the limit", 1),
        (PermissionError(errno.EACCES, "Permission denied", "r"), "r cannot be written or read", 1),
        (OSError(errno.EROFS, "Read-only file system", "r"), "name another folder, such as --runs DIR", 1),
        (MemoryError(), "the memory is used up: set a smaller `micro_batch`", 1),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: 9"), "the memory is used up", 1),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), "no space is left on the disk", 1),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "no space is left on the disk", 1),
        (RecursionError("maximum recursion depth exceeded"), "unexpected RecursionError: maximum", 1),
        (ZeroDivisionError("division by zero"), "This is a fault of keel, please report it; --traceback", 1),
    ],
)  # fmt: skip
def test_an_error_is_one_line_with_its_remedy(error: Exception, said: str, code: int) -> None:
    line, found = boundary.explain(error)
    assert said in line
    assert "\n" not in line
    assert found == code


def test_a_model_that_the_machine_refused_to_open_is_no_fault_of_the_model() -> None:
    try:
        raise UsageError("model 'm' cannot be loaded") from OSError(errno.EMFILE, "Too many open files")
    except UsageError as error:
        line, code = boundary.explain(error)
    assert "ulimit -n" in line
    assert code == 1


def test_a_warning_of_keels_own_is_one_line_without_its_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(warnings, "showwarning", main._show_warning)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("accel: head is off", AccelWarning, stacklevel=1)
    assert capsys.readouterr().err == "keel: note: accel: head is off\n"


def test_the_traceback_is_there_for_who_asks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(sys, "argv", ["keel", "run", "x"])
    assert boundary.guarded(work) == 1
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["keel", "run", "--traceback", "x"])
    assert boundary.guarded(work) == 1
    assert "Traceback" in capsys.readouterr().err
    assert sys.argv == ["keel", "run", "x"]


CLOSING = """
import os, signal, sys
from keel.cli import boundary, interrupts

class Lost:
    def __del__(self):
        os.kill(os.getpid(), signal.{first})  # raised where Python drops it
        for i in range(1000): pass

def work():
    {work}

code = boundary.guarded(work)
os.kill(os.getpid(), signal.SIGTERM) if code == 0 else None
print("still here")
sys.exit(code)
"""
WAIT = "\n    import time\n    time.sleep(20)"


@pytest.mark.parametrize(
    ("first", "work", "code", "said"),
    [
        ("SIGINT", "os.kill(os.getpid(), signal.SIGINT)" + WAIT, 130, f"keel: {interrupts.SAID}\n"),
        ("SIGTERM", "os.kill(os.getpid(), signal.SIGTERM)" + WAIT, 130, f"keel: {interrupts.SAID}\n"),
        ("SIGTERM", "Lost()" + WAIT, 130, f"keel: {interrupts.SAID}\n"),  # an interrupt that Python loses
        (
            "SIGINT",
            "\n    try: os.kill(os.getpid(), signal.SIGINT); time.sleep(20)"
            "\n    finally:\n        os.kill(os.getpid(), signal.SIGINT)" + WAIT.replace("    ", "        "),
            130,
            f"keel: {interrupts.SAID}\n",
        ),  # a second one while the first is on its way
        ("SIGINT", "pass", -signal.SIGTERM, ""),  # one after the work is done
    ],
)
def test_a_signal_leaves_one_line_or_none(
    first: str, work: str, code: int, said: str, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(CLOSING.format(first=first, work=work))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.stderr == said
    assert done.returncode == code
    assert "still here" not in done.stdout or code == 130


def test_a_signal_while_python_still_imports_leaves_no_traceback() -> None:
    for seconds in (0.05, 0.25):
        process = subprocess.Popen(
            [sys.executable, "-m", "keel", "schema"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
        assert all(line.startswith("keel: interrupted") for line in said.splitlines()), said


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_behind_the_output_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "keel", "schema"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("keel: no space is left on the disk")
    assert done.stderr.count("\n") == 1


ORPHAN = """
import signal, sys, time
from keel.cli import boundary, interrupts

interrupts.PATIENCE = 0.2
{before}

def work():
    interrupts.end_with_stdin()
    print("at work", flush=True)
    while True:
        try:
            time.sleep(60)
        except interrupts.Interrupted:
            {once}

sys.exit(boundary.guarded(work))
"""


@pytest.mark.parametrize(
    ("before", "once", "code"),
    [
        ("", "raise", interrupts.CODE),
        ("", "pass", interrupts.CODE),  # it does not end in order: at once then
        ("signal.signal(signal.SIGTERM, signal.SIG_IGN)", "raise", -signal.SIGKILL),  # it hears nothing
    ],
    ids=["in order", "at once", "in any case"],
)
def test_a_command_ends_with_whoever_started_it(before: str, once: str, code: int, tmp_path: Path) -> None:
    """Nobody sends it anything: its standard input closes, as when its parent is killed."""
    script = tmp_path / "script.py"
    script.write_text(ORPHAN.format(before=before, once=once))
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, str(script)], text=True, **pipes)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    assert process.poll() is None
    _, said = process.communicate(timeout=30)  # closes its input
    assert process.returncode == code
    assert said == ("" if code < 0 else f"keel: {interrupts.SAID}\n")
