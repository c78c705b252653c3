"""Weights & Biases and MLflow without a network: what they hold after a run that was cut off and went on.

    python -m venv /tmp/trackers && /tmp/trackers/bin/pip install wandb mlflow-skinny sqlalchemy alembic
    PYTHONPATH=src /tmp/trackers/bin/python benchmarks/trackers_offline.py

Needs none of keel's dependencies. Prints a line a tool; exit code 1 where a step is missing or there twice.
The file of `wandb offline` is read by its own description of the format (wandb.proto): a LevelDB log.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from keel.trackers.process import Trackers

STEPS, CUT = 12, 5


def write(folder: Path, first: int, last: int) -> None:
    """Append the logs of some steps."""
    folder.mkdir(parents=True, exist_ok=True)
    finding = {"check": "length_drift", "severity": "act", "evidence": "long", "remedy": "cap"}
    logs: dict[str, Any] = {
        "metrics": lambda step: {"step": step, "loss": 1 / step, "objective/kl": step / 10},
        "times": lambda step: {"step": step, "train": 0.5},
        "samples": lambda step: {"step": step, "prompt": "hi", "completion": "yo", "rewards": {"r": 0.5}},
        "events": lambda step: {"step": step, **finding},
    }
    for log, row in logs.items():
        with (folder / f"{log}.jsonl").open("a") as handle:
            handle.writelines(json.dumps(row(step)) + "\n" for step in range(first, last + 1))


def tracked(run: Path, track: list[dict[str, Any]]) -> None:
    """Half of a stage, sent; cut back to its checkpoint; gone on with to its end."""
    folder = run / "stages" / "sft"
    write(folder, 1, STEPS // 2)
    with Trackers(track, run, print) as trackers:
        trackers.follow("sft", "sft", folder, {"lr": 0.1, "model": {"path": "x"}}, False)
    for log in ("metrics", "times", "samples", "events"):
        path = folder / f"{log}.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:CUT]))
    with Trackers(track, run, print) as trackers:
        trackers.follow("sft", "sft", folder, {"lr": 0.1, "model": {"path": "x"}}, False)
        write(folder, CUT + 1, STEPS)
        (folder / "result.json").write_text('{"eval_loss": 0.25}')
        trackers.ended("sft", True)


def wandb_steps(run: Path) -> tuple[list[int], int, int]:
    """Steps with a loss, tables of samples and alerts in the files of `wandb offline`."""
    steps, tables, alerts = list[int](), 0, 0
    for path in sorted((run / "trackers" / "wandb").glob("offline-run-*/*.wandb")):
        for record in _records(path.read_bytes()):
            if record.WhichOneof("record_type") == "history":
                items = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
                steps += [int(items["_step"])] if "loss" in items else []
                tables += "samples/_type" in items
            alerts += record.WhichOneof("record_type") == "alert"
    return steps, tables, alerts


def _records(data: bytes) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

    place, whole = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, sort = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if sort in (1, 4):  # the whole of a record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def mlflow_steps(uri: str) -> tuple[list[int], int, int]:
    """Steps with a loss, files of samples and tags of findings in MLflow's store."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("keel")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    steps = [metric.step for metric in client.get_metric_history(found.info.run_id, "loss")]
    assert found.data.metrics["result/eval_loss"] == 0.25
    assert found.info.status == "FINISHED"
    samples = client.list_artifacts(found.info.run_id, "samples")
    return steps, len(samples), sum(tag.startswith("finding.") for tag in found.data.tags)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        os.chdir(name)  # MLflow puts what belongs to a local store where it is started
        uri = f"sqlite:///{name}/mlflow.db"
        tracked(run, [{"kind": "wandb", "mode": "offline"}, {"kind": "mlflow", "uri": uri}])
        found = {"wandb": wandb_steps(run), "mlflow": mlflow_steps(uri)}
    wrong = False
    for tool, (steps, samples, findings) in found.items():
        whole = sorted(steps) == list(range(1, STEPS + 1)) and samples == STEPS and findings > 0
        wrong |= not whole
        counted = f"samples of {samples} steps, {findings} findings"
        print(f"{tool}: steps {steps}, {counted}: {'whole' if whole else 'WRONG'}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
