"""Code that a config brings, and the folders whose configs may bring some.

`reward: python:…` and `trust_remote_code` run code of whoever wrote the config or made the model. Nothing but
a run needs that: a plan reads the files instead. A person allows it once a folder; which folders those are
stands in a file of the user's (`$KEEL_STATE`, else `$XDG_STATE_HOME/keel`, else ~/.local/state/keel).
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from pathlib import Path

from keel.config import RunConfig
from keel.config.sampler import SamplerConfig
from keel.rewards import loading
from keel.rundir.checkpoint import write_json

_FILE = "trusted.json"
_PLAIN_FLAGS = frozenset(  # arguments of `vllm serve` that say how much and how fast, and load nothing
    {
        "--gpu-memory-utilization", "--tensor-parallel-size", "--pipeline-parallel-size",
        "--data-parallel-size", "--max-num-seqs", "--max-num-batched-tokens", "--kv-cache-memory-bytes",
        "--kv-cache-dtype", "--block-size", "--cpu-offload-gb", "--swap-space", "--enforce-eager",
        "--enable-prefix-caching", "--no-enable-prefix-caching", "--enable-chunked-prefill",
        "--no-enable-chunked-prefill", "--seed", "--quantization",
    }
)  # fmt: skip


def code_of(config: RunConfig) -> list[str]:
    """What a config would run besides keel and installed packages, a line each: "reward NAME: FILE (function
    F)", "model M: the Python that comes with it". Nothing is imported."""
    lines: list[str] = []
    for name, stage in config.stages.items():
        for term in stage.reward_terms():
            if term.kind == "python":
                file = loading.source_file(term.function)
                lines.append(f"{name}: reward {term.function}" + (f" ({file})" if file else ""))
            if term.kind == "code" and term.sandbox == "none":
                lines.append(f"{name}: programs that the model writes, as you (reward code, sandbox: none)")
        for code in stage.tool_code():
            file = loading.source_file(code)
            lines.append(f"{name}: tool or environment {code}" + (f" ({file})" if file else ""))
        lines += [f"{name}: {line}" for line in _of_server(getattr(stage, "rollout", None))]
        if stage.trusts_remote_code:
            models = [model for _, model in stage.references() if model not in config.stages]
            lines += [f"{name}: Python that comes with {model} (trust_remote_code)" for model in models]
    return list(dict.fromkeys(lines))


def _of_server(rollout: SamplerConfig | None) -> list[str]:
    """What a vLLM server that a config has keel start runs, beside the environment that keel installs."""
    if rollout is None or not rollout.vllm or rollout.address is not None:
        return []
    lines: list[str] = []
    if rollout.environment is not None:
        lines.append(f"programs in {rollout.environment} (rollout.environment)")
    flags = [argument.partition("=")[0] for argument in rollout.args if argument.startswith("-")]
    if any(flag.replace("_", "-") not in _PLAIN_FLAGS for flag in flags):
        lines.append(f"vllm serve {shlex.join(rollout.args)} (rollout.args: some load code)")
    return lines


def is_trusted(config: Path) -> bool:
    """Whether code of configs in this config's folder may be run: the user has said so once."""
    return str(_folder_of(config)) in _folders()


def remember(config: Path) -> Path:
    """Trust the folder that a config lies in from now on; returns it. A state folder that cannot be written
    is no error: the user is asked again."""
    folder = _folder_of(config)
    with contextlib.suppress(OSError):
        place = state_folder()
        place.mkdir(parents=True, exist_ok=True)
        write_json(place / _FILE, {"folders": sorted({*_folders(), str(folder)})})
    return folder


def state_folder() -> Path:
    """Where what keel remembers of its user lies."""
    named = os.environ.get("KEEL_STATE")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "keel"


def _folder_of(config: Path) -> Path:
    return config.expanduser().resolve().parent


def _folders() -> list[str]:
    try:
        known = json.loads((state_folder() / _FILE).read_text(encoding="utf-8"))
        return [folder for folder in known["folders"] if isinstance(folder, str)]
    except (OSError, ValueError, KeyError, TypeError):
        return []
