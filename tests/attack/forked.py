"""`keel` commands in children of one process that has imported everything, so that each costs a fork.

    python forked.py

A request is a line of JSON on stdin, its answer a line on stdout.

    argv       words of the command, without `keel`
    cwd        where it runs; stdout and stderr go to `.out` and `.err` there
    kill       null, or {"signals": ["SIGINT", "SIGINT"], "before": 12} to raise them in the command just
               before its 12th change to the disk, the second `gap_events` audit events later; or {"signals":
               …, "after": 0.4} to send them after so many seconds, the second `gap` seconds later
    timeout    seconds after which it is killed and called hanging
    limits     {"RLIMIT_FSIZE": bytes, …}
    answer     {"code": …, "signal": …, "changes": …, "hung": …, "seconds": …, "left": pids that outlived it}

Python announces every change to the disk by an audit event, so nothing in keel is patched.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
STOPS = (signal.SIGINT, signal.SIGTERM)
MARK = "KEEL_ATTACK"  # in the environment of a command and of all that it starts


def is_change(event: str, args: tuple[Any, ...]) -> bool:
    """A file is made, opened to be written, renamed or removed."""
    if event == "open":
        writes = isinstance(args[2], int) and bool(args[2] & (os.O_WRONLY | os.O_RDWR))
        return isinstance(args[0], str) and writes and not args[0].startswith(("/dev", "/proc"))
    return event in CHANGES


class Trap:
    """Counts changes to the disk, and raises the signals before the one that was chosen."""

    def __init__(self, kill: dict[str, Any], counter: int) -> None:
        self.signals = [int(getattr(signal, name)) for name in kill.get("signals", ())]
        self.before, self.later = kill.get("before"), kill.get("gap_events", 3)
        self.changes, self.rest, self.counter, self.pid = 0, 0, counter, os.getpid()

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if os.getpid() != self.pid:
            return
        if self.rest:
            self.rest -= 1
            if not self.rest:
                os.kill(self.pid, self.signals[-1])
        if not is_change(event, args):
            return
        self.changes += 1
        os.pwrite(self.counter, b"%12d" % self.changes, 0)
        if self.changes == self.before:
            os.kill(self.pid, self.signals[0])
            self.rest = self.later if len(self.signals) > 1 else 0


def child(request: dict[str, Any], counter: int) -> None:
    """The command itself; never returns."""
    code = 99
    try:
        os.setsid()
        folder = Path(request["cwd"])
        os.chdir(folder)
        for number, name in ((1, ".out"), (2, ".err")):
            handle = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(handle, number)
            os.close(handle)
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        scratch = folder / ".tmp"
        scratch.mkdir(exist_ok=True)
        os.environ |= {"TMPDIR": str(scratch), MARK: str(folder), **request.get("env", {})}
        tempfile.tempdir = str(scratch)
        for name, limit in request.get("limits", {}).items():
            resource.setrlimit(getattr(resource, name), (limit, limit))
        sys.argv = ["keel", *request["argv"]]
        from keel.__main__ import _leave, main

        sys.addaudithook(Trap(request.get("kill") or {}, counter))
        for number in STOPS:
            signal.signal(number, _leave)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        try:
            main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(code)


def outlived(folder: str) -> list[int]:
    """Processes that a command has started and that are still there."""
    found: list[int] = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            environment = Path(f"/proc/{entry}/environ").read_bytes()
            alive = ") Z " not in Path(f"/proc/{entry}/stat").read_text()
        except OSError:
            continue
        if alive and f"{MARK}={folder}\0".encode() in environment:
            found.append(int(entry))
    return found


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Fork, kill if asked to, wait, look what is left."""
    kill, counted = request.get("kill") or {}, tempfile.TemporaryFile()  # noqa: SIM115
    began, sent = time.monotonic(), 0
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # nobody can be ready for one before keel is called
    pid = os.fork()
    if not pid:
        child(request, counted.fileno())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    when = [kill["after"], kill["after"] + kill.get("gap", 0.01)] if "after" in kill else []
    when = when[: len(kill.get("signals", ()))]
    hung = False
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        passed = time.monotonic() - began
        if sent < len(when) and passed >= when[sent]:
            os.kill(pid, getattr(signal, kill["signals"][sent]))
            sent += 1
        elif passed > request.get("timeout", 30):
            hung = True
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.002)
    until, left = time.monotonic() + 5, outlived(request["cwd"])
    while left and time.monotonic() < until:
        time.sleep(0.01)
        left = outlived(request["cwd"])
    for one in left:
        os.kill(one, signal.SIGKILL)
    signalled = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    changes = counted.read() if not counted.seek(0) else b""
    counted.close()
    return {
        "code": None if signalled else os.WEXITSTATUS(status),
        "signal": signalled,
        "changes": int(changes or 0),
        "hung": hung,
        "seconds": time.monotonic() - began,
        "left": left,
    }


def import_everything() -> None:
    """What libraries import at first use. Without a backward pass: autograd does not survive a fork."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        LlamaConfig,
        LlamaForCausalLM,
    )

    import keel.__main__
    import keel.cli.main
    import keel.plan.planner
    import keel.report
    import keel.rl.grpo
    import keel.rl.ppo
    import keel.stages.best_of_n
    import keel.stages.classifier
    import keel.stages.evaluate
    import keel.stages.preference
    import keel.stages.pretrain
    import keel.stages.sft  # noqa: F401

    torch.set_num_threads(1)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=8)).save_pretrained(folder)
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model(torch.tensor([[1, 2]]))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.zero_grad()
    gc.collect()
    gc.freeze()


def serve() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.dont_write_bytecode = True
    import_everything()
    print("{}", file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    serve()
