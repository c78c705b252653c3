# pyright: strict
"""MLflow, by its own client (mlflow-skinny is enough)."""

# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from keel.trackers.protocol import NOTHING, Frame, TrackedStage, finding_text, flat

_AT_ONCE = 1000  # metrics that a server takes in one request
_PARAMS = 100
_STAGE_TAG, _STEP_TAG = "keel.id", "keel.step"


class Mlflow:
    """One run a stage, found again by a tag with its id."""

    def __init__(self, uri: str | None = None, experiment: str = "keel") -> None:
        self._client: Any = MlflowClient(tracking_uri=uri)
        self._experiment_name = experiment
        self._run = ""
        self._place = ""

    def open(self, stage: TrackedStage) -> int | None:
        """As of `Tracker`. The last step is a tag that each request brings with it."""
        found = self._client.get_experiment_by_name(self._experiment_name)
        if found is None:
            experiment = self._client.create_experiment(self._experiment_name)
        else:
            experiment = found.experiment_id
        self._place = f"experiment {self._experiment_name} of {self._client.tracking_uri}"
        wanted = f"tags.`{_STAGE_TAG}` = '{stage.id}-{stage.name}'"
        known = self._client.search_runs([experiment], filter_string=wanted, max_results=1)
        if known:
            self._run = known[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return int(known[0].data.tags.get(_STEP_TAG, NOTHING))
        tags = {_STAGE_TAG: f"{stage.id}-{stage.name}", "keel.run": stage.run, "keel.kind": stage.kind}
        run = self._client.create_run(experiment, tags=tags, run_name=f"{stage.run}/{stage.name}")
        self._run = run.info.run_id
        params = [Param(key[:250], text[:500]) for key, text in _params(stage.settings).items()]
        for start in range(0, len(params), _PARAMS):
            self._client.log_batch(self._run, params=params[start : start + _PARAMS])
        return NOTHING

    def where(self) -> str:
        """As of `Tracker`."""
        return self._place

    def send(self, frames: Sequence[Frame]) -> None:
        """As of `Tracker`. Numbers of a step, and the tag that says so, arrive in one request."""
        now = int(1000 * time.time())
        batch: list[Any] = []
        last: int | None = None
        for frame in frames:
            if len(batch) + len(frame.numbers) > _AT_ONCE:
                self._log(batch, last)
                batch = []
            batch += [Metric(_key(name), value, now, frame.step) for name, value in frame.numbers.items()]
            last = frame.step if frame.numbers else last
        self._log(batch, last)
        for frame in frames:
            self._artifact("samples", frame.step, frame.samples)
            self._artifact("findings", frame.step, frame.findings)
            for row in frame.findings:
                title, text, urgent = finding_text(row)
                if urgent:
                    self._client.set_tag(
                        self._run, f"finding.{_key(title)}", f"step {frame.step}: {text}"[:500]
                    )

    def result(self, step: int, measures: Mapping[str, float]) -> None:
        """As of `Tracker`: metrics `result/…` at the last step."""
        now, items = int(1000 * time.time()), list(measures.items())
        for start in range(0, len(items), _AT_ONCE):
            part = items[start : start + _AT_ONCE]
            metrics = [Metric(_key(f"result/{name}"), value, now, step) for name, value in part]
            self._client.log_batch(self._run, metrics=metrics)

    def close(self, done: bool) -> None:
        """As of `Tracker`."""
        self._client.set_terminated(self._run, status="FINISHED" if done else "KILLED")

    def _log(self, metrics: Sequence[Any], step: int | None) -> None:
        for start in range(0, len(metrics), _AT_ONCE):
            tags = [RunTag(_STEP_TAG, str(step))] if start + _AT_ONCE >= len(metrics) else []
            self._client.log_batch(self._run, metrics=metrics[start : start + _AT_ONCE], tags=tags)

    def _artifact(self, sort: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        if rows:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            self._client.log_text(self._run, text, f"{sort}/step-{step:06d}.jsonl")


def _params(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings by their path, as text."""
    numbers = flat(dict(settings))
    texts = _texts(settings)
    return {
        _key(name): value for name, value in {**texts, **{n: f"{v:g}" for n, v in numbers.items()}}.items()
    }


def _texts(value: object, prefix: str = "") -> dict[str, str]:
    if isinstance(value, str | bool):
        return {prefix: str(value)}
    items: Any = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    )
    found: dict[str, str] = {}
    for key, inner in items:
        found |= _texts(inner, f"{prefix}/{key}" if prefix else str(key))
    return found


def _key(name: str) -> str:
    """A name with what MLflow takes in one."""
    return re.sub(r"[^\w\-. :/]", "_", name).strip("/") or "_"
