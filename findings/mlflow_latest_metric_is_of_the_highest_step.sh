#!/usr/bin/env bash
# The metrics of an MLflow run hold, by its documentation, the value of each with the latest timestamp. They hold that of the
# highest step. A training that went back to an earlier checkpoint and has not come as far again shows the values of the
# attempt that was given up, and search_runs finds and orders runs by them.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check mlflow-skinny==3.17.2 sqlalchemy==2.1.9 alembic==1.20.1
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import logging
import sys
from importlib.metadata import version

from mlflow import MlflowClient
from mlflow.entities import RunData

logging.disable(logging.INFO)
assert version("mlflow-skinny") == "3.17.2"
store = f"sqlite:///{sys.argv[1]}/runs.db"
client = MlflowClient(tracking_uri=store, registry_uri=store)
experiment = client.create_experiment("ppo")
run = client.create_run(experiment).info.run_id
clock = 1_700_000_000_000
for step, reward in ((50, 0.4), (60, 0.9), (100, 0.1)):  # fell apart after step 60
    client.log_metric(run, "reward", reward, timestamp=(clock := clock + 1000), step=step)
for step, reward in ((60, 0.8), (70, 0.95)):  # again, from the checkpoint of step 50
    client.log_metric(run, "reward", reward, timestamp=(clock := clock + 1000), step=step)
shown = client.get_run(run).data.metrics["reward"]
newest = max(client.get_metric_history(run, "reward"), key=lambda metric: metric.timestamp).value
found = len(client.search_runs([experiment], "metrics.reward < 0.5"))
print("documented:", " ".join(RunData.metrics.__doc__.split()))
print("newest value:", newest, "shown:", shown, "runs found below 0.5:", found)
assert "the metric value with the latest timestamp is returned" in " ".join(RunData.metrics.__doc__.split())
assert (newest, shown, found) == (0.95, 0.1, 1)
PYTHON
