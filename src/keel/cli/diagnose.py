"""`keel diagnose`: findings in the logs of a run, of one stage, or of a run of TRL."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from keel.diagnosis import logs, speed
from keel.diagnosis.logs import Diagnosis
from keel.errors import DataError, UsageError
from keel.report import reading
from keel.report.health import action_sentence, said


def diagnose(path: Path) -> dict[str, Diagnosis]:
    """Stage → its diagnosis. UsageError for a path that is none of the three, DataError for a file that
    cannot be read, and for one that keel has not written."""
    with reading.readable(path):
        return _diagnose(path)


def _diagnose(path: Path) -> dict[str, Diagnosis]:
    if path.is_file():
        return {path.name: logs.trainer_state(path)}
    if (path / "config.yaml").exists():
        found: dict[str, Diagnosis] = {}
        for stage in reading.read(path).stages:
            seen = (
                stage.status not in ("not run yet", "out of date")
                or (stage.directory / "events.jsonl").exists()
            )
            if seen and stage.shown_as.on_policy:
                found[stage.name] = _timed(
                    logs.stage(stage.directory, stage.settings), stage.directory, stage.settings
                )
            elif seen and (timed := _timed(Diagnosis((), (), 0), stage.directory, stage.settings)).findings:
                found[stage.name] = replace(timed, steps=timed.findings[-1].step)
        return found
    if (path / "metrics.jsonl").exists() or (path / "events.jsonl").exists():
        settings = _settings(path)
        return {path.resolve().name: _timed(logs.stage(path, settings), path, settings)}
    if (path / "trainer_state.json").exists():
        return {path.resolve().name: logs.trainer_state(path / "trainer_state.json")}
    raise UsageError(
        f"nothing to diagnose at {path}: give a run (it has config.yaml), a stage of one (metrics.jsonl), "
        "or TRL's trainer_state.json"
    )


def _timed(found: Diagnosis, directory: Path, settings: Mapping[str, Any]) -> Diagnosis:
    """With what the stage's times say, as its last finding."""
    slow = speed.finding(logs.lines(directory / "times.jsonl"), settings)
    return found if slow is None else replace(found, findings=(*found.findings, slow))


def _settings(directory: Path) -> Mapping[str, Any]:
    """A stage's settings from its run's config; {} where it was taken out of its run."""
    config = directory.resolve().parents[1] / "config.yaml"
    try:
        tree = yaml.safe_load(config.read_text(encoding="utf-8")) if config.exists() else {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{config} cannot be read as YAML: {error}") from None
    stages = tree.get("stages") if isinstance(tree, dict) else None
    return (stages or {}).get(directory.resolve().name) or {}


def urgent(found: Mapping[str, Diagnosis]) -> bool:
    return any(finding.severity == "act" for one in found.values() for finding in one.findings)


def as_json(found: Mapping[str, Diagnosis]) -> str:
    """{"stages": {NAME: {"steps", "findings", "actions"}}}."""
    stages = {
        name: {
            "steps": one.steps,
            "findings": [asdict(f) for f in one.findings],
            "actions": [dict(a) for a in one.actions],
        }
        for name, one in found.items()
    }
    return json.dumps({"stages": stages}, ensure_ascii=False, indent=2)


def as_text(found: Mapping[str, Diagnosis]) -> str:
    """For each stage a line, then its findings with cause and remedy, then what was done."""
    if not found:
        return "no stage that learns from its own samples has written metrics yet"
    lines: list[str] = []
    for name, one in found.items():
        lines.append(f"{name}: {said(one) or 'no finding'} in {one.steps} steps")
        for finding in one.findings:
            lines += [
                f"  {finding.severity:<4}  {finding.check}, from step {finding.step}: {finding.evidence}",
                f"        likely: {finding.cause}",
                f"        remedy: {finding.remedy}",
            ]
        lines += [f"  done  {sentence}" for sentence in map(action_sentence, one.actions)]
    return "\n".join(lines)
