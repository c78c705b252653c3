#!/usr/bin/env bash
# Dataset.from_generator and Dataset.map of datasets take the columns from the first row that is written: a key that only
# later rows have (a margin, a tool call, a reason) is gone from all of them, without a word. The same rows as a JSON file, or
# streamed from the same generator, keep it, with None where a row has none.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1 numpy==2.4.6
HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 "$folder/venv/bin/python" -W error - "$folder" <<'PYTHON'
import json
import sys
from importlib.metadata import version

from datasets import Dataset, IterableDataset, load_dataset

assert version("datasets") == "5.2.0", version("datasets")
cache = f"{sys.argv[1]}/cache"


def rows():
    yield {"text": "a"}
    yield {"text": "b", "margin": 2.0}
    yield {"text": "c", "margin": 3.0}


def marked(row: dict) -> dict:
    """A margin for every row but the first."""
    return {} if row["text"] == "a" else {"margin": 2.0}


with open(f"{sys.argv[1]}/rows.jsonl", "w", encoding="utf-8") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows())
texts = Dataset.from_dict({"text": ["a", "b", "c"]})
found = {
    "from_generator": Dataset.from_generator(rows, cache_dir=cache).to_list(),
    "map": texts.map(marked).to_list(),
    "JSON file": load_dataset("json", data_files=f"{sys.argv[1]}/rows.jsonl", split="train", cache_dir=cache).to_list(),
    "streamed": list(IterableDataset.from_generator(rows)),
}
for way, made in found.items():
    print(f"{way:15}", made)
assert found["from_generator"] == found["map"] == [{"text": "a"}, {"text": "b"}, {"text": "c"}]
assert [row.get("margin") for row in found["JSON file"]] == [None, 2.0, 3.0]
assert [row.get("margin") for row in found["streamed"]] == [None, 2.0, 3.0]
PYTHON
