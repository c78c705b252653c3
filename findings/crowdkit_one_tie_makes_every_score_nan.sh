#!/usr/bin/env bash
# crowd-kit's Bradley-Terry takes a label that names neither side (an annotator's tie) for one more item that won, and
# returns NaN for every item without a word. Its label column is not checked against the pair.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check crowd-kit==1.4.2 numpy==2.4.6 pandas==3.1.1 transformers==5.23.0 torch==2.13.0
"$folder/venv/bin/python" - <<'PYTHON'
import warnings
from importlib.metadata import version

import pandas as pd

warnings.simplefilter("ignore")
from crowdkit.aggregation import BradleyTerry

assert version("crowd-kit") == "1.4.2"
columns = ["worker", "left", "right", "label"]
votes = [("w", "x", "y", "x")] * 3 + [("w", "x", "y", "y")] * 2
plain = BradleyTerry(n_iter=100).fit_predict(pd.DataFrame(votes, columns=columns))
tied = BradleyTerry(n_iter=100).fit_predict(pd.DataFrame([*votes, ("w", "x", "y", "tie")], columns=columns))
print("five votes:", plain.round(2).to_dict())
print("the same and one tie:", tied.to_dict())
assert plain.round(2).to_dict() == {"x": 0.6, "y": 0.4}, plain
assert set(tied.index) == {"x", "y", "tie"} and tied.isna().all(), tied
PYTHON
