#!/usr/bin/env bash
# aggregate_raters of statsmodels makes a category of its own of missing votes (NaN), and fleiss_kappa takes them for votes
# that agree or disagree. An annotator who never voted lowers kappa from 0.6 to -0.1, votes without one dissent come out at
# 0.47, and two annotators at chance who skip the same items at 0.6.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check statsmodels==0.15.0 numpy==2.4.6 scipy==1.17.1 pandas==3.1.1
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import numpy as np
from statsmodels.stats.inter_rater import aggregate_raters, fleiss_kappa

assert version("statsmodels") == "0.15.0"
nan = np.nan


def kappa(votes: list[list[float]]) -> float:
    """Fleiss' kappa of items by annotators."""
    return round(float(fleiss_kappa(aggregate_raters(np.array(votes))[0])), 4)


two = [[0, 0], [1, 1], [0, 0], [1, 0], [1, 1]]
absent = [[*row, nan] for row in two]
unanimous = [[0, 0, 0], [1, 1, 1], [0, 0, nan], [1, 1, nan]]
chance = [[0, 0], [0, 1], [1, 0], [1, 1]]
skipped = [*chance, *[[nan, nan]] * 4]
print("categories:", aggregate_raters(np.array(absent))[1])
print(f"two annotators: {kappa(two)}; with a third who never voted: {kappa(absent)}")
print(f"no two votes differ, two are missing: {kappa(unanimous)}")
print(f"two annotators at chance: {kappa(chance)}; with four items that neither voted on: {kappa(skipped)}")
assert np.isnan(aggregate_raters(np.array(absent))[1][-1])
assert (kappa(two), kappa(absent)) == (0.6, -0.1)
assert kappa(unanimous) == 0.4667
assert (kappa(chance), kappa(skipped)) == (0, 0.6)
PYTHON
