#!/usr/bin/env bash
# The binary metrics of torchmetrics settle for each batch anew whether its numbers are probabilities: one number outside
# [0, 1] makes all of the batch logits, whose sigmoid is taken. Scores of a reward model (or margins) are thus on two scales in
# one metric: the AUROC of eight scores is 0.8125 in one update and 0.875 in two, and two pairs that are ranked right by
# margins of 0.2 and 0.4 have accuracy 0, unless a third one in their batch has 3.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torchmetrics==1.9.0 torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import torchmetrics
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC

assert torchmetrics.__version__ == "1.9.0", torchmetrics.__version__
scores = torch.tensor([0.2, 0.9, 0.4, 0.6, 3.0, -2.0, 0.5, 1.5])
good = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0])


def auroc(size: int) -> float:
    """Of all eight scores, given in batches of that size."""
    metric = BinaryAUROC()
    for start in range(0, 8, size):
        metric.update(scores[start : start + size], good[start : start + size])
    return metric.compute().item()


def right(margins: list[float]) -> list[float]:
    """The accuracy of pairs whose better reply has the higher score by these margins, and of each pair alone."""
    ones = torch.ones(len(margins), dtype=torch.long)
    return [BinaryAccuracy()(torch.tensor(margins), ones).item()]


pairs = [(p > n) + 0.5 * (p == n) for p in scores[good == 1] for n in scores[good == 0]]
by_hand = float(sum(pairs) / len(pairs))
print(f"AUROC of eight scores: one batch {auroc(8):.4f}, two {auroc(4):.4f}; by counting pairs {by_hand:.4f}")
print("accuracy of margins 0.2, 0.4:", right([0.2, 0.4]), "with 3.0 beside them:", right([0.2, 0.4, 3.0]))
assert by_hand == auroc(8) == 0.8125
assert auroc(4) == 0.875
assert right([0.2, 0.4]) == [0.0] and right([0.2, 0.4, 3.0]) == [1.0]
PYTHON
