"""What runs inside a sandbox: a program that a model wrote, against its tests, each in a process of its own.

Written for the standard library of any Python from 3.8 on, since a container brings its own; keel hands its
text to `python -I -S -c`. One line of JSON comes in and one line a test goes out. What should come out of a
test is not in here: outputs and values go out and are compared outside. Only of tests that are Python is the
verdict made in the process that the program runs in.
"""

import builtins
import contextlib
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time

KEPT = 1 << 16  # bytes of an output that are passed on


def main():
    """Read a job, run its tests, say how each ended."""
    job = json.loads(sys.stdin.buffer.read())
    answers = os.dup(1)
    os.dup2(2, 1)
    hide()
    if job.get("uid"):  # root without a namespace of users: as nobody else
        os.setgroups([])
        os.setresgid(job["uid"], job["uid"], job["uid"])
        os.setresuid(job["uid"], job["uid"], job["uid"])
        hide()
    adopt()
    sys.path[:0] = job["path"]
    tempfile.tempdir = job.get("folder") or None
    os.write(answers, b'{"ready": true}\n')
    for test in job["tests"]:
        answer = run(job["program"], test, job["limits"])
        os.write(answers, json.dumps(answer).encode() + b"\n")
        if answer["ended"] == "time":  # the others are not waited for, too
            return


def hide():
    """Keep the programs from reading this process: what it says is believed."""
    with contextlib.suppress(Exception):
        import ctypes

        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE


def run(program, test, limits):
    """{"ended": "ok" | "error" | "time" | "output", "output": …, "value": …} of one test."""
    out, written = os.pipe()
    verdict, said = os.pipe()
    folder, driver = tempfile.mkdtemp(), os.getpid()
    with tempfile.TemporaryFile() as given:
        given.write(test.get("input", "").encode("utf-8", "replace"))
        given.seek(0)
        pid = os.fork()
        if not pid:
            try:
                os.setsid()
                for source, target in ((given.fileno(), 0), (written, 1), (os.open(os.devnull, 1), 2)):
                    os.dup2(source, target)
                os.dup2(said, 3)
                os.closerange(4, 1 << 12)
                end_with(driver)
                child(program, test, limits, folder)
            except BaseException:
                os._exit(1)
    os.close(written)
    os.close(said)
    try:
        return watch(pid, out, verdict, limits)
    finally:
        end_orphans()
        with contextlib.suppress(Exception):  # RecursionError, too: of folders in folders without end
            shutil.rmtree(folder, ignore_errors=True)


def adopt():
    """Have what a test leaves behind become this process's child, whatever session it went to."""
    with contextlib.suppress(Exception):
        import ctypes

        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def end_orphans():
    """End what a test has left behind, and what that had started; each round finds the next generation."""
    for _ in range(1000):
        try:
            with open(f"/proc/self/task/{os.getpid()}/children") as listed:
                left = [int(pid) for pid in listed.read().split()]
        except OSError:
            return
        ended = []
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
                ended.append(pid)
        for pid in ended:
            with contextlib.suppress(OSError):
                os.waitpid(pid, 0)
        if not ended:
            return


def end_with(driver):
    """Have the kernel end this process when its driver has ended: one that waits for ever would stay."""
    with contextlib.suppress(Exception):
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != driver:
        os._exit(1)


def tasks_of_user():
    """Processes and threads of this user that the kernel counts together with a test's."""
    if not os.path.isdir("/proc/self"):  # elsewhere than on Linux nobody says: no limit
        return 1 << 30
    count = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, KeyError):
            with open("/proc/" + name + "/status", encoding="utf-8", errors="replace") as lines:
                said = dict(line.split(":", 1) for line in lines if ":" in line)
            if int(said["Uid"].split()[0]) == os.getuid():
                count += int(said["Threads"])
    return count


def watch(pid, out, verdict, limits):
    """Read what a test writes until it ends, or has to."""
    until = time.monotonic() + limits["wall"]
    parts = {out: b"", verdict: b""}
    waiting, ended = [out, verdict], ""
    while waiting and not ended:
        left = until - time.monotonic()
        ready = select.select(waiting, [], [], max(left, 0))[0] if left > 0 else []
        if not ready:
            ended = "time"
        for pipe in ready:
            part = os.read(pipe, 1 << 16)
            parts[pipe] += part
            if not part:
                waiting.remove(pipe)
            if len(parts[pipe]) > KEPT:
                ended = "output"
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL) if ended else None
    status = reap(pid, until, ended)
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)  # what it has left behind
    os.close(out)
    os.close(verdict)
    if not ended:
        killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        ended = "time" if killed in (signal.SIGXCPU, signal.SIGKILL) else "error" if status else "ok"
    if ended != "ok":
        return {"ended": ended, "output": "", "value": ""}
    return {
        "ended": "ok",
        **{n: parts[p].decode("utf-8", "replace") for n, p in (("output", out), ("value", verdict))},
    }


def reap(pid, until, ended):
    """The status of a process that has closed what it wrote to, or was killed."""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > until and not ended:
            with contextlib.suppress(OSError):
                os.killpg(pid, signal.SIGKILL)
        time.sleep(0.001)


def child(program, test, limits, folder):
    """Be the program, and then its test."""
    os.chdir(folder)
    processes = limits["processes"]
    if limits["among"] == "user":
        processes += tasks_of_user()
    for kind, limit in (
        (resource.RLIMIT_CPU, limits["cpu"]),
        (resource.RLIMIT_AS, limits["memory"]),
        (resource.RLIMIT_FSIZE, limits["file"]),
        (resource.RLIMIT_NPROC, resource.RLIM_INFINITY if limits["among"] == "container" else processes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        with contextlib.suppress(ValueError, OSError):
            hard = resource.getrlimit(kind)[1]
            limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(kind, (limit, limit))
    os.environ.clear()
    os.environ.update({"HOME": folder, "TMPDIR": folder, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"})
    os.environ.update({"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv = ["reply.py"]
    builtins.exit = builtins.quit = sys.exit  # which `site`, left out, adds
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    script = test["kind"] == "stdin"
    names = {"__name__": "__main__" if script else "reply", "__builtins__": __builtins__}
    status = 0
    try:
        exec(compile(program, "reply.py", "exec"), names)
        if test["kind"] == "python":
            exec(compile(test["code"], "test.py", "exec"), names)
            if test.get("call"):
                names[test["call"]](*[names[name] for name in test.get("given", ())])
            os.write(3, test["token"].encode())
        elif test["kind"] == "call":
            os.write(3, json.dumps(function_of(names, test["name"])(*test["arguments"])).encode())
    except SystemExit as error:
        status = 0 if script and error.code in (None, 0) else 1
    except BaseException:
        status = 1
    if script:
        import threading

        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
    os._exit(status)


def function_of(names, name):
    """A function of the program, or a method of its class Solution."""
    return names[name] if name in names else getattr(names["Solution"](), name)


if __name__ == "__main__":
    main()
