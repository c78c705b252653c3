"""Where programs that a model wrote are run: bubblewrap, a container, or, if a config insists, as the user.

A sandbox has no network, no files but Python's own (read-only) and a small folder in memory, processes of its
own, and limits on time, memory, files and processes. It ends with the process that started it. What it costs:
some 50 ms a reply with bubblewrap, half a second with a container.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from keel.errors import RewardError, UsageError
from keel.rewards import sandbox_driver

Kind = Literal["bubblewrap", "podman", "docker", "none"]
KINDS: tuple[Kind, ...] = ("bubblewrap", "podman", "docker")  # in the order in which `auto` looks for them
FILE_BYTES = 16 << 20  # of a file that a program writes
ROOM_BYTES = 64 << 20  # of all of them
WAITING = 3.0  # so many times the processor's seconds a test may take by the clock
START = {"bubblewrap": 20.0, "podman": 60.0, "docker": 60.0, "none": 20.0}  # seconds that a start may take
_TOOLS = {"bubblewrap": "bwrap", "podman": "podman", "docker": "docker"}
_FIRST_UID, _UIDS = 1_500_000_000, 100_000_000  # of nobody: each sandbox that root starts has one of its own
_INSIDE = "/python"  # where this Python lies in a sandbox of bubblewrap, if it is not the system's
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Limits:
    """What a test may take."""

    seconds: float = 5.0  # of the processor
    memory: int = 512  # MiB of addresses, each of its processes
    processes: int = 8  # and threads, at once

    def plain(self) -> dict[str, float]:
        """As the driver reads them."""
        return {
            "cpu": max(1, round(self.seconds + 0.499)),
            "wall": WAITING * self.seconds,
            "memory": self.memory << 20,
            "file": FILE_BYTES,
            "processes": self.processes,
        }


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A way to run programs."""

    kind: Kind
    tool: str = ""  # its command
    image: str = ""  # of a container
    packages: bool = False  # what is installed beside keel can be imported, too

    def command(self, limits: Limits, name: str) -> list[str]:
        """What starts the driver in there. name: of a container."""
        program = Path(sandbox_driver.__file__).read_text(encoding="utf-8")
        python = ["-I", "-S", "-c", program]
        if self.kind == "bubblewrap":
            prefix, executable = _python()
            inside = _INSIDE if prefix else ""
            # of a Python below somebody's home (~/.local) no more than its own folders
            parts = [part for part in ("bin", "lib", "lib64") if os.path.isdir(f"{prefix}/{part}")]
            binds = {f"{prefix}/{part}": f"{_INSIDE}/{part}" for part in parts if prefix}
            binds |= dict(zip(self.packages_here(), self.paths()))
            return [self.tool, *_bubblewrap(binds), inside + executable.removeprefix(prefix), *python]
        if self.kind == "none":
            return [os.path.realpath(sys.executable), *python]
        room = f"/tmp:rw,size={ROOM_BYTES},mode=1777"
        whole = (limits.memory * 2) << 20
        # podman's read-only containers have places to write in memory that no limit of ours counts
        none_else = ["--read-only-tmpfs=false"] if self.kind == "podman" else []
        return [
            *(self.tool, "run", "--rm", "-i", "--name", name, "--pull", "never", "--network", "none"),
            *("--read-only", *none_else, "--ipc", "none", "--tmpfs", room),
            *("--user", "65534:65534", "--cap-drop", "ALL"),
            *("--security-opt", "no-new-privileges", "--pids-limit", str(limits.processes + 8)),
            *("--memory", str(whole), "--memory-swap", str(whole), self.image, "python3", *python),
        ]

    @property
    def among(self) -> Literal["sandbox", "container", "user"]:
        """With whose processes the kernel counts a program's; those of a container its own limit counts."""
        if self.kind == "bubblewrap":
            return "sandbox"
        return "user" if self.kind == "none" else "container"

    def packages_here(self) -> list[str]:
        """Folders of packages that a program may import beside the standard library."""
        if not self.packages or self.kind in ("podman", "docker"):
            return []
        return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]

    def paths(self) -> list[str]:
        """The same, where they lie in there."""
        here = self.packages_here()
        return [f"/packages{i}" for i in range(len(here))] if self.kind == "bubblewrap" else here


def find(kind: Kind | Literal["auto"], image: str, packages: bool, where: str) -> Sandbox:
    """A sandbox that works here: the one that is named, or the first of bubblewrap, podman and docker. where:
    the reward, for messages. UsageError where there is none, with what each of them lacks."""
    if kind == "none":
        return Sandbox("none", packages=packages)
    lacks: list[str] = []
    for one in KINDS if kind == "auto" else (kind,):
        sandbox = Sandbox(one, shutil.which(_TOOLS[one]) or "", image, packages)
        missing = _missing(sandbox)
        if not missing:
            return sandbox
        lacks.append(f"{one}: {missing}")
    raise UsageError(
        f"{where}: there is no sandbox for the code of replies ({'; '.join(lacks)}): install bubblewrap (apt "
        "install bubblewrap, dnf install bubblewrap) or set `sandbox: none`, which runs it as you"
    )


def cores() -> int:
    """Cores that this process may use."""
    able = getattr(os, "sched_getaffinity", None)
    return len(able(0)) if able else os.cpu_count() or 1


def _missing(sandbox: Sandbox) -> str:
    """Why a sandbox does not work here; "" where it does."""
    if not sandbox.tool:
        return "is not installed"
    if sandbox.kind in ("podman", "docker"):
        command = [sandbox.tool, "image", "inspect", sandbox.image]
        try:
            asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        except subprocess.TimeoutExpired:
            return "does not answer"
        if asked.returncode:
            return _last_line(asked.stderr) or f"has no image {sandbox.image}"
    test = {"kind": "python", "code": "assert f() == 3", "token": "tried"}
    try:
        ended = run(sandbox, "def f(): return 3", [test], Limits())
    except RewardError as error:
        return str(error)
    return "" if ended and ended[0].get("value") == "tried" else "does not run Python"


def run(
    sandbox: Sandbox,
    program: str,
    tests: Sequence[Mapping[str, Any]],
    limits: Limits,
) -> list[dict[str, Any]]:
    """How each test of a program ended, as the driver says; fewer than there are tests where it was stopped.
    RewardError where the sandbox did not start, which is no program's fault."""
    alone = sandbox.kind == "bubblewrap" and os.geteuid() == 0
    number = (os.getpid() * 1000 + next(_numbers)) % _UIDS
    job: dict[str, Any] = {
        "program": program, "tests": list(tests), "limits": limits.plain() | {"among": sandbox.among},
        "path": sandbox.paths(), "uid": _FIRST_UID + number if alone else 0,
    }  # fmt: skip
    name = f"keel-{os.getpid()}-{number}"
    with _folder(sandbox) as job["folder"], _started(sandbox, limits, name) as child:
        content = json.dumps(job).encode("utf-8", "replace")
        try:
            out, err = child.communicate(
                content, START[sandbox.kind] + len(tests) * (WAITING * limits.seconds + 1)
            )
        except subprocess.TimeoutExpired:
            _kill(child)
            out, err = child.communicate()
    answers = list(_answers(out, len(tests) + 1))
    if not answers or "ready" not in answers[0]:
        said = _last_line(err.decode("utf-8", "replace")) or "it said nothing"
        raise RewardError(f"the sandbox ({sandbox.kind}) did not start: {said}")
    return answers[1:]


def _answers(out: bytes, most: int) -> Iterator[dict[str, Any]]:
    """The lines of a driver, up to one that is none."""
    for line in out.splitlines()[:most]:
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            return
        if not isinstance(answer, dict):
            return
        yield answer


_running: set[subprocess.Popen[bytes]] = set()
_running_lock = threading.Lock()


@contextlib.contextmanager
def _folder(sandbox: Sandbox) -> Iterator[str]:
    """Where programs without walls leave their files, gone when the block ends; "" where they have a folder
    in memory."""
    if sandbox.kind != "none":
        yield ""
        return
    folder = tempfile.mkdtemp(prefix="keel-code-")
    try:
        yield folder
    finally:
        with contextlib.suppress(RecursionError):  # of folders in folders without end
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _started(sandbox: Sandbox, limits: Limits, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, which is gone when the block ends, its container too."""
    child = subprocess.Popen(
        sandbox.command(limits, name),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=_environment(sandbox),
    )
    with _running_lock:
        _running.add(child)
    try:
        yield child
    finally:
        with _running_lock:
            _running.discard(child)
        _kill(child)
        if child.wait() and sandbox.kind in ("podman", "docker"):  # whose command is not the container
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run([sandbox.tool, "rm", "-f", name], capture_output=True, check=False, timeout=60)


def stop_all() -> None:
    """End every sandbox that runs: an interrupt waits for none of them."""
    with _running_lock:
        for child in _running:
            _kill(child)


def _kill(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


def _environment(sandbox: Sandbox) -> dict[str, str]:
    """Nothing of keel's own, but what a container's command may need to find its server."""
    if sandbox.kind in ("podman", "docker"):
        return dict(os.environ)
    libraries = f"{_INSIDE}/lib" if sandbox.kind == "bubblewrap" else f"{sys.base_prefix}/lib"
    return {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "LD_LIBRARY_PATH": libraries}


def _python() -> tuple[str, str]:
    """(the folder of this Python, "" for the system's own; its executable). Python finds its library beside
    its executable, so that the folder can lie anywhere."""
    executable, prefix = os.path.realpath(sys.executable), os.path.realpath(sys.base_prefix)
    if executable.startswith("/usr/") and not executable.startswith("/usr/local/"):
        return "", executable
    if not executable.startswith(prefix + "/"):
        prefix = os.path.dirname(os.path.dirname(executable))
    return prefix, executable


def _bubblewrap(binds: Mapping[str, str]) -> list[str]:
    """Arguments of bwrap. binds: folder → where it lies in there (bwrap makes folders between for their owner
    alone, and nobody could not pass: /python is made before). Root, whose processes no limit counts, keeps
    two rights there, with which the driver becomes nobody."""
    arguments = ["--unshare-all"]
    if os.geteuid() == 0:
        arguments = [
            "--unshare-pid",
            "--unshare-net",
            "--unshare-ipc",
            "--unshare-uts",
            "--unshare-cgroup-try",
        ]
        arguments += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    arguments += ["--die-with-parent", "--new-session", "--ro-bind", "/usr", "/usr"]
    for place in ("/bin", "/sbin", "/lib", "/lib64", "/lib32"):
        if os.path.islink(place):
            arguments += ["--symlink", os.readlink(place), place]
        elif os.path.isdir(place):
            arguments += ["--ro-bind", place, place]
    arguments += ["--perms", "0755", "--dir", "/etc"]
    arguments += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    arguments += ["--ro-bind-try", "/etc/alternatives", "/etc/alternatives"]
    arguments += ["--perms", "0755", "--dir", _INSIDE]
    for place, inside in binds.items():
        arguments += ["--ro-bind", place, inside]
    return [
        *arguments,
        *("--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"),
        *("--perms", "1777", "--size", str(ROOM_BYTES), "--tmpfs", "/tmp"),
        *("--remount-ro", "/", "--chdir", "/tmp"),
    ]


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""
