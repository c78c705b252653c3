#!/usr/bin/env bash
# reasoning-gym's task `game_of_life_halting` (does a board come to rest?) gives the full score to every reply that is not
# empty: "xyzzy", and "True" where its own answer is False. A policy that is trained on it has all rewards equal, and a share of
# it in a mixture raises the mean of any policy.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check reasoning-gym==0.1.25
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import reasoning_gym

assert version("reasoning-gym") == "0.1.25"
task = reasoning_gym.create_dataset("game_of_life_halting", seed=1, size=20)
entries = [task[i] for i in range(20)]
assert {entry["answer"] for entry in entries} == {"True", "False"}
opposite = {"True": "False", "False": "True"}
for what, reply in {
    "the answer": lambda entry: entry["answer"],
    "its opposite": lambda entry: opposite[entry["answer"]],
    "xyzzy": lambda entry: "xyzzy",
}.items():
    scores = {task.score_answer(reply(entry), entry) for entry in entries}
    print(f"{what}: scores {scores}")
    assert scores == {1.0}
PYTHON
