#!/usr/bin/env bash
# evalica's `bradley_terry` gives every model the same score as soon as one of them has won nothing: scores are divided by their
# geometric mean, which that model's 0 makes 0, and what is no number then becomes the tolerance. Four models that have played
# each other often enough to be told apart come out as equal, without a warning. One that nobody has beaten does the same.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check evalica==0.4.2 numpy==2.4.6 pandas==3.1.1
"$folder/venv/bin/python" -W error - <<'PYTHON'
from importlib.metadata import version
from itertools import combinations

import evalica
from evalica import Winner

assert version("evalica") == "0.4.2", version("evalica")


def scores(won: list) -> dict[str, float]:
    """Bradley-Terry scores by model, best first."""
    xs, ys, winners = zip(*won)
    found = evalica.bradley_terry(xs, ys, winners).scores.sort_index()
    return {model: float(score) for model, score in found.items()}


four = [(x, y, winner) for x, y in combinations("abcd", 2) for winner in [Winner.X] * 3 + [Winner.Y]]
loser = four + [(model, "loser", Winner.X) for model in "abcd"]
winner = four + [("winner", model, Winner.X) for model in "abcd"]
print("four models:       ", scores(four))
print("and one without win:", scores(loser))
print("and one unbeaten:   ", scores(winner))
assert scores(four)["a"] > 5 * scores(four)["d"] > 0
for found in (scores(loser), scores(winner)):
    assert len(set(found.values())) == 1, found
PYTHON
