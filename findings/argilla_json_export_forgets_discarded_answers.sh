#!/usr/bin/env bash
# Argilla's JSON of a record (to_dict, and with it to_json and to_list) has each answer and who gave it, not its status: what
# an annotator discarded, or left as a draft, looks like what was submitted. Read back, no answer has a status. Only the
# flattened list has it. Training on the export trains on the votes that were withdrawn.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check argilla==2.8.0 requests==2.34.2
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import sys
from importlib.metadata import version
from pathlib import Path

import argilla as rg
from argilla.records._io import GenericIO, JsonIO  # what dataset.records.to_list and to_json call, without a server

assert version("argilla") == "2.8.0"
people = [f"00000000-0000-0000-0000-00000000000{number}" for number in (1, 2, 3)]
given = [("A", "submitted"), ("B", "discarded"), ("B", "draft")]
answers = [
    rg.Response("winner", value, user_id=person, status=status)
    for person, (value, status) in zip(people, given, strict=True)
]
record = rg.Record(id="row-7", fields={"prompt": "Hi"}, responses=answers)
path = Path(sys.argv[1]) / "records.json"
JsonIO.to_json([record], path)
exported = json.loads(path.read_text(encoding="utf-8"))[0]["responses"]["winner"]
back = [(answer.value, answer.status) for answer in rg.Record.from_dict(record.to_dict()).responses]
flat = GenericIO.to_list([record], flatten=True)[0]["winner.responses.status"]
print("given:        ", given)
print("to_json:      ", exported)
print("read back:    ", back)
print("flattened has:", flat)
assert [(answer.value, answer.status.value) for answer in record.responses] == given
assert exported == [{"value": value, "user_id": person} for person, (value, _) in zip(people, given, strict=True)]
assert back == [("A", None), ("B", None), ("B", None)], back
assert flat == ["submitted", "discarded", "draft"], flat
PYTHON
