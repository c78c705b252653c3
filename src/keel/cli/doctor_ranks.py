"""`keel doctor --distributed`: whether ranks can work together here, how fast, and what to mend."""

from __future__ import annotations

import json
import socket
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import keel
from keel.api.terminal import show, show_json
from keel.cli import doctor_engine, ranks
from keel.cli import launch as launching
from keel.cli.checks import Check, in_lines
from keel.cli.progress import say
from keel.distributed import launch
from keel.distributed.launch import Node
from keel.errors import UsageError

SLOW = 1e8  # bytes a second between ranks below which a step of any model waits for its gradients
CLOCKS = 5.0  # seconds that machines may differ
GIB = 2**30


def examine(
    nproc: int | None,
    port: int,
    shared: Path | None,
    node: Node | None = None,
    engine: tuple[str, str | None] | None = None,
) -> dict[str, Any]:
    """Try all of it: `checks`, `ok`, and what was measured. nproc: ranks on this machine; None: one a card,
    two without cards. engine: a server's address, or vllm, and the variable with its key. Of several machines
    the first one's has all of it, the others have no checks."""
    count = nproc or max(2, torch.cuda.device_count())
    checks = [] if node else [_port(port)]
    with tempfile.TemporaryDirectory(prefix="keel-doctor-") as name:
        out = Path(name) / "found.json"
        command = [sys.executable, "-m", "keel.distributed.trial", str(out)]
        command += ["--version", keel.__version__]
        command += ["--shared", str(shared.resolve())] if shared else []
        outcome = launch.run(command, count, {"OMP_NUM_THREADS": "1"}, node)
        measured = json.loads(out.read_text(encoding="utf-8")) if out.exists() else None
    if measured is not None:
        checks += of_measured(measured)
        checks += [doctor_engine.examine(*engine)] if engine else []
    elif outcome.code and not outcome.lost:
        checks.append(Check("process group", False, outcome.line, _how_to_join(outcome.line)))
    facts = {"ok": all(check.ok for check in checks) and not outcome.code, "code": outcome.code}
    if outcome.lost:
        facts["lost"] = outcome.line
    return {**facts, "checks": [asdict(check) for check in checks], "measured": measured}


def _port(port: int) -> Check:
    """Whether the first machine could listen there."""
    with socket.socket(socket.AF_INET) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("", port))
        except OSError as error:
            mend = "choose another: keel launch --port, or MASTER_PORT for torchrun"
            return Check("port", False, f"{port} cannot be listened at: {error.strerror}", mend)
    return Check("port", True, f"{port} is free (for several machines)")


def _how_to_join(line: str) -> str:
    if "no card of its own" in line:
        return "give --nproc no more than the cards of this machine"
    if "trying to connect" in line or "refused" in line:
        return "open the port between the machines, or name the first one by an address that all reach"
    return (
        "let the machines reach each other on all ports, and name the network interface between them: "
        "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
    )


def of_measured(measured: dict[str, Any]) -> list[Check]:
    """What the ranks found, judged."""
    found, hosts = measured["ranks"], {}
    for rank in found:
        hosts.setdefault(rank["host"], []).append(rank)
    where = ", ".join(f"{len(own)} on {host}" for host, own in hosts.items())
    joined = f"{len(found)} ranks ({where}) by {measured['backend']} in {measured['seconds_to_join']:.1f} s"
    checks = [Check("process group", True, joined), _versions(found)]
    if len(hosts) > 1:
        checks += [_clocks(found), *_names(found)]
    checks += [_reduction(one, len(found)) for one in measured["reductions"]]
    if measured["shared"] is not None:
        checks += _shared(measured["shared"], len(hosts))
    return checks


def _versions(found: Sequence[dict[str, Any]]) -> Check:
    for name in ("keel", "torch", "python"):
        first, other = found[0], next((r for r in found if r[name] != found[0][name]), None)
        if other is not None:
            said = f"{name} {first[name]} on {first['host']}, {other[name]} on {other['host']}"
            return Check("versions", False, said, "install the same on all: numbers and checkpoints differ")
    return Check("versions", True, f"keel {found[0]['keel']}, torch {found[0]['torch']} on all ranks")


def _clocks(found: Sequence[dict[str, Any]]) -> Check:
    apart = max(r["time"] for r in found) - min(r["time"] for r in found)
    mend = "" if apart < CLOCKS else "set the machines' clocks (NTP)"
    return Check("clocks", not mend, f"{apart:.1f} s apart at most", mend)


def _names(found: Sequence[dict[str, Any]]) -> list[Check]:
    """Gloo listens where a machine's own name leads to."""
    wrong = [
        r["host"]
        for r in found
        if r["interface"] is None and (r["address"] is None or r["address"].startswith("127."))
    ]
    if not wrong:
        return []
    mend = "set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to its network interface, as `ip addr` names it"
    return [Check("names", False, f"{wrong[0]} finds itself at a loopback address", mend)]


def _reduction(one: dict[str, Any], ranks: int) -> Check:
    size, seconds, rate = int(one["bytes"]), one["seconds"], one["bytes_per_second"]
    name = f"all-reduce of {_size(size)}"
    if one["wrong"]:
        return Check(
            name, False, f"{one['wrong']} sums are wrong", "try other cards, drivers or NCCL_P2P_DISABLE=1"
        )
    said = f"{seconds * 1e3:.2f} ms"
    if size < 2**20:
        return Check(name, True, said)
    said += f", {rate / 1e9:.2f} GB/s in and out of a rank"
    if size >= 2**25:
        gradients = 2 * (ranks - 1) / ranks * 4e9 / rate
        said += f": float32 gradients of 1 B weights take {gradients:.1f} s a step"
    slow = rate < SLOW and size > 2**20
    mend = "use a faster network between the machines, or adapters (`lora`), whose gradients are few"
    return Check(name, not slow, said, mend if slow else "")


def _shared(found: dict[str, Any], hosts: int) -> list[Check]:
    folder = found["folder"]
    if found["failed"]:
        rank, why = next(iter(found["failed"].items()))
        mend = "give a folder that all machines have mounted at the same path, and may write to"
        return [Check("shared folder", False, f"{folder}, rank {rank}: {why}", mend)]
    said = (
        f"{folder}: files are seen after {found['seconds']:.2f} s, {found['free_bytes'] / GIB:.1f} GiB free"
    )
    checks = [Check("shared folder", True, said)]
    if not found["locks"]:
        mend = (
            "mount it with locks (NFS: without nolock), or see to it that no two runs write to one run folder"
        )
        checks.append(Check("locks", False, f"a lock of one rank does not hold for others on {folder}", mend))
    return checks


def _size(size: int) -> str:
    return f"{size // 2**20} MiB" if size >= 2**20 else f"{size // 2**10} KiB"


@dataclass(frozen=True, slots=True)
class Asked:
    """The options of the command."""

    nproc: int | None
    shared: Path | None
    nodes: str | None
    port: int
    ssh: list[str]
    node: str | None
    as_json: bool
    engine: str | None = None
    key_env: str | None = None


def command(asked: Asked, model: str | None = None) -> int:
    """Try ranks here, or on all hosts of a file, and show what was found; the exit code."""
    if model is not None:
        raise UsageError("--distributed looks at machines, not at a model: leave MODEL out")
    if asked.engine is not None:
        doctor_engine.checked(asked.engine, asked.key_env if asked.nodes is None else None)
    elif asked.key_env is not None:
        raise UsageError("--api-key-env has no effect without --engine")
    more = [] if asked.shared is None else ["--shared", str(asked.shared)]
    more += [] if asked.engine is None else ["--engine", asked.engine]
    more += [] if asked.key_env is None else ["--api-key-env", asked.key_env]
    if asked.nodes is not None:
        if asked.node is not None:
            raise UsageError("--node says which of several machines this is: with --nodes leave it out")
        found = launching.parts(launching.hosts_of(asked.nodes), asked.nproc, asked.port)
        words = ["doctor", "--distributed", *more, *(["--json"] if asked.as_json else [])]
        return launching.ended(launching.run(found, words, asked.ssh, plain=True))
    node = Node.parse(asked.node) if asked.node else None
    if asked.nproc is not None:
        ranks.check(asked.nproc)
        if asked.nproc == 1 and node is None:
            raise UsageError("--nproc 1: there is nothing to try with one rank")
    if asked.shared is not None and not asked.shared.is_dir():
        raise UsageError(f"--shared {asked.shared}: there is no such folder")
    engine = None if asked.engine is None else (asked.engine, asked.key_env)
    facts = examine(asked.nproc, asked.port, asked.shared, node, engine)
    if line := facts.pop("lost", None):
        say(f"keel: {line}")
        return ranks.LOST
    if facts["checks"]:
        show_json(facts) if asked.as_json else show(in_lines(facts["checks"]))
    return facts["code"] or int(not facts["ok"])
