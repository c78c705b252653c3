#!/usr/bin/env bash
# load_dataset("json") takes a column of texts that all look like dates for times: an answer "1969-07-20" comes back as a
# datetime, and as text with a time of day that nobody wrote. One other answer in the file, and all stay texts; CSV leaves
# them texts too. A reward that compares with the answer is 0 for every right reply.
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
from datetime import datetime
from importlib.metadata import version

from datasets import load_dataset

assert (version("datasets"), version("pyarrow")) == ("5.2.0", "26.0.1")
dates = ["1969-07-20", "1989-11-09"]


def loaded(kind: str, name: str, answers: list[str]) -> list[object]:
    """The answers as they come back from a file of that kind."""
    path = f"{sys.argv[1]}/{name}.{kind}"
    rows = [{"prompt": "When was it?", "answer": answer} for answer in answers]
    with open(path, "w", encoding="utf-8", newline="") as file:
        if kind == "json":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, ["prompt", "answer"])
            writer.writeheader()
            writer.writerows(rows)
    data = load_dataset(kind, data_files=path, split="train", cache_dir=f"{sys.argv[1]}/cache")
    return list(data["answer"])


only, mixed, table = loaded("json", "only", dates), loaded("json", "mixed", [*dates, "never"]), loaded("csv", "table", dates)
print("JSON, dates only:    ", only, "as text:", str(only[0]))
print("JSON, one other text:", mixed)
print("CSV, dates only:     ", table)
assert only == [datetime(1969, 7, 20), datetime(1989, 11, 9)], only
assert str(only[0]) == "1969-07-20 00:00:00"
assert mixed == [*dates, "never"], mixed
assert table == dates, table
PYTHON
