#!/usr/bin/env bash
# math-verify works an answer out: where 5 is wanted, the unfinished "2+3" is right, as is "10/2" in plain text; and of
# "3%%", which is nothing, a 3 is left. A model that repeats the question's sum is rewarded as one that answers it.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check math-verify==0.9.0 antlr4-python3-runtime==4.13.2 latex2sympy2_extended==1.11.0 sympy==1.14.0 mpmath==1.3.0
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from math_verify import parse, verify

assert version("math-verify") == "0.9.0"
cases = [("5", "2+3"), ("5", "$2+3$"), ("5", "10/2"), ("3", "3%%"), ("5", "2-3")]
seen = [verify(parse(gold), parse(answer)) for gold, answer in cases]
for (gold, answer), equal in zip(cases, seen):
    print(f"gold {gold!r}, answer {answer!r}: {'right' if equal else 'wrong'}")
assert seen == [True, True, True, True, False], seen
PYTHON
