#!/usr/bin/env bash
# evalica's `eigen` (eigenvalue scores of pairwise comparisons) gives the model that wins against all others the lowest score
# and the one that loses to all the highest: it multiplies by the transposed table of wins, so that one is ranked by the
# strength of those one lost to. Its other six methods agree on the order. Both solvers do so, and its `EigenResult` does not
# say that less is better. Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check evalica==0.4.2 numpy==2.4.6 pandas==3.1.1
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version
from itertools import combinations

import evalica
from evalica import Winner

assert version("evalica") == "0.4.2", version("evalica")
# Of each two models the one that comes first in the alphabet wins three times out of four.
won = [(x, y, winner) for x, y in combinations("abcd", 2) for winner in [Winner.X] * 3 + [Winner.Y]]
xs, ys, winners = zip(*won)
for name in ("counting", "average_win_rate", "bradley_terry", "newman", "elo", "pagerank", "eigen"):
    for solver in ("pyo3", "naive"):
        scores = getattr(evalica, name)(xs, ys, winners, solver=solver).scores.sort_values(ascending=False)
        print(f"{name} ({solver}):", {model: round(float(score), 3) for model, score in scores.items()})
        assert "".join(scores.index) == ("dcba" if name == "eigen" else "abcd"), scores
PYTHON
