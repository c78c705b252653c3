#!/usr/bin/env bash
# TRL finds the prompt of a preference pair without one as what both texts begin with. Words with which both replies begin
# are moved into the prompt and never trained, and where one text is the start of the other the cut falls inside a word:
# the prompt ends in "i", the replies are "s" and "s blue.".
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check trl==1.16.0 transformers==5.23.0 datasets==5.2.0 accelerate==1.15.0 torch==2.13.0 numpy==2.4.6 pyarrow==26.0.1
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from trl.data_utils import extract_prompt

assert version("trl") == "1.16.0"
shared = extract_prompt({"chosen": "Q: 2+2? A: The answer is 4", "rejected": "Q: 2+2? A: The answer is 5"})
start = extract_prompt({"chosen": "The sky is blue.", "rejected": "The sky is"})
print(shared)
print(start)
assert shared == {"prompt": "Q: 2+2? A: The answer is", "chosen": " 4", "rejected": " 5"}, shared
assert start == {"prompt": "The sky i", "chosen": "s blue.", "rejected": "s"}, start
PYTHON
