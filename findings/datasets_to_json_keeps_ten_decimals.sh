#!/usr/bin/env bash
# Dataset.to_json of datasets writes every number with ten decimals (pandas' default for JSON): a probability of 4e-12 comes
# out as 0.0 and its logarithm as -inf, a learning rate or variance of 1e-11 as 0.0, within lists too. CSV (columns of numbers)
# and parquet keep all digits, and so does Python's json; `double_precision=15` moves the loss to 5e-16.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1 numpy==2.4.6
HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 "$folder/venv/bin/python" - "$folder" <<'PYTHON'
import csv
import json
import sys
from importlib.metadata import version

import pyarrow.parquet
from datasets import Dataset

assert (version("datasets"), version("pandas")) == ("5.2.0", "3.1.1")
wanted = [4e-12, 1.2345678901234e-05, 0.25]
data = Dataset.from_dict({"p": wanted, "all": [wanted, wanted, wanted]})


def as_json(name: str, **settings: int) -> list[dict]:
    """The rows of the file that to_json writes."""
    data.to_json(f"{sys.argv[1]}/{name}", **settings)
    with open(f"{sys.argv[1]}/{name}", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


plain, longer = as_json("plain.jsonl"), as_json("longer.jsonl", double_precision=15)
data.to_csv(f"{sys.argv[1]}/table.csv")
data.to_parquet(f"{sys.argv[1]}/table.parquet")
with open(f"{sys.argv[1]}/table.csv", encoding="utf-8") as file:
    table = [float(row["p"]) for row in csv.DictReader(file)]
print("in memory:", data["p"][:])
print("to_json:  ", [row["p"] for row in plain], "within a list:", plain[0]["all"])
print("to_json, double_precision=15:", [row["p"] for row in longer])
print("to_csv:   ", table)
assert [row["p"] for row in plain] == plain[0]["all"] == [0.0, 1.23457e-05, 0.25]
assert longer[0]["p"] == 4e-12 and longer[1]["p"] != wanted[1]
assert table == wanted
assert pyarrow.parquet.read_table(f"{sys.argv[1]}/table.parquet")["p"].to_pylist() == wanted
assert [json.loads(json.dumps(number)) for number in wanted] == wanted
PYTHON
