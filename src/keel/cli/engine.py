"""`keel engine`: a vLLM server for rollouts: its environment, and one that is started by hand."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from keel.api.terminal import show
from keel.cli.progress import say
from keel.errors import EngineError, UsageError

DTYPES = ("auto", "float32", "bfloat16", "float16")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

app = typer.Typer(no_args_is_help=True, help="vLLM as rollout engine: install it, serve a model.")

PlaceOption = Annotated[
    Path | None,
    typer.Option("--at", help="The environment's folder; default: KEEL_ENGINES, or the user's own."),
]


@app.command("install")
def install(
    engine: Annotated[str, typer.Argument(help="What to install: vllm.")],
    at: PlaceOption = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda: which package.")] = "auto",
    python: Annotated[
        str | None, typer.Option(help="Interpreter to make it with; default: this one.")
    ] = None,
    index: Annotated[
        list[str] | None,
        typer.Option("--index", help='A further package index in place of PyTorch\'s for cpu; "": none.'),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be installed, and where.")
    ] = False,
) -> None:
    """Make an environment of its own with a pinned vLLM: some gigabytes on CUDA, one on the CPU."""
    from keel.rollout.vllm import server

    if engine != "vllm":
        raise UsageError(f"keel installs no engine {engine!r}; there is vllm")
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {device!r}: it is auto, cpu or cuda")
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = (at or server.default_place()).expanduser().resolve()
    pytorch = [server.TORCH_INDEX] if device == "cpu" else []
    indexes = pytorch if index is None else [one for one in index if one]
    if dry_run:
        show(f"{server.PINS[device]} in {place}" + "".join(f", also from {one}" for one in indexes))
        return
    say(f"{server.PINS[device]} goes into {place}")
    version = server.install(place, device, python=python or sys.executable, indexes=indexes)
    show(f"vLLM {version} is installed in {place}")


@app.command("serve")
def serve(
    model: Annotated[str, typer.Argument(help="What the policy starts from: a folder, a hub id or a stage.")],
    host: Annotated[
        str, typer.Option(help="Address to listen at. Weights can be changed by whoever reaches it.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    lora_rank: Annotated[
        int | None, typer.Option("--lora-rank", min=1, max=512, help="Take adapters up to this rank.")
    ] = None,
    length: Annotated[
        int | None, typer.Option("--length", min=2, help="Tokens of a prompt and its response.")
    ] = None,
    devices: Annotated[str | None, typer.Option(help="Cards, by number: 0 or 2,3.")] = None,
    sleep: Annotated[bool, typer.Option("--sleep", help="It can sleep while keel trains (CUDA).")] = False,
    api_key_env: Annotated[
        str | None, typer.Option(help="Variable with the key that requests must bear.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code of the model's.")
    ] = False,
    at: PlaceOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the command, and run nothing.")] = False,
    more: Annotated[
        list[str] | None, typer.Argument(help="Further arguments of `vllm serve`, behind --.")
    ] = None,
) -> None:
    """Start a vLLM server as keel needs it, for `rollout: {engine: vllm, address: …}`. Ctrl-C ends it."""
    from keel.rollout.vllm import server
    from keel.rollout.vllm.weights import RANKS

    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: it is {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    if devices is not None and not re.fullmatch(r"\d+(,\d+)*", devices):
        raise UsageError(f"--devices {devices}: write the numbers of cards: 0 or 2,3")
    key = None
    if api_key_env is not None and not (key := os.environ.get(api_key_env, "").strip()):
        raise UsageError(f"the environment variable {api_key_env} (--api-key-env) is not set")
    if host not in ("127.0.0.1", "localhost", "::1"):
        say(
            "keel: note: vLLM's key does not guard the routes that change weights: whoever reaches "
            f"{host}:{port} can use them. Open it to machines that you trust"
        )
    rank = None if lora_rank is None else next(one for one in RANKS if one >= lora_rank)
    launch = server.Launch(
        server.program_of(at), _model(model), dtype, length, rank, host, port, devices, sleep,
        trust_remote_code, tuple(more or ()),
    )  # fmt: skip
    command = launch.command(port)
    if dry_run:
        variables = [f"{k}={shlex.quote(v)}" for k, v in server.shown_environment(launch).items()]
        show(" ".join([*variables, shlex.join(command)]))
        return
    raise typer.Exit(_run(server.Server(launch, Path("/dev/stderr"), key or ""), host, port))


def _run(one: object, host: str, port: int) -> int:
    """Serve until somebody ends it; the exit code."""
    from keel.rollout.vllm.server import Server, reached_at, wait_until_ready
    from keel.rollout.vllm.wire import Wire

    assert isinstance(one, Server)
    one.start()
    try:
        wait_until_ready(Wire(one.address, one.key or None), 3600.0, lambda: one.alive, lambda: "see above")
        name = name_for_others() if host in ("0.0.0.0", "", "::") else reached_at(host)
        say(f'rollout: {{engine: vllm, address: "http://{name}:{port}"}}')
        while one.alive:
            time.sleep(0.5)
        raise EngineError("the vLLM server ended; what it said stands above")
    finally:
        one.stop()


def name_for_others() -> str:
    """This machine, as another reaches it: its name where that leads to it, else the address that it speaks
    to others from (no packet is sent)."""
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        if not ipaddress.ip_address(socket.gethostbyname(name)).is_loopback:
            return name
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward:
        outward.connect(("192.0.2.1", 9))  # an address of no machine (RFC 5737)
        return outward.getsockname()[0]
    return name


def _model(name: str) -> str:
    """A folder or a hub id; of a stage's folder the model in it."""
    inside = Path(name) / "model"
    if not Path(name).is_dir() and (Path(name).is_absolute() or not _HUB_ID.fullmatch(name)):
        raise UsageError(f"there is no folder {name}, and no model of the hub is called so")
    return str(inside) if (inside / "config.json").exists() else name
