"""What a run has come to, by its directory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import keel
from keel.rundir.stage_files import read_mark, read_object

_VERSION = re.compile(r"\d+\.\d+")


def manifest(run: Path) -> dict[str, dict[str, Any]]:
    """What the manifest says of each stage."""
    stages = read_object(run / "manifest.json").get("stages")
    known = stages.items() if isinstance(stages, dict) else ()
    return {name: facts for name, facts in known if isinstance(facts, dict)}


def newer_keel(whole: Mapping[str, Any]) -> str | None:
    """The version of keel in a manifest, where it is newer than this one; None for any other, or none."""
    versions = whole.get("versions")
    found = versions.get("keel") if isinstance(versions, Mapping) else None
    if not isinstance(found, str) or not _VERSION.match(found) or len(found) > 40:
        return None
    return found if _order(found) > _order(keel.__version__) else None


def _order(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d{1,9}", version)[:3]]


def status(run: Path, name: str, facts: Mapping[str, Any]) -> str:
    """The manifest's status of a stage: "done", "done before", "not run"; "out of date" where what lies there
    was made with other settings, inputs or code than the manifest asks for."""
    mark = read_mark(run / "stages" / name)
    stale = mark is not None and mark != facts.get("fingerprint")
    return "out of date" if stale else str(facts.get("status", "not run"))


def results(run: Path) -> dict[str, Any]:
    """The results of the stages that are done with what the manifest asks for; never those of other
    settings."""
    paths = {
        name: run / "stages" / name / "result.json"
        for name, facts in manifest(run).items()
        if status(run, name, facts) in ("done", "done before")
    }
    return {name: read_object(path) for name, path in paths.items() if path.exists()}


class InDirectory(Protocol):
    """What works in a run directory, as a pipeline does."""

    directory: Path


def outcome(pipeline: InDirectory) -> dict[str, Any]:
    """The run for `--json`: its directory, its report, and of each stage what the manifest and its result
    say."""
    found = results(pipeline.directory)
    return {
        "run": str(pipeline.directory),
        "report": str(pipeline.directory / "report.html"),
        "stages": {
            name: {**facts, "result": found.get(name)} for name, facts in manifest(pipeline.directory).items()
        },
    }
