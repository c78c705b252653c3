#!/usr/bin/env bash
# The JSON_MIN export of Label Studio writes its own fields over those of the task. A row that came with an id gets the id
# of the task instead, while the CSV of the same export keeps the row's; created_at is the time of the annotation; and a field
# named as a control holds the annotation where there is one and the old text where there is none.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check label-studio-sdk==2.1.2
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import csv
import json
import sys
from importlib.metadata import version
from pathlib import Path

from label_studio_sdk.converter import Converter

assert version("label-studio-sdk") == "2.1.2"
place = Path(sys.argv[1])
config = """<View><Text name="shown" value="$prompt"/>
<Choices name="winner" toName="shown"><Choice value="A"/><Choice value="B"/></Choices>
<TextArea name="comment" toName="shown"/></View>"""


def result(name: str, kind: str, value: dict[str, list[str]]) -> dict[str, object]:
    """One answer of an annotator, as Label Studio stores it."""
    return {"from_name": name, "to_name": "shown", "type": kind, "value": value}


silent = [result("winner", "choices", {"choices": ["A"]})]
spoken = [result("winner", "choices", {"choices": ["B"]}), result("comment", "textarea", {"text": ["too long"]})]
task = {
    "id": 901,
    "data": {"id": "row-7", "prompt": "Hi", "comment": "by the model's author", "created_at": "2024-05-01"},
    "annotations": [
        {"id": 1, "completed_by": 3, "created_at": "2026-01-01T00:00:00Z", "result": silent},
        {"id": 2, "completed_by": 4, "created_at": "2026-01-02T00:00:00Z", "result": spoken},
    ],
}
(place / "tasks.json").write_text(json.dumps([task]), encoding="utf-8")
converter = Converter(config, str(place))
converter.convert(str(place / "tasks.json"), str(place / "min"), "JSON_MIN", is_dir=False)
converter.convert(str(place / "tasks.json"), str(place / "table"), "CSV", is_dir=False)
rows = json.loads((place / "min" / "result.json").read_text(encoding="utf-8"))
with (place / "table" / "result.csv").open(encoding="utf-8", newline="") as file:
    table = list(csv.DictReader(file))
print("what was sent:", task["data"])
for row in rows:
    print("JSON_MIN:", {key: row[key] for key in ("id", "created_at", "winner", "comment")})
print("CSV ids:", [row["id"] for row in table])
assert [row["id"] for row in rows] == [901, 901], rows
assert [row["id"] for row in table] == ["row-7", "row-7"], table
assert "row-7" not in json.dumps(rows) and "2024-05-01" not in json.dumps(rows)
assert {row["winner"]: row["comment"] for row in rows} == {"A": "by the model's author", "B": "too long"}, rows
PYTHON
