#!/usr/bin/env bash
# math-verify reads "1e3", as every programming language writes a thousand, as 1 in plain text, and in LaTeX as a product
# with Euler's number. The answer "5e-3" is right where 5 is wanted and wrong where 0.005 is.
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
cases = [("1000", "1e3"), ("1", "1e3"), ("0.005", "5e-3"), ("5", "5e-3"), ("$1000$", "$1e3$")]
seen = [verify(parse(gold), parse(answer)) for gold, answer in cases]
for (gold, answer), equal in zip(cases, seen):
    print(f"gold {gold!r}, answer {answer!r}: {'right' if equal else 'wrong'}")
assert seen == [False, True, False, True, False], seen
PYTHON
