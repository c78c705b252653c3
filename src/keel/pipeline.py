"""The stage graph: joined by artifacts, cached by content, resumable anywhere.

A stage is done when its `stage.json` is there and carries the fingerprint of what it would be run with now: its
settings, its inputs' fingerprints, its data's content, the seed and the code. Everything else is run, or gone on with.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from difflib import get_close_matches
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

import keel
from keel import report, worlds
from keel.checkpoint import discard, write_json, write_text
from keel.config import AnyStage, EvaluateConfig, PPOConfig, RunConfig, Stage, Supervised, Training
from keel.data import chat, load
from keel.data.batches import derive_seed
from keel.models.load import ModelSource, context_length, model_config
from keel.rewards import learned
from keel.runlog import Progress, StageRun
from keel.stages import evaluate, ppo, pretrain, reward, sft
from keel.types import DataError, DataSource, KeelError, PromptRecord, RecordType, UsageError

VERSIONS = ("torch", "transformers", "tokenizers", "peft", "safetensors", "numpy")
ACCEPTS: Mapping[str, tuple[RecordType, ...]] = {
    "pretrain": ("text",), "sft": ("demonstration", "text"), "reward": ("preference",), "ppo": ("prompt",), "evaluate": ("prompt",),
}  # fmt: skip


@dataclass
class Pipeline:
    """A config bound to a run directory."""

    config: RunConfig
    directory: Path
    say: Callable[[str], None] = print
    progress: Progress = lambda stage, step, steps, metrics: None
    _data: dict[str, load.Dataset] = field(default_factory=dict)
    _prints: dict[str, str] = field(default_factory=dict)

    # ------------------------------------------------------------ what the stages are given

    def stage_directory(self, name: str) -> Path:
        return self.directory / "stages" / name

    def resolve(self, name: str) -> str:
        """Where a model named in the config lies. UsageError for a path that is not there."""
        if name in self.config.stages:
            return str(self.stage_directory(name) / "model")
        path = Path(name).expanduser()
        if path.exists():
            return str(path)
        close = get_close_matches(name, list(self.config.stages), n=1, cutoff=0.75)
        looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
        if looks_local or close:
            hint = f"; did you mean the stage {close[0]!r}?" if close else ""
            raise UsageError(f"no stage, folder or hub model {name!r}{hint}")
        return name

    def load_data(self, sources: Sequence[DataSource], accept: Sequence[RecordType]) -> load.Dataset:
        """The validated rows; read once a run."""
        key = json.dumps([[repr(source) for source in sources], list(accept)])
        if key not in self._data:
            self._data[key] = load.load(sources, accept, self.config.seed)
        return self._data[key]

    # ------------------------------------------------------------ checks and fingerprints

    def check(self, names: Sequence[str], *, hub: bool = False) -> dict[str, str]:
        """Read and validate all data and find all models before anything is trained. Returns a summary line a stage.

        hub: also ask the hub for the configs of models that are not on this machine.
        """
        device_of(self.config)
        for name in names:
            self._check_models(name, hub)
        lines: dict[str, str] = {}
        for name in names:
            stage = self.config.stages[name]
            for sources, accept in data_of(stage):
                dataset = self.load_data(sources, accept)
                lines.setdefault(name, load.summary(dataset))
            if isinstance(stage, EvaluateConfig) and stage.gold:
                self._check_gold(stage)
        return lines

    def _check_models(self, name: str, hub: bool) -> None:
        """Every model that no stage makes is there and of the right sort, and sequences fit the one that is used."""
        stage = self.config.stages[name]
        for setting, source in stage.references():
            place = self.resolve(source)
            if source not in self.config.stages and (hub or Path(place).exists()):
                found = model_config(self._source(stage, setting, place))
                if setting == "reward":
                    learned.check_config(found, place)
        context = self.context(name, hub)
        longest = getattr(stage, "max_length", None)
        if longest is not None and context is not None and longest > context:
            raise UsageError(f"{name}: max_length {longest} exceeds the model's context of {context}")
        room = longest or context
        if room is not None and isinstance(stage, PPOConfig | EvaluateConfig):
            wanted = stage.sampling.max_new_tokens
            if wanted >= room:
                raise UsageError(
                    f"{name}: sampling.max_new_tokens {wanted} leaves no room for a prompt within {room} tokens"
                )

    def context(self, name: str, hub: bool = False) -> int | None:
        """The context of the model that stage `name` works on, found at the root of its chain; None where unknown."""
        stage = self.config.stages[name]
        model = stage.model if isinstance(stage, Training) else None
        path = model.path if model else stage.inputs()[0]
        if path in self.config.stages:
            return self.context(path, hub)
        if path is not None and not (hub or Path(self.resolve(path)).exists()):
            return None
        return context_length(model_config(self._source(stage, "model", path and self.resolve(path))))

    def _source(self, stage: AnyStage, setting: str, place: str | None) -> ModelSource:
        model = stage.model if isinstance(stage, Training) else None
        init = model.init.model_dump() if model and model.init and setting == "model" else None
        revision = model.revision if model and setting == "model" else None
        return ModelSource(
            place, init, trust_remote_code=bool(model and model.trust_remote_code), revision=revision
        )

    def _check_gold(self, stage: EvaluateConfig) -> None:
        """The world can judge replies to these prompts. DataError at the first that it cannot."""
        world = worlds.load(str(stage.gold).removeprefix("world:").partition("/")[0])
        for record in self.load_data(*data_of(stage)[0]).records:
            if isinstance(record, PromptRecord):
                try:
                    world.gold(chat.user_text(record.prompt), "", record.columns)
                except DataError as error:
                    raise DataError(
                        f"{record.origin}: {stage.gold} cannot judge replies to it: {error}"
                    ) from None

    def fingerprint(self, name: str) -> str:
        """What this stage would be run with, as a hash."""
        if name not in self._prints:
            stage = self.config.stages[name]
            parts = {
                "settings": stage.model_dump(mode="json"),
                "seed": derive_seed(self.config.seed, name),
                "threads": self.config.threads,
                "inputs": {source: self.input_print(source) for source in stage.inputs()},
                "data": [load.fingerprint(sources) for sources, _ in data_of(stage)],
                "world seed": self.config.seed,
                "code": code_print(),
                "versions": {package: version(package) for package in VERSIONS},
            }
            self._prints[name] = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        return self._prints[name]

    def input_print(self, name: str) -> str:
        """A model's identity: its stage's fingerprint, its files' content, or its hub id."""
        if name in self.config.stages:
            return self.fingerprint(name)
        path = Path(self.resolve(name))
        return folder_print(path) if path.exists() else name

    def is_done(self, name: str) -> bool:
        path = self.stage_directory(name) / "stage.json"
        return path.exists() and json.loads(path.read_text(encoding="utf-8"))[
            "fingerprint"
        ] == self.fingerprint(name)

    # ------------------------------------------------------------ running

    def run(self, *, only: str | None = None, fresh: bool = False) -> None:
        """Run what is not done. UsageError before anything is touched if a setting, a model or a row is unusable."""
        stages = self.config.stages
        if only is not None and only not in stages:
            raise UsageError(f"no stage {only!r}; the config has {', '.join(stages)}")
        names = [only] if only else list(stages)
        for source in (s for s in (stages[only].inputs() if only else ()) if s in stages):
            if not self.is_done(source):
                raise UsageError(
                    f"--only {only}: its input {source!r} is not done with these settings; run the whole config first"
                )
        for name, line in self.check(names, hub=True).items():
            self.say(f"{name}: {line}")
        self.directory.mkdir(parents=True, exist_ok=True)
        with self._locked(), _deterministic(self.config):
            if fresh:
                for name in names:
                    discard(self.stage_directory(name))
            write_text(
                self.directory / "config.yaml",
                yaml.safe_dump(resolved(self.config), sort_keys=False, allow_unicode=True),
            )
            states: dict[str, str] = {}
            self._write_manifest(states)
            for name in names:
                states[name] = "done before" if self.is_done(name) else "running"
                if states[name] == "running":
                    self._run_stage(name)
                    states[name] = "done"
                else:
                    self._clear_up(name)  # a kill right after the mark of being done leaves this undone
                    self.say(f"{name}: done before, unchanged")
                self._write_manifest(states)
                self._report()

    def _run_stage(self, name: str) -> None:
        """1. a directory of this fingerprint  2. the stage  3. its mark of being done, last."""
        stage, directory, fingerprint = (
            self.config.stages[name],
            self.stage_directory(name),
            self.fingerprint(name),
        )
        started = directory / "fingerprint"
        if not started.exists() or started.read_text(encoding="utf-8") != fingerprint:
            discard(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_text(started, fingerprint)
        (directory / "stage.json").unlink(missing_ok=True)
        run = StageRun(
            name,
            directory,
            derive_seed(self.config.seed, name),
            device_of(self.config),
            self.resolve,
            self.load_data,
            self.say,
            self.progress,
        )
        start = time.perf_counter()
        result = _dispatch(stage, run)
        run.result(result)
        seconds = round(time.perf_counter() - start, 2)
        summary = "; ".join(
            load.summary(self.load_data(sources, accept)) for sources, accept in data_of(stage)[:1]
        )
        done = {
            "kind": stage.kind,
            "fingerprint": fingerprint,
            "seconds": seconds,
            "rows": run.facts.get("rows"),
        }
        write_json(
            directory / "stage.json",
            {**done, "parameters": run.facts.get("parameters"), "data": summary, "facts": run.facts},
        )
        self._clear_up(name)
        gc.collect()
        self.say(f"{name}: done in {seconds:.1f} s")

    def _report(self) -> None:
        """A page that cannot be drawn must not cost a trained model."""
        try:
            report.write(self.directory)
        except Exception as error:
            self.say(
                f"the report could not be written ({type(error).__name__}: {error}); `keel report` shows why"
            )

    def _clear_up(self, name: str) -> None:
        """A stage that is done needs no checkpoints."""
        shutil.rmtree(self.stage_directory(name) / "checkpoints", ignore_errors=True)

    def _write_manifest(self, states: Mapping[str, str]) -> None:
        path = self.directory / "manifest.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        stages: dict[str, Any] = {}
        for name, stage in self.config.stages.items():
            done = self.stage_directory(name) / "stage.json"
            facts = json.loads(done.read_text(encoding="utf-8")) if done.exists() else {}
            current = facts.get("fingerprint") == self.fingerprint(name)
            stages[name] = {
                "kind": stage.kind, "fingerprint": self.fingerprint(name), "inputs": {s: self.input_print(s) for s in stage.inputs()},
                "seconds": facts.get("seconds") if current else None, "status": states.get(name, "done" if current else "not run"),
            }  # fmt: skip
        manifest = {
            "name": self.config.name, "seed": self.config.seed, "created": before.get("created", _now()), "updated": _now(),
            "versions": {"keel": keel.__version__, "python": platform.python_version(), **{p: version(p) for p in VERSIONS}},
            "hardware": hardware(self.config), "code": code_print(), "stages": stages,
        }  # fmt: skip
        write_json(path, manifest)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One process a run directory; the lock ends with the process, however that ends."""
        with (self.directory / ".lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise KeelError(f"another process is working in {self.directory}") from None
            yield


def _dispatch(stage: AnyStage, run: StageRun) -> dict[str, Any]:
    match stage.kind:
        case "pretrain":
            return pretrain.run(stage, run)
        case "sft":
            return sft.run(stage, run)
        case "reward":
            return reward.run(stage, run)
        case "ppo":
            return ppo.run(stage, run)
        case "evaluate":
            return evaluate.run(stage, run)


def data_of(stage: Stage) -> list[tuple[list[DataSource], tuple[RecordType, ...]]]:
    """Every data setting of a stage, with the record types it can use; the main one first."""
    assert isinstance(stage, Training | EvaluateConfig)
    found = [(stage.data, ACCEPTS[stage.kind])]
    if isinstance(stage, Supervised) and stage.eval_data:
        found.append((stage.eval_data, ACCEPTS[stage.kind]))
    if isinstance(stage, PPOConfig) and stage.eval_data:
        found.append((stage.eval_data, ("prompt",)))
    if isinstance(stage, PPOConfig) and stage.ptx:
        found.append((stage.ptx.data, ("text",)))
    if isinstance(stage, EvaluateConfig) and stage.comparisons:
        found.append((stage.comparisons, ("preference",)))
    return [([source.plain() for source in sources], accept) for sources, accept in found]


def resolved(config: RunConfig) -> dict[str, Any]:
    """The config with every default written out."""
    return config.model_dump(mode="json")


def device_of(config: RunConfig) -> torch.device:
    """The device the config means. UsageError if it is not there."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"  # sampling needs float64, which mps lacks
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def hardware(config: RunConfig) -> dict[str, Any]:
    device = device_of(config)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "device": str(device), "name": name, "cores": os.cpu_count(), "threads": config.threads or torch.get_num_threads(),
        "memory_gib": round(memory / 2**30, 1), "system": platform.platform(),
    }  # fmt: skip


@lru_cache(maxsize=1)
def code_print() -> str:
    """A hash of the code that results depend on: all of keel but the report and the other commands."""
    root, digest = Path(keel.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if place.parts[0] not in ("report", "cli.py", "chatting.py", "planning.py"):
            digest.update(f"{place}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def folder_print(folder: Path) -> str:
    """A hash of a model folder's content; files above 256 MiB by size and time of change."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        state = path.stat()
        digest.update(f"{path.relative_to(folder)}\0{state.st_size}\0".encode())
        digest.update(str(state.st_mtime_ns).encode() if state.st_size > 2**28 else path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _deterministic(config: RunConfig) -> Iterator[None]:
    """Deterministic kernels and a fixed number of threads, as long as the run lasts."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(config.threads or threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = (  # pyright: ignore[reportAttributeAccessIssue]
        False  # costs time, and nothing here reads memory it has not written
    )
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
