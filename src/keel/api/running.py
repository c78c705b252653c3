# pyright: strict
"""`keel.run` and `keel.plan_run`: the pipeline from a script or a notebook."""

from __future__ import annotations

import json
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from keel.api.frames import data_frame
from keel.api.progress import Progress, TextProgress
from keel.api.results import Run
from keel.config import RunConfig, parse, read, recipes
from keel.errors import UsageError

if TYPE_CHECKING:
    from keel.api.frames import DataFrame
    from keel.pipeline.pipeline import Pipeline

Config = str | PathLike[str] | Mapping[str, Any]
DEFAULT_NAME = "run"  # of a run whose config is a mapping of stages alone


def run(
    config: Config,
    *overrides: str,
    runs: str | PathLike[str] = "runs",
    name: str | None = None,
    only: str | None = None,
    fresh: bool = False,
    progress: bool | Progress = True,
) -> Run:
    """Run every stage of a config; skip what is done and unchanged, go on with what was cut off.

    config: the path of a YAML file, the name of a recipe ("helpdesk"), a mapping that holds a whole config,
    or a mapping from stage names to their settings. overrides: "dotted.key=value" as on the command line.
    runs: the folder of run directories. name: of the run and its directory; default: the config's, "run" for
    bare stages. only: run this stage alone; its inputs must be done. fresh: forget what was done before.

    progress: True writes progress to standard error, or into a notebook's cell; False is silent; a function
    is called after each step with (stage, step, steps, metrics), and what keel has to say is still written.

    Returns the run, finished. Raises UsageError (DataError for a row) before anything is trained if the
    config, a model or the data are unusable; RewardError, NotFiniteError, WaitingError as their names say. A
    KeyboardInterrupt, or anything else that ends it early, loses at most the steps since the last checkpoint:
    the same call goes on from there. No signal handler is installed and no event loop is needed or disturbed.
    """
    with _pipeline(config, overrides, runs, name, progress) as pipeline:
        pipeline.run(only=only, fresh=fresh)
        return Run(pipeline.directory)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a config would do; `print` shows it as text."""

    entries: tuple[Mapping[str, Any], ...]  # one a stage, in order: rows, tokens, steps, parameters, memory …

    def table(self) -> DataFrame:
        """One row a stage: kind, rows, tokens, steps, parameters and `memory_gb`, its peak (10⁹ bytes)."""
        kept = ("kind", "rows", "tokens", "steps", "episodes", "parameters")
        rows = [
            {
                "stage": entry["stage"],
                **{key: entry.get(key) for key in kept},
                "memory_gb": entry["memory"]["peak"] / 1e9 if entry["memory"] else None,
            }
            for entry in self.entries
        ]
        return data_frame(rows, "stage")

    def __str__(self) -> str:
        from keel.plan import text

        return text.as_text([dict(entry) for entry in self.entries])


def plan_run(
    config: Config, *overrides: str, runs: str | PathLike[str] = "runs", name: str | None = None
) -> Plan:
    """What `run` with these arguments would do: data found, tokens, steps, parameters, memory. Trains nothing
    and writes nothing. Raises UsageError and DataError as `run` does. Code that a config's file brings
    (`python:` rewards, models with `trust_remote_code`) is not run, unless the user has trusted its folder;
    that of a mapping, which is written in Python itself, is."""
    with _pipeline(config, overrides, runs, name, False) as pipeline:
        from keel.pipeline import trust
        from keel.plan import planner

        if not isinstance(config, Mapping):
            pipeline.sources.code = trust.is_trusted(recipes.config_path(Path(config)))
        return Plan(tuple(planner.plan(pipeline)))


# ---------------------------------------------------------------- parts


@contextmanager
def _pipeline(
    config: Config,
    overrides: tuple[str, ...],
    runs: str | PathLike[str],
    name: str | None,
    progress: bool | Progress,
) -> Generator[Pipeline]:
    """The pipeline of a config, with torch's own warnings kept from the user while it works."""
    settings = read_config(config, overrides, name)
    try:
        from keel.pipeline.pipeline import Pipeline
        from keel.plan import disk, planner
    except ModuleNotFoundError as error:
        if error.name != "fcntl":
            raise
        raise UsageError(
            "training needs file locks that this system lacks (fcntl): use Linux, macOS or WSL; reading "
            "runs, scoring, sampling and the losses work here"
        ) from error
    text = TextProgress()
    pipeline = Pipeline(
        settings,
        Path(runs) / settings.name,
        _silent if progress is False else text.say,
        fit=planner.micro_batch,
        room=disk.room,
    )
    if progress is not False:
        pipeline.progress = text if progress is True else progress
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")
        try:
            yield pipeline
        finally:
            text.close()


def read_config(config: Config, overrides: tuple[str, ...] = (), name: str | None = None) -> RunConfig:
    """The validated config that `run` means by its arguments. UsageError names what is wrong with it."""
    wanted = [*overrides, *([f"name={json.dumps(name)}"] if name is not None else [])]
    if not isinstance(config, Mapping):
        return read(recipes.config_path(Path(config)), wanted)
    return parse(_whole(_plain(config)), "config", wanted)


def _whole(tree: dict[str, Any]) -> dict[str, Any]:
    """A mapping of stages alone as a whole config."""
    stages_alone = bool(tree) and all(isinstance(value, dict) and "kind" in value for value in tree.values())
    return {"name": DEFAULT_NAME, "stages": tree} if stages_alone else tree


def _plain(value: Any) -> Any:
    """A copy in the types that YAML has: paths as text, tuples as lists."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in cast("Sequence[Any]", value)]
    return fspath(cast("PathLike[str]", value)) if isinstance(value, PathLike) else value


def _silent(line: str) -> None:
    """Says nothing."""
