#!/usr/bin/env bash
# cohen_kappa_score(weights="quadratic" or "linear") of scikit-learn takes the distance of two grades from their places among
# the grades that occur, not from the grades: where nobody gave 3 or 4, a 2 against a 5 counts as neighbours. The agreement of
# two annotators on a scale from 1 to 5 is then 0.75, and 0.48 with all five grades in `labels`; grades as words are put in the
# order of the alphabet, and "bad" against "good" is nearer than "bad" against "ok".
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check scikit-learn==1.9.1 scipy==1.17.1 numpy==2.4.6
"$folder/venv/bin/python" -W error - <<'PYTHON'
import numpy as np
import sklearn
from sklearn.metrics import cohen_kappa_score

assert sklearn.__version__ == "1.9.1", sklearn.__version__
one, other = [1, 2, 5, 5, 1, 2], [1, 5, 5, 2, 1, 2]


def kappa(power: int) -> float:
    """1 - observed over expected distance, the distance |a - b|^power of the grades themselves (Cohen 1968)."""
    a, b = np.array(one), np.array(other)
    observed = (np.abs(a - b) ** power).mean()
    return float(1 - observed / (np.abs(a[:, None] - b[None, :]) ** power).mean())


for weights, power, seen, by_hand in (("quadratic", 2, 0.75, 0.4808), ("linear", 1, 0.625, 0.4375)):
    plain = cohen_kappa_score(one, other, weights=weights)
    scale = cohen_kappa_score(one, other, weights=weights, labels=[1, 2, 3, 4, 5])
    print(f"{weights}: {plain:.4f}; with the whole scale as labels {scale:.4f}; by hand {kappa(power):.4f}")
    assert abs(plain - seen) < 1e-4, plain
    assert abs(scale - kappa(power)) < 1e-9 and abs(scale - by_hand) < 1e-4, scale

words = ["bad", "ok", "good", "good", "bad", "ok"]
near = cohen_kappa_score(words, ["ok", "ok", "good", "good", "bad", "ok"], weights="quadratic")
far = cohen_kappa_score(words, ["good", "ok", "good", "good", "bad", "ok"], weights="quadratic")
print(f'one "bad" is "ok" to the other annotator: {near:.4f}; it is "good": {far:.4f}')
assert far > near
PYTHON
