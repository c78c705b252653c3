"""What a stage's results depend on besides its config: code, versions, plug-ins, models from outside.

Of keel's own code a stage's fingerprint holds the modules that its kind uses, each with a hash of what it
does: an edit in `rl/` leaves pretraining done, one in `report/` leaves everything done, and a comment changes
nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from keel import plugins
from keel.config import Stage
from keel.pipeline import code_graph
from keel.pipeline.stage_kinds import OWN_KINDS, StageKind, Target, kind_of, resolve

VERSIONS = ("torch", "transformers", "tokenizers", "peft", "safetensors", "numpy")
# What the pipeline itself does for every stage: it reads its rows, and chooses kernels and threads.
FOR_ALL = ("keel.data.load", "keel.pipeline.device")
# What a run is timed by, which changes no result.
TIMING = ("keel.user_cache", "keel.models.machine_speed", "keel.models.phase_cost")
BY_CONTENT = "keel.votes"  # what it gives is part of a fingerprint by its content, so its code need not be


def versions() -> dict[str, str]:
    """Versions of the libraries that results depend on."""
    numbers = dict(_imported())
    with contextlib.suppress(PackageNotFoundError):  # which may come while a notebook runs
        numbers["bitsandbytes"] = version("bitsandbytes")
    return numbers


@cache
def _imported() -> Mapping[str, str]:
    """Read once: a process keeps those that it has imported."""
    return {package: version(package) for package in VERSIONS}


def modules_of(kind: StageKind) -> set[str]:
    """The modules of keel that the results of a kind depend on."""
    graph = code_graph.of_keel()
    module, source = _home(kind.run)
    if module in graph.modules():
        used = graph.used_by([module, *FOR_ALL], TIMING)
    else:
        used = graph.used_by(FOR_ALL, TIMING) | (graph.used_by_file(source, TIMING) if source else set())
    return {name for name in used if not name.startswith(BY_CONTENT)}


def code_prints(kind: str) -> dict[str, str]:
    """File of keel → hash of its code, for each that the results of a kind depend on."""
    return code_graph.of_keel().prints(modules_of(kind_of(kind)))


def code_print(kinds: Iterable[str]) -> str:
    """One hash of all code that these kinds depend on, for the manifest."""
    prints = {file: text for kind in kinds for file, text in code_prints(kind).items()}
    return hashlib.sha256(repr(sorted(prints.items())).encode()).hexdigest()


def plugin_prints(stage: Stage) -> dict[str, str]:
    """ "group name" → hash, for each object of another package that a stage uses: its kind, its rewards, and
    what its config's `plugins()` names."""
    used: list[tuple[plugins.Group, str]] = []
    if stage.kind not in OWN_KINDS:
        used.append(("keel.stages", stage.kind))
    for term in stage.reward_terms():
        if term.kind == "plugin":
            used.append(("keel.rewards", term.function))
    used += getattr(stage, "plugins", list)()
    return {f"{group} {name}": plugins.fingerprint(group, name) for group, name in dict.fromkeys(used)}


def folder_print(folder: Path) -> str:
    """A hash of a model folder's content; files above 256 MiB by size and time of change."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        state = path.stat()
        digest.update(f"{path.relative_to(folder)}\0{state.st_size}\0".encode())
        digest.update(str(state.st_mtime_ns).encode() if state.st_size > 2**28 else path.read_bytes())
    return digest.hexdigest()


def model_print(place: str) -> str:
    """A hash of a folder's content, or a hub id as it is."""
    path = Path(place).expanduser()
    return folder_print(path) if path.exists() else place


def _home(target: Target) -> tuple[str, Path | None]:
    """The module that a run function stands in, and its file where it is no module of keel."""
    if isinstance(target, str):
        module = target.partition(":")[0]
        if module.partition(".")[0] == "keel":
            return module, None
        target = resolve(target)
    module = inspect.unwrap(target).__module__
    source = inspect.getsourcefile(inspect.unwrap(target))
    return module, Path(source) if source else None
