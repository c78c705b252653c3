#!/usr/bin/env bash
# An entry of reasoning-gym's tasks on grids (`arc_agi`, `rearc`) that was written as JSON and read again no longer scores its
# own answer: tuples have become lists, the comparison finds them different, and the right reply gets 0.05 without an error.
# Who keeps entries in a file, or sends them to a process that scores, trains on noise.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check reasoning-gym==0.1.25
"$folder/venv/bin/python" - <<'PYTHON'
import json
from importlib.metadata import version

import reasoning_gym

assert version("reasoning-gym") == "0.1.25"
for name in ("arc_agi", "rearc", "gcd"):
    task = reasoning_gym.create_dataset(name, seed=3, size=5)
    entries = [task[i] for i in range(5)]
    kept = [json.loads(json.dumps(entry)) for entry in entries]
    fresh = {task.score_answer(entry["answer"], entry) for entry in entries}
    again = {task.score_answer(entry["answer"], entry) for entry in kept}
    print(f"{name}: the task's own answers score {fresh}, and {again} beside entries that were kept as JSON")
    assert fresh == {1.0}
    assert again == ({1.0} if name == "gcd" else {0.05})
PYTHON
