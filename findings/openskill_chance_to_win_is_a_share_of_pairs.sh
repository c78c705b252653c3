#!/usr/bin/env bash
# predict_win of openskill is no chance to win among three players or more: each one's chances against every other are added
# up and divided by their sum over all. One who beats all others for certain gets 2/n: 0.67 among three, 0.2 among ten. For
# two it is right. Drawing performances from the same model gives 0.885 where it says 0.626. All five models do so.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check openskill==6.2.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import numpy as np
from openskill import models

assert version("openskill") == "6.2.0", version("openskill")
KINDS = ("PlackettLuce", "BradleyTerryFull", "BradleyTerryPart", "ThurstoneMostellerFull", "ThurstoneMostellerPart")


def drawn(model: object, mus: list[float], sigma: float) -> np.ndarray:
    """How often each has the best of performances mu + N(0, sigma² + beta²)."""
    spread = (sigma**2 + model.beta**2) ** 0.5
    best = np.random.default_rng(0).normal(mus, spread, size=(400_000, len(mus))).argmax(axis=1)
    return np.bincount(best, minlength=len(mus)) / len(best)


for kind in KINDS:
    model = getattr(models, kind)()

    def said(mus: list[float], sigma: float = 2.0) -> np.ndarray:
        return np.array(model.predict_win([[model.rating(mu=mu, sigma=sigma)] for mu in mus]))

    two, three = said([35, 27]), said([35, 27, 20])
    print(f"{kind}: two {two.round(3)}, drawn {drawn(model, [35, 27], 2).round(3)};", end=" ")
    print(f"three {three.round(3)}, drawn {drawn(model, [35, 27, 20], 2).round(3)};", end=" ")
    print("certain to win, of 2, 3, 5, 10:", [round(float(said([1000, *[0] * (n - 1)])[0]), 3) for n in (2, 3, 5, 10)])
    assert np.abs(two - drawn(model, [35, 27], 2)).max() < 0.005
    assert abs(three[0] - 0.626) < 0.002 and drawn(model, [35, 27, 20], 2)[0] > 0.87
    for n in (2, 3, 5, 10):
        certain = [1000.0, *[0.0] * (n - 1)]
        assert drawn(model, certain, 2)[0] == 1
        assert abs(said(certain)[0] - (1 if n == 2 else 2 / n)) < 1e-9
PYTHON
