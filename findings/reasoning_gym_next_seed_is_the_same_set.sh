#!/usr/bin/env bash
# In reasoning-gym 102 of 105 tasks draw entry i by `seed + i`. So the set of seed 8 is that of seed 7 moved by one: two sets
# of different seeds, one to train on and one to test with, share all but as many entries as their seeds are apart.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check reasoning-gym==0.1.25
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import reasoning_gym
from reasoning_gym.factory import DATASETS

assert version("reasoning-gym") == "0.1.25"
trained = reasoning_gym.create_dataset("gcd", seed=42, size=500)
tested = reasoning_gym.create_dataset("gcd", seed=43, size=100)
shared = {entry["question"] for entry in trained} & {entry["question"] for entry in tested}
asked = {entry["question"] for entry in tested}
print(f"gcd: {len(shared)} of {len(asked)} questions of seed 43 are among 500 of seed 42")
assert shared == asked

moved = []
for name in sorted(set(DATASETS) - {"composite"}):
    first, second = (reasoning_gym.create_dataset(name, seed=seed, size=5) for seed in (7, 8))
    if all(first[i + 1]["question"] == second[i]["question"] for i in range(4)):
        moved.append(name)
print(f"{len(moved)} of {len(DATASETS) - 1} tasks: seed 8 is seed 7 moved by one")
assert len(moved) >= 100
PYTHON
